"""Engineering tests of `coldstart`: the same bits again, all ways to start, and clear errors."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirl_nb import coldstart, tasks
from minirl_nb.coldstart import (
    TEACHERS,
    ColdStartConfig,
    Trace,
    collate,
    learning_rate,
    teach,
    train,
)

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "coldstart"
QUICK = ColdStartConfig(steps=4, batch_size=8, warmup=2, traces_per_problem=1, log_every=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train(replace(QUICK, output=str(tmp_path_factory.mktemp("cold") / "small")))


@pytest.mark.any_kernels("bits of one machine")
def test_the_same_command_gives_the_same_bits(small, tmp_path):
    state = torch.random.get_rng_state()
    torch.rand(3)  # what was drawn before must not matter
    drawn = torch.random.get_rng_state()
    again = train(replace(QUICK, output=str(tmp_path / "again")))
    assert torch.equal(torch.random.get_rng_state(), drawn) and not torch.equal(state, drawn)
    a, b = (load_file(r.folder / "model.safetensors") for r in (small, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def strip(r):
        return [{k: v for k, v in m.items() if k != "seconds"} for m in r.metrics]

    assert strip(small) == strip(again)
    other = train(replace(QUICK, output=str(tmp_path / "other"), seed=1))
    assert not torch.equal(
        load_file(other.folder / "model.safetensors")["lm_head.weight"], a["lm_head.weight"]
    )


def test_the_shipped_checkpoint_opens_with_transformers():
    model, tok = (
        AutoModelForCausalLM.from_pretrained(SHIPPED),
        AutoTokenizer.from_pretrained(SHIPPED),
    )
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and model.dtype == torch.float32
    c = model.config
    assert (
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
    ) == (64, 3, 4, 2, 16)
    assert (
        c.num_experts,
        c.num_experts_per_tok,
        c.norm_topk_prob,
        c.moe_intermediate_size,
        c.vocab_size,
    ) == (16, 2, True, 32, 16)
    assert (
        not c.tie_word_embeddings and model.generation_config.eos_token_id == tok.eos_token_id == 15
    )
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 3e6
    out = model.generate(**tok("10*11=", return_tensors="pt"), do_sample=False, max_new_tokens=40)
    assert tok.decode(out[0, 6:]).endswith(
        "=110."
    )  # the second best token is nowhere nearer than 0.9 nats


def test_checkpoint_folder(small):
    names = {f.name for f in small.folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "coldstart.json",
        "metrics.jsonl",
    }
    assert len(list(small.folder.parent.iterdir())) == 1, "something was left beside the checkpoint"
    model = AutoModelForCausalLM.from_pretrained(small.folder)
    x = torch.randint(1, 16, (2, 9))
    torch.testing.assert_close(model(x).logits, small.model(x).logits, rtol=0, atol=0)
    assert "output" not in json.loads((small.folder / "coldstart.json").read_text())


def test_from_a_model_and_a_file_of_traces(small, tmp_path):
    traces = tmp_path / "traces.jsonl"
    rows = [
        {"prompt": f"{a}*11=", "response": f"{a * 10}+{a}={a * 11}" + "." * (a % 2)}
        for a in range(10, 50)
    ]  # '.' may be missing
    traces.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = replace(
        QUICK,
        output=str(tmp_path / "next"),
        model=str(small.folder),
        traces=str(traces),
        steps=30,
        lr=3e-3,
        log_every=29,
    )
    result = train(config)
    # 0.95 to 1.2 nats with three seeds, whatever the numerics
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"] - 0.7
    zero = train(replace(config, output=str(tmp_path / "zero"), steps=1, lr=1e-12))
    a, b = (load_file(r.folder / "model.safetensors") for r in (small, zero))
    # one AdamW step moves a weight by at most lr (1 + decay) = 1e-12, less than half a unit
    # roundoff of any weight above 2e-5
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-11) for k in a), (
        "training did not start from the given model"
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("", ":1: the file is empty"),
        ('{"prompt": "1*1="}', ":1: 'response' must be"),
        ('{"prompt": 3, "response": "1."}', ":1: 'prompt' must be"),
        (
            '{"prompt": "1*1=", "response": "1."}\n{"prompt": "a=", "response": "1."}',
            ":2: a symbol of 'a=1.' is not in",
        ),
    ],
)
def test_malformed_traces_name_file_and_line(tmp_path, content, message):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(ValueError, match="t.jsonl" + message):
        train(replace(QUICK, output=str(tmp_path / "o"), traces=str(tmp_path / "t.jsonl")))
    assert not (tmp_path / "o").exists()


def test_wrong_settings(small, tmp_path):
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        train(replace(QUICK, output=str(small.folder)))
    with pytest.raises(
        ValueError, match="teacher = 'row': there are columns, rows, running, repeated, mixed"
    ):
        replace(QUICK, teacher="row")
    with pytest.raises(ValueError, match="steps = 0"):
        replace(QUICK, steps=0)
    with pytest.raises(ValueError, match="corruption = 5"):
        replace(QUICK, corruption=5)
    with pytest.raises(FileNotFoundError, match="no model and tokenizer in"):
        train(replace(QUICK, output=str(tmp_path), model=str(tmp_path)))
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": "b"}')
    with pytest.raises(ValueError, match="no tokenizer of its own"):
        train(replace(QUICK, output=str(tmp_path / "x"), task=f"{tmp_path}/p.jsonl"))
    with pytest.raises(ValueError, match="solves the arithmetic task only"):
        train(
            replace(
                QUICK,
                output=str(tmp_path / "x"),
                task=f"{tmp_path}/p.jsonl",
                model=str(small.folder),
            )
        )
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "1*1=", "response": "1" * 200 + "."}))
    with pytest.raises(
        ValueError, match="the longest trace has 205 tokens, but the model has 128 positions"
    ):
        train(replace(QUICK, output=str(tmp_path / "x"), traces=str(long)))


def test_a_loss_that_is_not_finite_stops_and_leaves_nothing(tmp_path):
    with pytest.raises(FloatingPointError, match="step [1-9].*the loss is"):
        train(
            replace(
                QUICK, output=str(tmp_path / "x"), lr=1e30, warmup=0, max_grad_norm=1e30, steps=20
            )
        )
    assert not list(tmp_path.iterdir())


@given(
    st.sampled_from(sorted(TEACHERS)),
    st.integers(10, 99),
    st.integers(10, 99),
    st.integers(0, 2**32),
)
def test_careful_teachers_are_right(teacher, a, b, seed):
    p = tasks.Problem("p", f"{a}*{b}", str(a * b))
    response = teach(p, teacher, 0.0, random.Random(seed))
    assert tasks.verify_arithmetic([p], [response]) == [1.0]
    assert len(response) <= (90 if teacher == "repeated" else 40)
    assert eval(response[:-1].split("=")[0]) in (
        a * b,
        a * (b // 10 * 10),
    )  # `running` carries its sum along


def test_corruption_rate():
    rng, p = random.Random(0), tasks.Problem("p", "47*36", "1692")
    clean = {chain + "=1692." for chain in TEACHERS["columns"][0](47, 36)}
    changed = digits = 0
    for _ in range(4000):
        r = teach(p, "columns", 0.2, rng)
        c = next(x for x in clean if len(x) == len(r))
        digits += sum(x.isdigit() for x in c)
        changed += sum(x != y for x, y in zip(r, c))
        assert all(x == y or x.isdigit() for x, y in zip(c, r))
    assert abs(changed / digits - 0.2 * 0.9) < 4 * (0.18 * 0.82 / digits) ** 0.5


def test_collate():
    tokens, mask, length = collate([Trace([1, 2], [3]), Trace([4], [5, 6, 7])], pad=0)
    assert tokens.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]] and length.tolist() == [3, 4]
    assert mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_the_rate_of_a_cold_start():
    rates = dict(lr=1.0, steps=110, warmup=10, parts=10, schedule="cosine", floor=0.05)
    assert [round(learning_rate(s, **rates), 3) for s in (0, 4, 9, 10, 60)] == [
        0.1,
        0.5,
        1.0,
        1.0,
        0.525,
    ]
    assert 0.05 <= learning_rate(109, **rates) < 0.06


def test_the_shipped_rates_to_the_bit():
    settings = json.loads((SHIPPED / "coldstart.json").read_text())
    config = ColdStartConfig(**settings)
    for row in map(json.loads, (SHIPPED / "metrics.jsonl").read_text().splitlines()):
        assert row["lr"] == coldstart._rate(row["step"], config)


@pytest.mark.parametrize(
    "schedule, after",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.85355339, 0.5, 0.14644661]),
    ],
)
def test_schedules_of_a_run(schedule, after):
    rates = [learning_rate(s, lr=2.0, steps=7, warmup=3, schedule=schedule) for s in range(7)]
    assert rates == pytest.approx(
        [0.5, 1.0, 1.5, *(2 * x for x in after)], rel=1e-8
    )  # eight digits are written above
    assert learning_rate(0, lr=2.0, steps=7, schedule=schedule) == 2.0
    with pytest.raises(
        ValueError, match="schedule is 'step'; it must be constant, linear or cosine"
    ):
        learning_rate(3, lr=1.0, steps=4, schedule="step")
