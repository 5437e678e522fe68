"""The loop's engineering: configuration, wrong input, kill and resume, non-finite numbers, degenerate rewards."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minirl_nb import objective
from minirl_nb.cli import main
from minirl_nb.clipping import Clip
from minirl_nb.run import Run
from minirl_nb.train import (
    OptimizerConfig,
    RunConfig,
    TrainingError,
    check,
    checkpoints,
    config_yaml,
    learning_rate,
    load_config,
    newest_checkpoint,
    objective_of,
    prompts_of,
    recipes,
    replay_of,
    seed_of,
    train,
)

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds/", "tokens_per_second/", "peak_memory")


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
        "output.keep": 9,
        "output.samples_every": 4,
        "rollout.probe": 2,
        "threads": 1,
    }
    return load_config(None, base | changes)


def metrics(folder):
    "Rows of a run without what the clock decides."
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(TIMES)} for r in rows]


@pytest.fixture(scope="module")
def coldstart():
    return ROOT / "data" / "coldstart"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, coldstart):
    "A run from the shipped cold start, for the tests that only look."
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(small(folder, coldstart))


# ------------------------------------------------------------------------------------------ configuration
def test_config_survives_yaml():
    c = load_config(
        None,
        {
            "optimizer.betas": [0.8, 0.9],
            "task.benchmarks": {"mine": "a.jsonl"},
            "objective.clip_low": 0.1,
            "threads": 2,
        },
    )
    path = "config.yaml"
    tree = yaml.safe_load(config_yaml(c))
    assert tree["optimizer"]["betas"] == [0.8, 0.9] and tree["task"]["benchmarks"] == {
        "mine": "a.jsonl"
    }, path
    assert load_config(None, tree) == c


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--optimiser.lr", "1"], "unknown key 'optimiser.lr'; did you mean 'optimizer.lr'?"),
        (["--lr", "1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["--optimizer.lr", "fast"], "optimizer.lr cannot be 'fast'; it must be a number"),
        (["--objective.preset", "ppo"], "must be one of minirl, "),
        (["--steps"], "--steps needs a value"),
        (["--steps", "1.5"], "steps cannot be '1.5'; it must be a whole number"),
        (["steps", "3"], "'steps' does not belong to an option"),
    ],
)
def test_command_line_errors_are_one_sentence(words, sentence):
    with pytest.raises(ValueError) as e:
        load_config(None, words)
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_recipe_errors(tmp_path):
    path = tmp_path / "r.yaml"
    for text, sentence in (
        ("a: [", "not YAML"),
        ("- 1", "a mapping"),
        ("optimizer: {rate: 1}", "unknown key 'optimizer.rate'"),
        ("steps: many", "steps cannot be 'many'"),
        ("step: 3", "did you mean 'steps'?"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="r.yaml") as e:
            load_config(path)
        assert sentence in str(e.value)
    with pytest.raises(FileNotFoundError, match="there is no recipe nope"):
        load_config("nope")
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(path)


def test_every_recipe_is_a_config():
    assert recipes()
    for path in recipes().values():
        config = load_config(path)
        objective_of(config)
        assert config.steps % config.batch.updates == 0


def test_every_field_has_a_docstring():
    from dataclasses import fields, is_dataclass

    import tyro
    from tyro._docstrings import get_field_docstring

    def walk(cls):
        import typing

        for f in fields(cls):
            kind = typing.get_type_hints(cls)[f.name]
            if is_dataclass(kind):
                walk(kind)
            else:
                assert get_field_docstring(cls, f.name, ()), f"{cls.__name__}.{f.name}"

    assert tyro
    walk(RunConfig)


def test_objective_of_a_config():
    assert objective_of(load_config()) == objective.MINIRL
    for preset, o in objective.PRESETS.items():
        assert objective_of(load_config(None, {"objective.preset": preset})) == o
    c = {"objective.clip": False, "objective.truncation": "none", "objective.normalizer": "tokens"}
    o = objective_of(load_config(None, c))
    assert o.clip is None and o.truncation is None and o.normalizer == "tokens"
    assert objective_of(load_config(None, {"objective.clip_low": 0.1})).clip == Clip(0.1, 0.27)
    with pytest.raises(ValueError, match="clip_low"):
        objective_of(load_config(None, {"objective.clip_low": 0.1, "objective.preset": "cispo"}))


def test_auto_replay_follows_the_paper():
    def at(n, mixture=True):
        return replay_of(
            load_config(None, {"objective.replay": "auto", "batch.updates": n}), mixture
        )

    assert [at(1), at(2), at(4), at(8)] == ["R2", "R2", "R3", "R3"] and at(
        8, mixture=False
    ) == "none"


def test_batch_sizes_and_schedules():
    assert prompts_of(load_config(None, {"batch.prompts": 64, "batch.updates": 8})) == (512, 64)
    assert prompts_of(load_config(None, {"batch.rollout_prompts": 64, "batch.updates": 8})) == (
        64,
        8,
    )
    o = OptimizerConfig(lr=1.0, warmup=4, schedule="linear")
    assert [learning_rate(o, s, 14) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate(o, 4, 14) == 1.0 and learning_rate(o, 13, 14) == pytest.approx(0.1)
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="cosine"), 5, 105) == 1.0
    assert (
        len(
            {seed_of(0, "rollout", i) for i in range(1000)}
            | {seed_of(0, "order", 0), seed_of(1, "rollout", 0)}
        )
        == 1002
    )


# ------------------------------------------------------------------------------------------ wrong input, before any work
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"rollout.responses": 1}, "a group of one response has no baseline"),
        ({"batch.rollout_prompts": 6, "batch.updates": 4}, "does not divide the 6 prompts"),
        ({"steps": 0}, "steps is 0; it must be positive"),
        ({"optimizer.lr": 0}, "optimizer.lr is 0.0"),
        ({"rollout.temperature": 0}, "rollout.temperature is 0.0"),
        ({"output.keep": 0}, "output.keep is 0"),
    ],
)
def test_a_section_refuses_its_own_nonsense(changes, sentence, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changes))
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("minirl: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": 7}, "not a multiple of batch.updates = 2"),
        ({"model.path": "no/such/model"}, "there is no folder no/such/model"),
        ({"rollout.max_new_tokens": 5000}, "positions"),
        ({"objective.truncation": "tsi:5"}, "unknown truncation 'tsi:5'"),
        ({"task.name": "missing.jsonl"}, "missing.jsonl"),
        ({"task.name": "EMPTY"}, "empty.jsonl"),
        ({"task.name": "BROKEN"}, "broken.jsonl"),
        ({"output.track": "wandb"}, "not installed"),
    ],
)
def test_wrong_input_is_said_before_any_work(
    changes, sentence, tmp_path, moe_folder, capsys, monkeypatch
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"problem": "1*1", "answer": "1"}\n{"problem": 3\n')
    changes = {
        k: str(tmp_path / f"{v.lower()}.jsonl") if v in ("EMPTY", "BROKEN") else v
        for k, v in changes.items()
    }
    if "output.track" in changes:
        import importlib.util

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    c = small(tmp_path / "run", moe_folder, **changes)
    (tmp_path / "r.yaml").write_text(config_yaml(c))
    started = time.time()
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("minirl: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and time.time() - started < 20
    if "BROKEN" in str(changes) or "broken" in error:
        assert "2" in error  # the line


def test_a_file_that_is_no_model(tmp_path, capsys):
    assert main(["train", "--model.path", str(tmp_path)]) == 2
    assert "no Hugging Face model" in capsys.readouterr().err


def test_replay_on_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from minirl_nb import tasks

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        )
    ).save_pretrained(tmp_path / "dense")
    tasks.arithmetic_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="R3, but .* is a dense model"):
        check(small(tmp_path / "run", tmp_path / "dense"))
    result = train(
        small(tmp_path / "run", tmp_path / "dense", **{"objective.replay": "auto", "steps": 2})
    )
    assert result.replay == "none" and "discrepancy/flip" not in result.steps()[0]


def test_run_folders_are_not_mixed_up(finished, coldstart):
    folder = finished.folder
    with pytest.raises(ValueError, match="add --resume"):
        check(small(folder, coldstart))
    hotter = {"optimizer.lr": 0.1, "resume": True}
    with pytest.raises(ValueError, match=r"another config \(optimizer.lr was 0.0003, is 0.1\)"):
        check(small(folder, coldstart, **hotter))
    check(small(folder, coldstart, **hotter, allow_change=True))
    with pytest.raises(ValueError, match="model.path was"):
        check(small(folder, folder / "checkpoints/step_000008", resume=True, allow_change=True))
    # what changes no result, and more steps at a constant learning rate, need nothing but --resume
    check(
        small(folder, coldstart, resume=True, steps=16, **{"output.keep": 3, "evaluation.every": 8})
    )
    with pytest.raises(ValueError, match="optimizer.schedule was 'constant', is 'linear'"):
        linear = {"optimizer.schedule": "linear"}
        check(small(folder, coldstart, resume=True, steps=16, **linear))
    with pytest.raises(ValueError, match="no run of ours"):
        check(small(folder / "checkpoints", coldstart))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "nope"], "there is no recipe nope"),
        (["evaluate", "nowhere"], "no folder nowhere"),
        (["train", "--optimizer.lrate", "1"], "did you mean 'optimizer.lr'?"),
        (["evaluate", "--sample", "3"], "did you mean 'samples'?"),
    ],
)
def test_cli_errors(words, sentence, capsys):
    assert main(words) == 2
    out = capsys.readouterr()
    assert sentence in out.err and out.err.count("\n") == 1


# ------------------------------------------------------------------------------------------ what a run leaves
def test_run_folder(finished, coldstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.folder
    assert load_config(folder / "config.yaml") == small(folder, coldstart)
    assert [p.name for p in checkpoints(folder)] == [f"step_{s:06d}" for s in (2, 4, 6, 8)]
    newest = checkpoints(folder)[-1]
    model = AutoModelForCausalLM.from_pretrained(newest)
    start = AutoModelForCausalLM.from_pretrained(coldstart)
    moved = [
        float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), start.parameters())
    ]
    assert max(moved) > 0 and len(AutoTokenizer.from_pretrained(newest)) == 16
    assert finished.figure.stat().st_size > 10_000
    summary = json.loads((folder / "result.json").read_text())
    assert summary["steps"] == 8 and [d["benchmark"] for d in summary["train"]] == [
        "easy",
        "medium",
        "hard",
        None,
    ]
    table = (folder / "samples" / "step_000004.md").read_text()
    assert table.startswith("| problem | answer | reward |") and table.count("\n") == 2 + 16
    assert (
        not list(folder.rglob("*.bin"))
        and not list(folder.rglob("*.pt"))
        and not list(folder.rglob("*.tmp"))
    )


def test_metrics(finished):
    steps = finished.steps()
    assert [r["step"] for r in steps] == list(range(1, 9)) and [r["mini_batch"] for r in steps] == [
        0,
        1,
    ] * 4
    for r in steps:
        for key in (
            "reward",
            "entropy",
            "kl",
            "k3",
            "loss",
            "grad_norm",
            "clip_high",
            "clip_low",
            "truncated",
            "equal_groups",
            "discrepancy/flip",
            "staleness/flip",
            "weight/max",
            "weight/ess",
            "validity/breakdown",
            "parity/k3",
            "seconds/generate",
            "tokens_per_second/update",
            "peak_memory",
        ):
            assert isinstance(r[key], int | float), key
        # the same function before the updates and in the first mini-batch: only the shape of the micro-batches differs
        if r["mini_batch"] == 0:
            assert r["staleness/k3"] < 1e-9 and r["staleness/flip"] == 0 and r["clip_high"] == 0
    assert any(r["staleness/k3"] > 1e-9 for r in steps if r["mini_batch"] == 1)
    assert all(r["k3"] > 0 for r in steps)
    evaluations = [r for r in finished.rows if r["kind"] == "evaluation"]
    assert [r["step"] for r in evaluations] == [0, 4, 8]
    assert {k.split("/")[1] for k in evaluations[0] if k.startswith("accuracy/")} == {
        "rollout",
        "train",
    }


def test_on_policy_without_rounding_is_exact(tmp_path, coldstart):
    "Zero severity: a float32 engine, no rounding, N = 1: KL is zero to rounding, and no route differs."
    c = small(
        tmp_path / "run",
        coldstart,
        **{"rollout.fp8": "none", "objective.replay": "none", "batch.updates": 1, "steps": 2},
    )
    for r in train(c).steps():
        assert (
            abs(r["kl"]) < 1e-6
            and r["k3"] < 1e-11
            and r["discrepancy/flip"] == 0
            and r["validity/breakdown"] < 1e-4
        )


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_replay_modes_replay_what_they_say(replay, tmp_path, coldstart):
    from minirl_nb import routing
    from minirl_nb.train import Run, live_routes, recompute, sample

    run = Run(
        small(tmp_path / "run", coldstart, **{"objective.replay": replay, "batch.tokens": 200})
    )
    s = sample(run)
    T, mu = s.rollout.tokens.shape[1], s.mu_routes.padded()
    recompute(run, s)
    if replay == "none":
        assert s.rollout.routes is None
    else:
        routes = s.rollout.routes.padded()
    if replay == "R3":
        assert torch.equal(routes, mu) and torch.equal(
            s.rollout.routes_valid,
            s.rollout.token_mask & (torch.arange(T) < s.rollout.length[:, None] - 1),
        )
    if replay == "R2":
        assert torch.equal(s.rollout.routes_valid, s.rollout.token_mask)
        live = live_routes(run, s.rollout, torch.arange(len(s.rollout))).padded()
        assert (live == routes)[
            s.rollout.token_mask
        ].float().mean() > 0.999  # another padding, other roundings
        assert not torch.equal(routes[s.mu_valid], mu[s.mu_valid])  # FP8 chose otherwise somewhere
    with torch.no_grad():
        part = s.rollout.select(torch.arange(8))
        with run.replaying(part), routing.record(run.model) as recorder:
            run.logprobs(part)
        used = recorder.pop(8)
    if replay != "none":
        assert torch.equal(used[part.routes_valid], part.routes.padded()[part.routes_valid])


def test_micro_batches_change_nothing_but_rounding(tmp_path, coldstart):
    "One gradient step with micro-batches of one row or of all: the same loss, gradient norm and statistics."
    rows = [
        train(
            small(tmp_path / str(tokens), coldstart, **{"batch.tokens": tokens, "steps": 2})
        ).steps()[0]
        for tokens in (1, 100000)
    ]
    for key in ("loss", "grad_norm", "reward", "entropy", "kl", "weight/max"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-7), key


def test_two_runs_are_equal_bit_for_bit(finished, tmp_path, coldstart):
    train(small(tmp_path / "run", coldstart))
    assert metrics(tmp_path / "run") == metrics(finished.folder)


# ------------------------------------------------------------------------------------------ stopping
@pytest.mark.parametrize("when", ["step_000002", "step_000006.tmp", "metrics"])
def test_kill_and_resume_is_bit_for_bit(when, finished, tmp_path, coldstart):
    """kill -9 between two steps, inside the writing of a checkpoint, and inside the writing of metrics; then --resume."""
    folder = tmp_path / "run"
    (tmp_path / "r.yaml").write_text(config_yaml(small(folder, coldstart)))
    killer = ""
    if when == "step_000006.tmp":  # die when the optimiser's state of step 6 is about to be written
        killer = (
            "import minirl_nb.world as t, os, signal\nold = t.save_file\n"
            "def save(x, p, **k):\n    if 'step_000006.tmp' in str(p): os.kill(os.getpid(), signal.SIGKILL)\n    old(x, p, **k)\n"
            "t.save_file = save\n"
        )
    if when == "metrics":  # die with half a line of step 5 on the disk
        killer = (
            "import minirl_nb.run as t, os, signal, json\nold = t.append_row\n"
            "def append(folder, row):\n    if row.get('step') == 5:\n        f = open(folder / 'metrics.jsonl', 'a')\n"
            "        f.write(json.dumps(row)[:40]); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n    return old(folder, row)\n"
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


def test_resume_of_a_finished_run_does_nothing(finished, coldstart):
    before = metrics(finished.folder)
    again = train(small(finished.folder, coldstart, resume=True))
    assert (
        metrics(finished.folder) == before
        and again.evaluations.keys() == finished.evaluations.keys()
    )


@pytest.mark.parametrize(
    "where, words", [("weight", "recompute"), ("gradient", "gradient norm is nan")]
)
def test_non_finite_stops_with_step_phase_and_quantity(
    where, words, tmp_path, coldstart, monkeypatch, capsys
):
    if where == "gradient":
        old = torch.nn.utils.clip_grad_norm_

        def poisoned(parameters, *args):
            parameters = list(parameters)
            if poisoned.calls == 4:
                parameters[3].grad[0] = float("nan")
            poisoned.calls += 1
            return old(parameters, *args)

        poisoned.calls = 0
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    else:
        from minirl_nb import train as module

        old_sample = module.sample

        def sample(run):
            step = old_sample(run)
            if run.step == 4:
                with torch.no_grad():
                    run.model.lm_head.weight[3, 0] = float("nan")
            return step

        monkeypatch.setattr(module, "sample", sample)
    (tmp_path / "r.yaml").write_text(config_yaml(small(tmp_path / "run", coldstart)))
    assert main(["train", str(tmp_path / "r.yaml")]) == 1
    error = capsys.readouterr().err
    assert (
        "gradient step 4" in error
        and words in error
        and "step_000004" in error
        and error.count("\n") == 1
    )
    from transformers import AutoModelForCausalLM

    good = AutoModelForCausalLM.from_pretrained(checkpoints(tmp_path / "run")[-1])
    assert all(torch.isfinite(p).all() for p in good.parameters())


def test_a_corrupted_engine_stops_the_run_by_name(tmp_path, coldstart, monkeypatch, capsys):
    from minirl_nb.rollout import TorchEngine

    old = TorchEngine.load

    def load(self, named, version=None):
        old(self, named, version)
        with torch.no_grad():
            dict(self.model.named_parameters())["model.layers.1.mlp.experts.down_proj"][3].zero_()

    monkeypatch.setattr(TorchEngine, "load", load)
    (tmp_path / "r.yaml").write_text(config_yaml(small(tmp_path / "run", coldstart)))
    assert main(["train", str(tmp_path / "r.yaml")]) == 1
    assert "model.layers.1.mlp.experts.down_proj (expert 3)" in capsys.readouterr().err


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("preset", ["minirl", "grpo", "cispo", "gspo"])
def test_all_wrong_or_all_right_neither_crashes_nor_moves(
    reward, preset, tmp_path, moe_folder, monkeypatch
):
    from transformers import AutoModelForCausalLM

    from minirl_nb import tasks

    monkeypatch.setattr(
        tasks.Task,
        "verify_many",
        lambda self, problems, texts: torch.full((len(problems),), reward),
    )
    result = train(small(tmp_path / "run", moe_folder, **{"objective.preset": preset, "steps": 2}))
    for r in result.steps():
        assert r["equal_groups"] == 1 and r["grad_norm"] == 0 and r["loss"] == 0
    a, b = (
        AutoModelForCausalLM.from_pretrained(p)
        for p in (checkpoints(result.folder)[-1], moe_folder)
    )
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_train_state_error_is_a_runtime_error():
    assert issubclass(TrainingError, RuntimeError)


def test_live_plot_in_a_notebook(tmp_path, coldstart):
    "A real Jupyter kernel shows one picture and updates it, and no progress bar."
    import nbformat
    from nbclient import NotebookClient

    settings = {
        "model.path": str(coldstart),
        "output.folder": str(tmp_path / "run"),
        "steps": 2,
        "batch.prompts": 2,
        "rollout.responses": 2,
        "rollout.max_new_tokens": 16,
        "evaluation.samples": 1,
        "threads": 1,
    }
    code = f"from minirl_nb.train import load_config, train\nr = train(load_config(None, {settings!r}))"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    outputs = nb.cells[0].outputs
    pictures = [
        o
        for o in outputs
        if o.output_type in ("display_data", "update_display_data")
        and "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 1 and "step/s" not in str(
        [o for o in outputs if o.output_type == "stream"]
    )


def test_auto_says_what_it_took(tmp_path, coldstart, capsys):
    result = train(small(tmp_path / "run", coldstart, **{"objective.replay": "auto", "steps": 2}))
    assert result.replay == "R2" and "auto took R2 (N = 2)" in capsys.readouterr().err


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


def test_packed_micro_batches_train_like_padded_ones(tmp_path, coldstart):
    "Rows laid one behind the other, R2 and R3, against padded micro-batches: the same first steps to rounding."
    for replay in ("R2", "R3"):
        rows = [
            train(
                small(
                    tmp_path / f"{replay}{packed}",
                    coldstart,
                    **{"batch.packed": packed, "objective.replay": replay, "steps": 2},
                )
            ).steps()
            for packed in (False, True)
        ]
        for a, b in zip(*rows):
            for key in ("loss", "grad_norm", "entropy", "kl", "discrepancy/flip"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), (replay, key)
