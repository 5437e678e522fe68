"""What a process of tests/test_parallel.py runs: `torchrun ... tests/parallel_worker.py
CASES.json`, or `... commands COMMANDS.json`.

Each case is a config, and how its rows are to be shared. The rollouts are given, so that every
number of processes trains on the same tokens: an engine that samples in FP8 is not continuous in
its weights, and a rounding difference may become another token."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from minirl_nb import batch, run, train
from minirl_nb.cli import main


class Given:
    "A rollout engine that has its rollouts from files: one folder for each rollout step."

    version = 0

    def __init__(self, folder, run):
        self.folder, self.run = Path(folder), run

    def generate(self, prompts, sampling):
        """Rows of the stream of all folders, from where this rollout step's part begins. What is
        asked for lies in one folder or in two neighbours."""
        size = self.run.config.batch.prompts_per_rollout
        at = self.run.rollout_step * size + self.run.further + sampling.first // sampling.n
        parts = []
        while (left := len(prompts) - sum(p for _, p in parts)) or not parts:
            folder, first = divmod(at + len(prompts) - left, size)
            n = min(left, size - first)
            rows = torch.arange(first * sampling.n, (first + n) * sampling.n)
            number = folder % len(list(self.folder.iterdir()))
            parts.append((batch.load(self.folder / str(number)).select(rows), n))
        r = batch.cat([p for p, _ in parts])
        return replace(
            r,
            group=torch.arange(len(prompts)).repeat_interleave(sampling.n),
            reward=torch.full((len(r),), float("nan")),
        )

    def load(self, named_tensors, version):
        for _ in named_tensors.items() if isinstance(named_tensors, dict) else named_tensors:
            pass
        self.version = version

    def sleep(self):
        pass

    def wake(self):
        pass

    def close(self):
        pass


SHARES = {
    "balanced": None,
    "one rank": lambda rows, n: torch.zeros_like(rows),
    "cut": lambda rows, n: (rows % 7 > 1).long() % n,
    "one row": lambda rows, n: (rows == 3).long() % n,
}


def begun(case, config, world):
    "The run of a case, with its rollouts and its way to share rows."
    share, make_engine = SHARES[case.get("share", "balanced")], run.make_engine
    if share:
        world.assign_rows = lambda cost, part: share(torch.arange(len(part)), world.size)
    run.make_engine = lambda state: Given(case["rollouts"], state)
    try:
        return run.Run(config, world)
    finally:
        run.make_engine = make_engine


def run_case(case):
    config = train.load_config(None, case["config"])
    failed = Path(case.get("failed", Path(case["rollouts"]).parent / "failed"))
    with train.launched(config) as world:
        state = begun(case, config, world)
        stop = case.get("stop", config.steps)
        while state.step < stop:
            for how in ("fail", "kill", "freeze"):
                if case.get(how) == [world.rank, state.step]:
                    failed.touch()
            if case.get("fail") == [world.rank, state.step]:
                raise train.TrainingError(f"gradient step {state.step}: made to fail")
            if case.get("kill") == [world.rank, state.step]:
                os.kill(os.getpid(), signal.SIGKILL)
            if case.get("freeze") == [world.rank, state.step]:
                os.kill(os.getpid(), signal.SIGSTOP)
            step = train.sample(state)
            train.recompute(state, step)
            rows = [
                train.flips(state, step, i) | train.update(state, step, i)
                for i in range(len(step.minibatches))
            ]
            state.rollout_step += 1
            state.further += step.further
            train.log(state, step, rows, train.transfer(state, step.seconds))
        if case.get("checkpoint"):
            state.checkpoint()
            with torch.no_grad():
                for p in state.model.parameters():
                    p.add_(1.0)  # what is being written must not notice
            state.complete_checkpoint(wait=True)
            with torch.no_grad():
                for p in state.model.parameters():
                    p.sub_(1.0)
        if not world.sharded:  # replicas stay equal to the last bit
            sums = [p.detach().view(torch.int32).sum().item() for p in state.model.parameters()]
            assert all(other == sums for other in world.gather(sums))
        given = world.weights(state.model)
        weights = {
            k: v.detach().float().clone().contiguous()
            for k, v in (given.items() if isinstance(given, dict) else given)
        }
        if world.chief:
            save_file(weights, state.folder / "final.safetensors")


def run_commands(path):
    """Each command in a fork of this process, as if it had been started alone: exit status and what
    it printed go to `said-NUMBER-RANK.json` beside the list of commands."""
    for number, command in enumerate(json.loads(path.read_text())):
        said = path.with_name(f"said-{number}-{os.environ['RANK']}")
        child = os.fork()
        if not child:
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(command["port"])}
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            try:
                sys.exit(main(command["words"]))
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code)
        _, status = os.waitpid(child, 0)
        result = [os.waitstatus_to_exitcode(status), said.read_text()]
        said.with_suffix(".json").write_text(json.dumps(result))


def run_cases(path):
    cases = json.loads(path.read_text())
    several = "WORLD_SIZE" in os.environ and len(cases) > 1
    if several:
        torch.distributed.init_process_group("gloo")
    for case in cases:
        run_case(case)
    if several:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    *kind, path = sys.argv[1:]
    (run_commands if kind == ["commands"] else run_cases)(Path(path))
