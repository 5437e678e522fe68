"""What must hold before a run may start: said in one sentence, before any work."""

import re
import time
from dataclasses import replace

import pytest
from small_runs import small

from minirl_nb import objective, train
from minirl_nb.checks import check, objective_of
from minirl_nb.cli import main
from minirl_nb.clipping import Clip
from minirl_nb.config import config_yaml, load_config
from minirl_nb.trust import TRM_MAX_REGION, TrustRegion
from minirl_nb.weights import MIS, Gamma


def test_objective_of_a_config():
    assert objective_of(load_config()) == objective.MINIRL
    for preset, o in objective.PRESETS.items():
        assert objective_of(load_config(None, {"objective.preset": preset})) == o
    c = {"objective.clip": False, "objective.truncation": "none", "objective.normalizer": "tokens"}
    o = objective_of(load_config(None, c))
    assert o.clip is None and o.truncation is None and o.normalizer == "tokens"
    assert objective_of(load_config(None, {"objective.clip_low": 0.1})).clip == Clip(0.1, 0.27)
    fields = {"measure": "k3", "anchor": "mu", "over": "mean", "side": "negative", "high": 0.01}
    o = objective_of(load_config(None, {f"objective.clip_{k}": v for k, v in fields.items()}))
    assert o.clip == TrustRegion(0.2, **fields)
    c = {"objective.weight": "prefix", "objective.preset": "trm", "objective.truncation": "gamma"}
    o = objective_of(load_config(None, c))
    assert (o.weight, o.truncation, o.clip) == ("prefix", Gamma(), TRM_MAX_REGION)
    c = {"objective.weight": "pi/mu", "objective.truncation": "mis:2", "objective.preset": "grpo"}
    o = objective_of(load_config(None, c | {"objective.truncation_of": "discrepancy"}))
    grpo = objective.PRESETS["grpo"]
    assert o == replace(grpo, weight="pi/mu", truncation=MIS(2.0), truncation_of="discrepancy")
    with pytest.raises(ValueError, match="clip_low"):
        objective_of(load_config(None, {"objective.clip_low": 0.1, "objective.preset": "cispo"}))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": 7}, "not a multiple of batch.updates = 2"),
        ({"model.path": "no/such/model"}, "there is no folder no/such/model"),
        ({"rollout.max_new_tokens": 5000}, "positions"),
        ({"objective.truncation": "tsi:5"}, "unknown truncation 'tsi:5'"),
        ({"objective.pi_old": "rollout", "objective.replay": "R2"}, "objective.replay is R2"),
        ({"objective.clip_measure": "tv", "objective.clip_over": "mean"}, "has no direction"),
        ({"objective.clip_side": "any", "objective.preset": "vespo"}, "vespo has no clip"),
        ({"objective.clip_high": 0.1, "objective.preset": "opsm"}, "has 2 trust regions"),
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
    result = train.train(
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
    "processes, changes, words",
    [
        (
            6,
            {"parallel.expert": 3, "batch.prompts": 6},
            "parallel.expert is 3, which does not divide the 16 experts",
        ),
        (
            4,
            {"parallel.expert": 4, "parallel.shard": 2},
            "parallel.expert is 4, which does not divide the 2 processes of parallel.shard",
        ),
        (4, {"parallel.shard": 3}, "parallel.shard is 3, which does not divide the 4 processes"),
        (
            2,
            {"parallel.shard": 1, "parallel.offload": True},
            "with parallel.shard = 1 nothing is sharded",
        ),
        (
            3,
            {"batch.prompts": 2, "rollout.responses": 4},
            "3 processes do not divide the 8 responses of a mini-batch",
        ),
        (
            4,
            {"rollout.tensor_parallel": 3, "rollout.engine": "vllm"},
            "rollout.tensor_parallel is 3, which does not divide the 4 processes",
        ),
        (4, {"rollout.tensor_parallel": 2}, "only the vLLM engine"),
        (2, {"rollout.servers": ("http://a:1",)}, "rollout.servers are vLLM's"),
    ],
)
def test_launches_that_do_not_come_out_even(processes, changes, words, tmp_path, coldstart):
    settings = {"model.path": str(coldstart), "output.folder": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=re.escape(words)):
        check(load_config(None, settings | changes), processes)
