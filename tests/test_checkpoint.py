"""Killed, stopped, prolonged: a run goes on from its newest checkpoint, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics, small
from transformers import AutoModelForCausalLM

from minirl_nb.checkpoint import checkpoints, newest_checkpoint
from minirl_nb.cli import main
from minirl_nb.config import config_yaml
from minirl_nb.run import Run
from minirl_nb.train import train


@pytest.mark.parametrize("when", ["step_000002", "step_000006.tmp", "metrics"])
def test_kill_and_resume_is_bit_for_bit(when, finished, tmp_path, coldstart):
    """kill -9 between two steps, inside the writing of a checkpoint, and inside the writing of
    metrics; then --resume."""
    folder = tmp_path / "run"
    (tmp_path / "r.yaml").write_text(config_yaml(small(folder, coldstart)))
    killer = ""
    if when == "step_000006.tmp":  # die when the optimiser's state of step 6 is about to be written
        killer = (
            "import minirl_nb.world as t, os, signal\nold = t.save_file\n"
            "def save(x, p, **k):\n"
            "    if 'step_000006.tmp' in str(p): os.kill(os.getpid(), signal.SIGKILL)\n"
            "    old(x, p, **k)\n"
            "t.save_file = save\n"
        )
    if when == "metrics":  # die with half a line of step 5 on the disk
        killer = (
            "import minirl_nb.run as t, os, signal, json\nold = t.append_row\n"
            "def append(folder, row):\n    if row.get('step') == 5:\n        f = open(folder / 'metrics.jsonl', 'a')\n"
            "        f.write(json.dumps(row)[:40]); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return old(folder, row)\n"
            "t.append_row = append\n"
        )
    code = (
        killer
        + f"from minirl_nb.cli import main; import sys; sys.exit(main(['train', {str(tmp_path / 'r.yaml')!r}]))"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    p = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if when == "step_000002":
        deadline = time.time() + 120
        while (
            not (folder / "checkpoints" / when).exists()
            and p.poll() is None
            and time.time() < deadline
        ):
            time.sleep(0.005)
        p.send_signal(signal.SIGKILL)
    assert p.wait(180) == -signal.SIGKILL, p.stderr.read().decode()
    assert len(
        [r for r in (folder / "metrics.jsonl").read_text().splitlines() if r.endswith("}")]
    ) < len(metrics(finished.folder))
    assert main(["train", str(tmp_path / "r.yaml"), "--resume"]) == 0
    assert metrics(folder) == metrics(finished.folder)
    assert [p.name for p in checkpoints(folder)] == [p.name for p in checkpoints(finished.folder)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoints(folder)[-1] / name).read_bytes() == (
            checkpoints(finished.folder)[-1] / name
        ).read_bytes()
    assert not list(folder.rglob("*.tmp"))


def test_a_run_is_prolonged_bit_for_bit(finished, tmp_path, coldstart):
    "Four steps, then eight: the metrics of a run that was planned for eight."
    train(small(tmp_path / "run", coldstart, steps=4))
    train(small(tmp_path / "run", coldstart, steps=8, resume=True))
    assert metrics(tmp_path / "run") == metrics(finished.folder)
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_a_changed_setting_is_written_down(tmp_path, coldstart):
    train(small(tmp_path / "run", coldstart, steps=2))
    changed = {"steps": 4, "optimizer.lr": 1e-5, "resume": True, "allow_change": True}
    result = train(small(tmp_path / "run", coldstart, **changed))
    assert [r["lr"] for r in result.steps()] == [3e-4, 3e-4, 1e-5, 1e-5]
    (line,) = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, "changes": {"optimizer.lr": [3e-4, 1e-5]}}


def test_resume_of_a_finished_run_does_nothing(finished, coldstart):
    before = metrics(finished.folder)
    again = train(small(finished.folder, coldstart, resume=True))
    assert (
        metrics(finished.folder) == before
        and again.evaluations.keys() == finished.evaluations.keys()
    )


def test_a_stop_file_ends_a_run_with_a_checkpoint_and_resume_goes_on(finished, tmp_path, coldstart):
    config = small(tmp_path / "run", coldstart)
    stopped = train(
        config, on_step=lambda run: (run.folder / "stop").touch() if run.step == 4 else None
    )
    assert (
        stopped.stopped
        and stopped.steps()[-1]["step"] == 4
        and "stopped after 4 gradient steps" in stopped.report()
    )
    assert (
        not (tmp_path / "run" / "stop").exists()
        and newest_checkpoint(tmp_path / "run").name == "step_000004"
    )
    train(small(tmp_path / "run", coldstart, resume=True))
    assert metrics(tmp_path / "run") == metrics(finished.folder)


def test_a_run_starts_from_another_runs_checkpoint_under_a_new_objective(
    finished, tmp_path, coldstart
):
    "Weights to the bit; the optimiser's state only where it is asked for; counters from zero."
    source = finished.folder / "checkpoints" / "step_000004"
    before = sorted((p, p.stat().st_mtime_ns) for p in finished.folder.rglob("*"))
    new = {"objective.preset": "grpo", "steps": 2}
    weights = AutoModelForCausalLM.from_pretrained(source).state_dict()
    stored = load_file(source / "optimizer.safetensors")
    first = {}
    for taken in (False, True):
        folder = tmp_path / str(taken)
        config = small(folder, source, **new, **{"optimizer.from_checkpoint": taken})
        run = Run(config)
        own = run.model.state_dict()
        assert all(torch.equal(own[name], w) for name, w in weights.items())
        state = {
            f"{name}|{key}": x
            for name, p in run.model.named_parameters()
            for key, x in run.optimizer.state.get(p, {}).items()
        }
        assert state.keys() == (stored.keys() if taken else set())
        assert all(torch.equal(x, stored[name]) for name, x in state.items())
        assert (run.step, run.rollout_step) == (0, 0)
        run.engine.close()
        result = train(replace(config, resume=True))
        assert [r["step"] for r in result.steps()] == [1, 2] and result.rows != finished.rows
        first[taken] = load_file(folder / "checkpoints" / "step_000002" / "model.safetensors")
    # the same problems, responses and gradients, other moments
    assert any(not torch.equal(w, first[True][name]) for name, w in first[False].items())
    assert sorted((p, p.stat().st_mtime_ns) for p in finished.folder.rglob("*")) == before
    with pytest.raises(ValueError, match="holds no optimizer.safetensors; model.path must be a"):
        train(small(tmp_path / "none", coldstart, **{"optimizer.from_checkpoint": True}))
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_is_deleted_halfway_has_no_name(tmp_path, monkeypatch):
    "A run that is killed while it deletes an old checkpoint leaves complete ones only."
    from torch import nn

    from minirl_nb import checkpoint

    class Written:
        def save_pretrained(self, folder):
            (folder / "part").write_text("")
            (folder / "other part").write_text("")

    class OneProcess:
        chief, rank = True, 0

        def gather(self, x):
            return [x]

        def save(self, model, optimizer, folder):
            return lambda wait: True

    def killed(folder, ignore_errors=False):
        if not ignore_errors:
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt
        healthy(folder, ignore_errors=True)

    model = nn.Linear(1, 1)
    model.config = model.generation_config = Written()
    healthy = checkpoint.shutil.rmtree
    begin = [OneProcess(), model, None, Written(), tmp_path]
    for step in (1, 2):
        assert checkpoint.begin_checkpoint(*begin, {"step": step}, keep=2)(True)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    for step in (3, 2):  # the oldest of three, and one that is written again
        with pytest.raises(KeyboardInterrupt):
            checkpoint.begin_checkpoint(*begin, {"step": step}, keep=2)(True)
        assert all(len(list(p.iterdir())) == 3 for p in checkpoints(tmp_path))
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000003"]
    monkeypatch.undo()
    assert checkpoint.begin_checkpoint(*begin, {"step": 2}, keep=2)(True)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000002", "step_000003"]
