"""The config of a short run, and its metrics without what the clock decides. `finished` in
conftest.py is such a run."""

import json
import socket
from pathlib import Path

from minirl_nb.config import load_config

TIMES = ("seconds/", "tokens_per_second/", "peak_memory")


def free_port():
    "A port of this machine that nobody listens on now."
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def small(folder, model, **changes):
    "Eight gradient steps in two seconds: 4 rollout steps of 2 mini-batches."
    base = {
        "model.path": str(model),
        "output.folder": str(folder),
        "steps": 8,
        "batch.prompts": 4,
        "batch.updates": 2,
        "rollout.responses": 4,
        "rollout.max_new_tokens": 24,
        "rollout.fp8": "fp8_per_channel",
        "objective.replay": "R3",
        "optimizer.warmup": 0,
        "evaluation.samples": 1,
        "evaluation.every": 4,
        "output.checkpoint_every": 2,
        "output.progress": False,
        "output.figure": False,
        "output.keep": 9,
        "output.samples_every": 4,
        "rollout.probe": 2,
        "threads": 1,
    }
    return load_config(None, base | changes)


# changes of `small` for tests that look at steps alone: no probe of the engine, two evaluations
# (before and after) under one numerics, one checkpoint (the last)
STEPS_ALONE = {
    "rollout.probe": 0,
    "evaluation.every": 0,
    "evaluation.numerics": "train",
    "output.checkpoint_every": 0,
}


class PowerCut(Exception):
    "What `power_cut` ends a run with."


def power_cut(step):
    "An `on_step` that ends a run after this gradient step, as a cut would."

    def cut(run):
        if run.step == step:
            raise PowerCut

    return cut


def metrics(folder):
    "Rows of a run without what the clock decides."
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in rows]
