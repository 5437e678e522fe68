"""What `integrations.trl.MiniRL` costs of a step of TRL's `GRPOTrainer`.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_trl [--rounds 9] [--hidden 256]

Three sides: TRL alone, the class with everything off, and the class with R3 (TRL's own generation is
watched), MiniRL's objective and all statistics. Each side has a trainer of its own, and a round is
one generation and its two gradient steps on each, in turn; the order within a round is drawn. The
sides start from the same weights and learn nothing (learning rate 0), so they sample alike.

Two measurements, both of processor time. The medians of the rounds' ratios to TRL alone see
everything, within the noise of a step: some per cent. `Account` sees a hundredth of a per cent, but
only what the class adds by its own code: seconds in its methods, without what they ask of TRL, and
what the routers' forwards take longer than TRL's. Both sides must then ask the same of TRL: the
number of rows that it computes log-probabilities of is printed.
"""

import argparse
import functools
import inspect
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


class Account:
    """Seconds of processor time by whose code runs: "own" (this project's), "base" (TRL's and what
    it calls), "router" (forwards of routers). Each second is counted once, for the innermost."""

    def __init__(self):
        self.spent, self.rows, self.running = Counter(), Counter(), []
        self.side, self.since = None, 0.0

    def turn(self):
        now = time.process_time()
        if self.running:
            self.spent[self.side, self.running[-1]] += now - self.since
        self.since = now

    def timed(self, whose, f):
        @functools.wraps(f)
        def counted(*args, **kwargs):
            self.turn()
            self.running.append(whose)
            if f.__name__ == "_get_per_token_logps_and_entropies" and whose == "base":
                self.rows[self.side] += len(args[2])  # input_ids
            try:
                return f(*args, **kwargs)
            finally:
                self.turn()
                self.running.pop()

        return counted

    def open(self, own, base, router):
        "Wrap the methods of these classes for the rest of the process."
        ours = [k for k in own.__mro__ if k.__module__ == own.__module__]
        names = {n for k in ours for n, f in vars(k).items() if inspect.isfunction(f)}
        for owner in ours:
            for name in names & vars(owner).keys():
                setattr(owner, name, self.timed("own", vars(owner)[name]))
        for name in names:
            if name != "__init__" and inspect.isfunction(getattr(base, name, None)):
                setattr(base, name, self.timed("base", getattr(base, name)))
        router.forward = self.timed("router", router.forward)


def trainers(folder, hidden):
    "A trainer for each side, ready to step."
    sys.path.insert(0, str(ROOT / "tests"))
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer
    from trl_runs import PROMPTS, Plain, config, odd

    from minirl_nb import tasks
    from minirl_nb.objective import MINIRL
    from tests.bench.__main__ import bench_model

    sizes = dict(hidden_size=hidden, moe_intermediate_size=hidden // 2, head_dim=hidden // 4)
    bench_model(**sizes, vocab_size=4096).save_pretrained(folder)
    tasks.arithmetic_tokenizer().save_pretrained(folder)
    settings = dict(per_device_train_batch_size=32, num_generations=8, max_completion_length=32)
    settings |= dict(steps_per_generation=2, gradient_checkpointing=True, learning_rate=0.0)
    settings |= dict(max_steps=10_000, logging_steps=10_000)
    options = {
        "TRL": (GRPOTrainer, {}),
        "off": (Plain, dict(measure=False)),
        "on": (Plain, dict(replay="R3", objective=MINIRL)),
    }
    made = {}
    for name, (kind, given) in options.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.set_experts_implementation("grouped_mm")
        trainer = kind(
            model=model,
            reward_funcs=odd,
            args=config(f"{folder}/{name}", **settings),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            **given,
        )
        made[name] = trainer
    return made


def stepper(trainer):
    "A function that makes one generation and its gradient steps, as `train` does."
    trainer.create_optimizer_and_scheduler(10_000)
    trainer.model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": p} for p in trainer.train_dataset["prompt"] for _ in range(8)]

    def step():
        torch.manual_seed(0)
        for _ in range(2):
            trainer.model.train()
            trainer.training_step(trainer.model, rows, None)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        for kept in trainer._metrics["train"].values():
            kept.clear()

    return step


def overhead(rounds, hidden=256):
    "Rows of the table: medians of paired ratios, and the median seconds of a step."
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
    from trl import GRPOTrainer

    from minirl_nb.integrations.trl import MiniRL

    account = Account()
    account.open(MiniRL, GRPOTrainer, Qwen3MoeTopKRouter)
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: stepper(t) for name, t in trainers(folder, hidden).items()}
        seconds = {name: [] for name in steps}
        order = random.Random(0)
        for r in range(rounds + 1):
            names = list(steps)
            order.shuffle(names)
            for name in names:
                steps[name]()  # the first of two pays for caches that another side left cold
                account.side = name if r else None
                started = time.process_time()
                steps[name]()
                account.side = None
                if r:  # the first round warms up
                    seconds[name].append(time.process_time() - started)
    rows = [
        ("TRL, one generation and two gradient steps", statistics.median(seconds["TRL"]), "s", "")
    ]
    total = sum(seconds["TRL"])
    rows.append(("rows whose log-probabilities TRL computes", account.rows["TRL"] / rounds, "", ""))
    for name, goal in (("off", "<= 1"), ("on", "<= 3")):
        spent = {w: account.spent[name, w] for w in ("own", "router")}
        longer = spent["router"] - account.spent["TRL", "router"]
        rows.append((f"MiniRL {name}, rows computed", account.rows[name] / rounds, "", ""))
        rows.append(("  its methods, of TRL's time", 100 * spent["own"] / total, "%", ""))
        rows.append(("  routers longer by, of TRL's time", 100 * longer / total, "%", ""))
        added = 100 * (spent["own"] + longer) / total
        rows.append((f"MiniRL {name}, added by its own code", added, "%", goal))
        ratios = [100 * (a / b - 1) for a, b in zip(seconds[name], seconds["TRL"])]
        rows.append(
            (f"MiniRL {name}, whole step against TRL's", statistics.median(ratios), "%", "")
        )
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            (f"  quartiles: {quartiles[0]:.2f} to {quartiles[2]:.2f}", len(ratios), "rounds", "")
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for label, value, unit, goal in overhead(args.rounds, args.hidden):
        print(f"{label:60s} {value:10.3f} {unit:8s} {goal}")


if __name__ == "__main__":
    main()
