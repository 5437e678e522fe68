"""`make bench`: the tables of the front page. One section: `make bench ARGS=engine`. `--json FILE`
keeps the numbers. `limits` compares with what the machine can do, `ahead` two processes with one;
they need 8 GB and half an hour, or two idle cores, so they run only where they are named.

Every comparison alternates its sides within one process and takes the best of several rounds
(`formats`: the median of paired rounds), so that a busy neighbour hurts both alike. Without TRL its
row is left out and says so."""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
THREADS = 1  # the model is tiny: a second thread costs more in hand-over than it computes


def bench_model(**changes):
    "The demo's model, random weights (seed 0): 0.34 million parameters."
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = dict(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=15,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(config | changes))).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def alternate(sides, rounds, clock=time.process_time):
    """Best seconds of each side, and its last result; the sides take turns. Processor time by
    default: with one thread it is the clock's on an idle machine, and on a busy one the fairer of
    the two."""
    best, result = dict.fromkeys(sides, float("inf")), {}
    for r in range(rounds + 1):  # the first round warms up
        for name, f in sides.items():
            for _ in range(
                2
            ):  # twice in a row: the first pays for the caches that the other side left cold
                t = clock()
                result[name] = f()
                if r:
                    best[name] = min(best[name], clock() - t)
    return best, result


def paired(sides, rounds, clock=time.process_time):
    """Median, lower and upper quartile over the rounds of the second side's seconds as a share of
    the first's. A round is first, second, second, first, so that a drift of the machine's speed
    cancels; the first round warms up."""
    (first, second), ratios = sides.values(), []
    for _ in range(rounds + 1):
        seconds = []
        for f in (first, second, second, first):
            t = clock()
            f()
            seconds.append(clock() - t)
        ratios.append((seconds[1] + seconds[2]) / (seconds[0] + seconds[3]))
    low, middle, high = statistics.quantiles(ratios[1:], n=4)
    return middle, low, high


def hf_generate(model, prompts, n, limit, batch):
    """transformers' generate on the same prompts, `batch` rows at a time; returns the number of
    sampled tokens, end tokens included."""
    rows = torch.tensor(prompts).repeat_interleave(n, 0)
    eos, total = model.generation_config.eos_token_id, 0
    for part in rows.split(batch):
        with torch.no_grad():
            out = model.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                max_new_tokens=limit,
            )
        new = out[:, part.shape[1] :]
        if eos is None:
            total += new.numel()
        else:
            total += int(((new == eos).cumsum(1) - (new == eos).long() == 0).sum())
    return total


