"""What a process of tests/test_parallel.py runs: `torchrun ... tests/parallel_worker.py CASES.json`, or without torchrun alone.

Each case is a config, and how its rows are to be shared. The rollouts are given, so that every number of processes trains on the same
tokens: an engine that samples in FP8 is not continuous in its weights, and a rounding difference may become another token."""

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


class Given:
    "A rollout engine that has its rollouts from files: one folder for each rollout step."

    version = 0

    def __init__(self, folder, run):
        self.folder, self.run = Path(folder), run

    def generate(self, prompts, sampling):
        all_rows = batch.load(
            self.folder / str(self.run.rollout_step % len(list(self.folder.iterdir())))
        )
        rows = torch.arange(sampling.first, sampling.first + len(prompts) * sampling.n)
        r = all_rows.select(rows)
        return replace(
            r,
            group=r.group - sampling.first // sampling.n,
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


def run_case(case):
    config = train.load_config(None, case["config"])
    share = SHARES[case.get("share", "balanced")]
    with train.launched(config) as world:
        if share:
            world.assign_rows = lambda cost, part: share(torch.arange(len(part)), world.size)
        run.make_engine = lambda state: Given(case["rollouts"], state)
        state = run.Run(config, world)
        stop = case.get("stop", config.steps)
        while state.step < stop:
            for how in ("fail", "kill", "freeze"):
                if case.get(how) == [world.rank, state.step]:
                    (Path(case["rollouts"]).parent / "failed").touch()
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
        given = world.weights(state.model)
        weights = {
            k: v.detach().float().clone().contiguous()
            for k, v in (given.items() if isinstance(given, dict) else given)
        }
        if world.chief:
            save_file(weights, state.folder / "final.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    cases = json.loads(Path(sys.argv[1]).read_text())
    if "WORLD_SIZE" in os.environ and len(cases) > 1:
        torch.distributed.init_process_group("gloo")
    for case in cases:
        run_case(case)
    if "WORLD_SIZE" in os.environ and len(cases) > 1:
        torch.distributed.destroy_process_group()
