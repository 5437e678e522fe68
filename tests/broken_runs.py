"""Runs that are broken on purpose, and healthy ones, for the tests of the diagnosis.

    python tests/broken_runs.py               # record all into data/diagnosis.json (15 minutes)
    python tests/broken_runs.py cap scale     # or some of them anew

Each run trains the shipped cold start for 48 gradient steps, three of them for more. What is kept are the
columns that the rules read, with four digits.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from minirl_nb.config import load_config
from minirl_nb.train import train

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "data" / "diagnosis.json"
BASE = {
    "model.path": str(ROOT / "data" / "coldstart"),
    "steps": 48,
    "batch.prompts": 8,
    "batch.updates": 4,
    "rollout.responses": 8,
    "rollout.max_new_tokens": 32,
    "rollout.fp8": "fp8_per_channel",
    "objective.replay": "R3",
    "optimizer.lr": 5e-4,
    "evaluation.samples": 1,
    "output.checkpoint_every": 0,
    "output.progress": False,
    "output.figure": False,
    "output.monitor": 16,
    "output.samples_every": 24,
    "threads": 1,
}
ON_POLICY = {"batch.updates": 1, "objective.replay": "none"}
R2 = {"batch.updates": 2, "objective.replay": "R2"}
PATIENT = {"rollout.probe": 0}  # the probe would stop these runs, as it should


@torch.no_grad()
def add_noise(run, part, size):
    "Noise of `size` standard deviations on some of the engine's parameters."
    generator = torch.Generator().manual_seed(run.rollout_step)
    for name, p in run.engine.model.named_parameters():
        if part in name:
            p.add_(size * p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@torch.no_grad()
def double_one_scale(run):
    "A scale of the engine that is twice what it should be, after each transfer."
    for name, p in run.engine.model.named_parameters():
        if "layers.1.mlp.experts.down" in name:
            p.mul_(2)


def engine_drifts(run):
    add_noise(run, "layers", 0.02 * run.rollout_step)


def one_router_drifts(run):
    add_noise(run, "layers.1.mlp.gate.", 0.05 * run.rollout_step)


def transfers_get_worse(run):
    """Each load leaves more noise in the engine, slowly enough for the probe to follow."""
    if run.rollout_step > 1:
        return
    load = run.engine.load

    def noisy_load(tensors, version):
        load(tensors, version)
        add_noise(run, "layers", 0.02 * 1.17**run.rollout_step)

    # an engine whose tensors nobody can compare, as a served one
    run.engine.load, run.engine.compare_weights = noisy_load, lambda weights=None: None


def few_problems(folder):
    "Eight problems, which the policy learns by heart."
    lines = (ROOT / "data/arithmetic/train.jsonl").read_text().splitlines()[:8]
    path = Path(folder) / "few.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return {
        "task.name": f"{path}?verifier=arithmetic",
        "task.benchmarks": {"hard": f"{ROOT}/data/arithmetic/hard.jsonl?verifier=arithmetic"},
    }


def random_model(folder):
    "A model that never solves a problem."
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
    from conftest import tiny_qwen3_moe

    from minirl_nb import tasks

    path = Path(folder) / "random"
    tiny_qwen3_moe().save_pretrained(path)
    tasks.arithmetic_tokenizer().save_pretrained(path)
    return {"model.path": str(path)}


# name: changes of the config, what is done after each rollout step
HEALTHY = {
    f"healthy {seed}": ({"seed": seed} | ({}, R2, ON_POLICY)[seed % 3], None) for seed in range(10)
}
HEALTHY["healthy 5"][0]["rollout.fp8"] = "none"
HEALTHY["healthy 7"][0]["rollout.fp8"] = "fp8_per_block"
WITHOUT_CLIPPING = {
    "batch.updates": 16,
    "batch.prompts": 4,
    "steps": 96,
    "objective.clip": False,
    "objective.replay": "none",
    "optimizer.lr": 2e-3,
}
BROKEN = {
    "learning rate": (PATIENT | {"optimizer.lr": 5e-3}, None),
    "without clipping": (PATIENT | WITHOUT_CLIPPING, None),
    "one bound": (
        {
            "objective.clip_high": 50.0,
            "batch.updates": 8,
            "optimizer.lr": 2e-3,
            "objective.replay": "none",
        },
        None,
    ),
    "scale": (PATIENT, double_one_scale),
    "engine": ({}, engine_drifts),
    "router": (R2 | {"objective.replay": "none"}, one_router_drifts),
    "transfer": ({"rollout.probe": 32, "steps": 80}, transfers_get_worse),
    "truncation": ({"objective.truncation": "tis:1.02"}, None),
    "cap": ({"rollout.max_new_tokens": 12}, None),
    "few problems": (
        ON_POLICY
        | {
            "rollout.fp8": "none",
            "objective.advantage": "none",
            "optimizer.lr": 1e-3,
            "steps": 160,
        },
        None,
    ),
    "random model": ({"steps": 16}, None),
}
FOLDERS = {"few problems": few_problems, "random model": random_model}
# what the diagnosis has to say, at least, and what it has to say first
DIAGNOSES = {
    "learning rate": ({"staleness", "validity", "reward falls", "equal groups"}, "staleness"),
    "without clipping": ({"staleness", "validity", "reward falls"}, "staleness"),
    "one bound": ({"one side", "staleness"}, "staleness"),
    "scale": ({"discrepancy", "validity"}, "discrepancy"),
    "engine": ({"discrepancy", "validity"}, "discrepancy"),
    "router": ({"layer", "discrepancy"}, "discrepancy"),
    "transfer": ({"discrepancy", "parity", "validity"}, "discrepancy"),
    "truncation": ({"truncated"}, "truncated"),
    "cap": ({"cut"}, "cut"),
    "few problems": ({"entropy falls", "equal groups"}, "entropy falls"),
    "random model": ({"equal groups"}, "equal groups"),
}


def run(name, folder, **more):
    "Train one of the runs in a folder; its result."
    changes, hook = (HEALTHY | BROKEN)[name]
    changes = BASE | changes | {"output.folder": str(Path(folder) / "run")} | more
    if name in FOLDERS:
        changes |= FOLDERS[name](folder)
    return train(load_config(None, changes), hook)


# ------------------------------------------------------------------------------------ what is kept
KEPT = (
    *("step", "rollout_step", "mini_batch", "reward", "entropy", "k3", "discrepancy/flip_by_layer"),
    *("staleness/k3", "validity/local_shift", "validity/staleness", "parity/q90", "truncated"),
    *("clip_high", "clip_low", "equal_groups", "cut", "response_length"),
)


def short(x):
    if isinstance(x, list):
        return [short(y) for y in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def columns(rows):
    steps = [row for row in rows if row["kind"] == "step"]
    return {key: [short(row[key]) for row in steps] for key in KEPT if key in steps[0]}


def record(names):
    kept = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stdout):
            kept[name] = columns(run(name, folder).rows)
        print(name, flush=True)
        ordered = {n: kept[n] for n in HEALTHY | BROKEN if n in kept}
        lines = (f" {json.dumps(n)}: {json.dumps(c)}" for n, c in ordered.items())
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1:] or HEALTHY | BROKEN)