def engine(rounds):
    """TorchEngine against generate: 1,024 responses to 128 prompts of 6 tokens, 256 rows at a time.

    First all of one length (32; the end token is switched off on both sides), then with the end
    token (random weights: 1 in 16) and a limit of 64, so that the mean length is about a quarter of
    it."""
    from minirl_nb.rollout import Sampling, TorchEngine

    prompts = torch.randint(2, 15, (128, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for name, limit, eos in (
        ("equal lengths, 32 tokens", 32, None),
        ("mean a quarter of the limit of 64", 64, 15),
    ):
        model = bench_model()
        model.generation_config.eos_token_id = eos
        ours = {
            k: TorchEngine(
                model, eos_token_id=99 if eos is None else eos, pad_token_id=0, max_batch=256, **kw
            )
            for k, kw in (
                ("plain", {}),
                ("routes", {"routes": True}),
                ("fp8", {"fp8": "fp8_per_channel", "routes": True}),
            )
        }
        s = Sampling(n=8, max_new_tokens=limit, seed=1)
        sides = {
            k: (lambda e=e, s=s: int(e.generate(prompts, s).response_length.sum()))
            for k, e in ours.items()
        }
        sides["generate"] = lambda model=model, limit=limit: hf_generate(
            model, prompts, 8, limit, 256
        )
        seconds, tokens = alternate(sides, rounds)
        rate = {k: tokens[k] / seconds[k] for k in sides}
        goal = 1.5 if eos is None else 3.0
        rows += [
            (f"generate of transformers, {name}", rate["generate"], "tokens/s", ""),
            (f"TorchEngine, {name}", rate["plain"], "tokens/s", ""),
            (
                f"TorchEngine / generate, {name}",
                rate["plain"] / rate["generate"],
                "x",
                f">= {goal}",
            ),
            (f"with routes recorded, {name}", rate["routes"], "tokens/s", ""),
            (
                f"FP8 emulation with routes, time against plain sampling, {name}",
                rate["plain"] / rate["fp8"],
                "x",
                "<= 1.5",
            ),
        ]
    return rows


def formats(rounds):
    """Sampling in every low-precision scheme against plain sampling.

    512 responses of 24 tokens, 256 rows at a time, no routes. E4M3's goal is that of the engine
    section; the other formats may take twice as long as plain sampling.
    """
    from minirl_nb import fp8
    from minirl_nb.rollout import Sampling, TorchEngine

    prompts = torch.randint(2, 15, (64, 6), generator=torch.Generator().manual_seed(0)).tolist()
    model, s = bench_model(), Sampling(n=8, max_new_tokens=24, seed=1)
    engines = {
        name or "plain": TorchEngine(
            model, fp8=name, eos_token_id=99, pad_token_id=0, max_batch=256
        )
        for name in (None, *fp8.SCHEMES)
    }
    out = []
    for k in fp8.SCHEMES:
        sides = {name: (lambda e=engines[name]: e.generate(prompts, s)) for name in ("plain", k)}
        ratio, low, high = paired(sides, 2 * rounds + 1)
        goal = "<= 1.5" if k in fp8.VLLM_SCHEMES else "<= 2"
        label = f"sampling in {k}, time against plain (middle half {low:.2f} to {high:.2f})"
        out.append((label, ratio, "x", goal))
    return out


def train_run(folder, **changes):
    from minirl_nb import train

    return train.train(demo(folder, **changes))


def demo(folder, **changes):
    from minirl_nb import train

    base = {
        "model.path": str(ROOT / "data" / "coldstart"),
        "output.folder": str(folder),
        "output.progress": False,
        "evaluation.samples": 1,
        "threads": THREADS,
        "output.samples_every": 0,
    }
    return train.load_config("demo", base | changes)


def step(rounds):
    """Seconds a gradient step by phase: the demo's recipe (256 responses a step, N = 4, R3, FP8),
    best of its rollout steps."""
    with tempfile.TemporaryDirectory() as d:
        result = train_run(Path(d) / "run", steps=4 * (2 + rounds))
    rows = [r for r in result.steps() if r["mini_batch"] == 0][2:]
    names = ("generate", "verify", "recompute", "update", "monitor", "transfer", "parity")
    out = [
        (f"gradient step, {n}", min(r[f"seconds/{n}"] for r in rows) / 4, "s", "") for n in names
    ]
    return out + [
        ("gradient step, all", min(r["seconds/step"] for r in rows), "s", ""),
        (
            "response tokens a gradient step",
            sum(r["response_length"] for r in rows) / len(rows) * 256,
            "",
            "",
        ),
    ]


def replay(rounds):
    """What R3 adds to a gradient step's forward and backward: recompute and update of one rollout
    step, with and without, taking turns."""
    from minirl_nb import train

    with tempfile.TemporaryDirectory() as d:
        runs, steps = {}, {}
        for mode in ("none", "R3"):
            runs[mode] = train.Run(
                demo(f"{d}/{mode}", **{"objective.replay": mode, "output.monitor": 0})
            )
            steps[mode] = runs[mode].sample()

        def work(mode):
            s = steps[mode]
            routes, valid = s.mu_routes, s.mu_valid
            s.rollout.routes, s.rollout.routes_valid = routes, valid
            runs[mode].recompute(s)
            runs[mode].update(s, 0)

        seconds, _ = alternate({m: (lambda m=m: work(m)) for m in runs}, 3 * rounds)
    return [
        (
            "R3, time added to recompute and update",
            100 * (seconds["R3"] / seconds["none"] - 1),
            "%",
            "<= 3",
        )
    ]


def padding(rounds):
    "Padding share of the micro-batches of the demo's recipe."
    from minirl_nb import batch, train

    with tempfile.TemporaryDirectory() as d:
        run = train.Run(demo(f"{d}/run"))
        s = run.sample()
    parts = [rows for rows, _ in run.micro(s.rollout, torch.arange(len(s.rollout)))]
    return [
        (
            "padding in micro-batches",
            100 * batch.padding_share(s.rollout.length, parts),
            "%",
            "<= 5",
        ),
        ("micro-batches of 1,024 responses", len(parts), "", ""),
    ]


TRL = r"""
import sys, time, torch, json, warnings
warnings.filterwarnings("ignore")
torch.set_num_threads(int(sys.argv[2]))
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
prompts = json.load(open(sys.argv[1] + "/prompts.json"))
tok = AutoTokenizer.from_pretrained(sys.argv[1]); tok.padding_side = "left"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model.set_experts_implementation("grouped_mm")
lengths, marks = [], []
def reward(completions, completion_ids, **kw):
    lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
    return [float(len(c) % 2) for c in completion_ids]
from transformers import TrainerCallback
class Clock(TrainerCallback):
    def on_step_end(self, *a, **k): marks.append(time.perf_counter())
rows, n = int(sys.argv[5]), int(sys.argv[6])
config = GRPOConfig(output_dir=sys.argv[1] + "/trl", per_device_train_batch_size=rows, gradient_accumulation_steps=1,
    num_generations=n, max_completion_length=int(sys.argv[3]), learning_rate=0.0,
    max_steps=int(sys.argv[4]), logging_steps=1000,
    save_strategy="no", report_to=[],
    temperature=1.0, beta=0.0, use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=0)
GRPOTrainer(model=model, reward_funcs=reward, args=config, processing_class=tok,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[Clock()]).train()
gaps = [b - a for a, b in zip(marks, marks[1:])]
import resource
print(json.dumps({"seconds": gaps, "length": sum(lengths) / len(lengths),
                  "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


OURS = r"""
import sys, json, resource, torch
from minirl_nb import tasks
from tests.bench.__main__ import train_run
folder, threads, limit, steps, rows, n = sys.argv[1], *map(int, sys.argv[2:])
# odd lengths earn the reward on both sides: groups have signal, so no side can skip its update
odd = lambda self, problems, texts: torch.tensor([float(len(t) % 2) for t in texts])
tasks.Task.verify_many = odd
changes = {"model.path": folder, "threads": threads, "steps": steps, "batch.prompts": rows // n, "rollout.responses": n,
    "evaluation.every": 0, "output.monitor": 0, "output.checkpoint_every": 0, "batch.updates": 1,
    "objective.replay": "none", "rollout.fp8": "none", "rollout.max_new_tokens": limit, "rollout.probe": 0,
    "optimizer.lr": 1e-12}
done = train_run(folder + "/run", **changes).steps()
print(json.dumps({"seconds": [r["seconds/step"] for r in done[1:]],
                  "length": sum(r["response_length"] for r in done) / len(done),
                  "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def beside_trl(model, threads, rows, n, limit, steps):
    """Seconds of each full on-policy step after the first, mean length and peak memory (GiB) of TRL
    1.16's GRPOTrainer and of this library, one process each, one after the other: same model,
    prompts, lengths, threads. A text where TRL fails."""
    from minirl_nb import tasks

    task = tasks.load("arithmetic")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        prompts = json.dumps([task.prompt(p) for p in task.problems[:512]])
        Path(folder, "prompts.json").write_text(prompts)
        words = [folder, *map(str, (threads, limit, steps, rows, n))]
        for name, script in (("TRL", TRL), ("ours", OURS)):
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", script, *words]
            out = subprocess.run(command, capture_output=True, text=True, env=env)
            if out.returncode:
                return out.stderr.strip().splitlines()[-1][:80]
            found[name] = json.loads(out.stdout.strip().splitlines()[-1])
    return found


def _trl_rows(name, found, best, goal):
    "Rows of the table from what `beside_trl` found; `best` makes one number of the steps' seconds."
    if isinstance(found, str):
        return [(f"TRL 1.16 GRPOTrainer, {name}", float("nan"), found, "")]
    theirs, ours = found["TRL"], found["ours"]
    step = f"full step, {name}, mean length"
    return [
        (f"TRL 1.16 GRPOTrainer, {step} {theirs['length']:.0f}", best(theirs["seconds"]), "s", ""),
        (f"this library, {step} {ours['length']:.0f}", best(ours["seconds"]), "s", ""),
        (f"TRL / this library, {name}", best(theirs["seconds"]) / best(ours["seconds"]), "x", goal),
        (f"peak memory of TRL, {name}", theirs["memory"], "GiB", ""),
        (f"peak memory of this library, {name}", ours["memory"], "GiB", ""),
    ]


def trl(rounds):
    """A full on-policy step (256 responses = 16 prompts x 16, limit 64) against TRL 1.16's
    GRPOTrainer: same model, prompts, lengths."""
    if importlib.util.find_spec("trl") is None:
        return [("TRL 1.16 GRPOTrainer", float("nan"), "TRL is not installed", "")]
    # random weights whose end token comes about every 25 tokens
    model = bench_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    found = beside_trl(model, THREADS, 256, 16, 64, 2 + 2 * rounds)
    return _trl_rows("toy", found, min, ">= 2")


def policy(rounds):
    """Peak memory above the inputs of log-probabilities at V = 151,936, T = 4,096, H = 256: chunked
    against log_softmax."""
    from tests.bench.bench_policy import memory

    return [
        row for row in memory() if "live" in row[0] or "/" in row[0]
    ]  # the others depend on what the process did before


def verifier(rounds):
    """Ordinary answers a second through the math-verify pool, two workers (more cases: python
    tests/bench/bench_tasks.py)."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_verification import ordinary

    from minirl_nb.tasks import Pool

    pool = Pool(workers=2)
    while not pool.workers or not all(w.ready for w in pool.workers):
        pool.check(ordinary(200, seed=99))
    requests = {
        "different problems": ordinary(1000, seed=1),
        "groups of 16": [r for i in range(63) for r in ordinary(1, seed=1000 + i) * 16],
    }
    seconds, _ = alternate(
        {k: (lambda r=r: pool.check(r)) for k, r in requests.items()},
        min(rounds, 2),
        time.perf_counter,
    )
    pool.close()
    return [
        (f"math-verify in a pool of 2 processes, {k}", len(r) / seconds[k], "answers/s", ">= 500")
        for k, r in requests.items()
    ]


def limits(rounds, layers=30):
    """Training, decoding and what is added to them, each as a share of a limit measured here: a
    mixture of the pretrained mixture's shape, random weights."""
    from tests.bench import bench_limits as bench

    yield from bench.limits(max(5, rounds), layers)
    if importlib.util.find_spec("trl") is None:
        return
    # no response ends before the limit: equal lengths favour `generate`
    sizes, threads = bench.MIXTURE | {"eos_token_id": 15}, torch.get_num_threads()
    model = bench.random_model(sizes, layers, torch.device("cpu"), torch.float32)
    found = beside_trl(model, threads, 32, 8, 32, 1 + max(5, rounds))
    yield from _trl_rows("mixture", found, statistics.median, ">= 1.3")


def ahead(rounds):
    """A rollout step with sampling and training in turns, and one step off in two processes: paired
    runs of the demo's recipe, medians."""
    from tests.bench import bench_ahead

    return bench_ahead.ahead(rounds)


SECTIONS = {f.__name__: f for f in (engine, formats, step, replay, padding, trl, policy, verifier)}
NAMED = {"limits": limits, "ahead": ahead}  # run only where they are asked for


def machine():
    from minirl_nb.study import processor_name

    python = platform.python_version()
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)} used"
    return f"{processor_name()}, {cores}, Python {python}, torch {torch.__version__}"


def keep(file, rows):
    """Write a table of these rows and this machine into a JSON file, below the tables that are
    there; rows of sections that were run again leave theirs."""
    tables = json.loads(file.read_text())["tables"] if file.exists() else []
    again = {r["section"] for r in rows}
    for table in tables:
        table["rows"] = [r for r in table["rows"] if r["section"] not in again]
    tables = [table for table in tables if table["rows"]]
    tables.append({"machine": machine(), "rows": rows})
    file.write_text(json.dumps({"tables": tables}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, *NAMED, []])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--layers", type=int, default=30, help="of the models of limits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    from minirl_nb.train import tune_allocator

    tune_allocator()
    print(machine())
    kept = []
    for name in args.sections or SECTIONS:
        section = (SECTIONS | NAMED)[name]
        print(f"\n{name}: {section.__doc__.splitlines()[0]}", flush=True)
        more = {"layers": args.layers} if name == "limits" else {}
        for label, value, unit, goal in section(args.rounds, **more):
            print(
                f"  {label:80s} {value:>12,.{0 if value >= 1000 else 3}f} {unit:10s} {goal}",
                flush=True,
            )
            kept.append(
                {"section": name, "label": label, "value": value, "unit": unit, "goal": goal}
            )
    if args.json:
        keep(args.json, kept)


if __name__ == "__main__":
    sys.exit(main())
