"""What a low-precision rollout costs: the measurement, its numbers, and the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_fp8 import build

from minirl_nb import fp8, precision
from minirl_nb.policy import token_logprobs
from minirl_nb.rollout import Sampling, TorchEngine
from minirl_nb.routing import record, replay

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4]]
SAMPLING = Sampling(n=4, max_new_tokens=12, seed=3)
RECORDED = Path(__file__).parent.parent / "data" / "results" / "precision.json"


def test_without_rounding_nothing_is_measured(moe):
    m = precision.measure(moe, PROMPTS, "none", SAMPLING)
    assert m.flips == 0 and m.response_mask.sum() > 20
    # two orders of sums: a hundred roundings of numbers up to 10
    for x in (m.live, m.replayed, m.unified):
        assert 0 <= x.abs().max() < 1e-4 and x[~m.response_mask].eq(0).all()
    found = precision.token_numbers(m)
    assert found["k3"] < 1e-8 and math.isnan(found["r3_factor"])


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_measurement_is_that_of_one_forward_at_a_time(moe, rows):
    m = precision.measure(moe, PROMPTS, "nvfp4", SAMPLING, rows=rows)
    engine = TorchEngine(moe, fp8="nvfp4", routes=True)
    r = engine.generate(PROMPTS, SAMPLING)
    mask = r.response_mask
    assert torch.equal(m.response_mask, mask)
    with torch.no_grad(), record(moe) as recorder:
        logp, _ = token_logprobs(moe, r.tokens, mask, entropy=False)
        own = recorder.pop(len(r))
    with torch.no_grad(), replay(moe, r.routes, r.routes_valid):
        with_routes, _ = token_logprobs(moe, r.tokens, mask, entropy=False)
    assert torch.allclose(m.live[mask], (logp - r.logp_mu)[mask], atol=1e-5)
    assert torch.allclose(m.replayed[mask], (with_routes - r.logp_mu)[mask], atol=1e-5)
    # the share of choices that differ, as sets, over the rows that have a route in both
    apart = (own.long().sort(-1).values != r.routes.long().sort(-1).values).any(-1)
    expected = float(apart[r.routes_valid].double().mean())
    assert m.flips == pytest.approx(expected, abs=1e-9) and m.flips > 0.02
    # the rounded trainer is the engine but for numbers on an edge: the median says so
    assert m.unified[mask].abs().median() < 1e-5 < m.live[mask].abs().median()


def test_a_dense_model_has_no_routes():
    dense = build("llama")
    dense.generation_config.eos_token_id = 15
    m = precision.measure(dense, PROMPTS, "mxfp4", SAMPLING)
    found = precision.token_numbers(m)
    assert m.replayed is None and found["k3"] > 0
    assert all(math.isnan(found[k]) for k in ("flips", "k3_replayed", "r3_factor"))
    with pytest.raises(ValueError, match="unknown low-precision scheme 'int4'"):
        precision.measure(dense, PROMPTS, "int4", SAMPLING)


def test_numbers_by_length_on_a_literal_case():
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    live = torch.tensor([[9, 0.1, 0.2, -0.3, 0.4], [9, 9, 0.5, 0.1, 0.2], [0.3, -0.1, 9, 9, 9]])
    live = torch.where(mask, live, 0.0)
    m = precision.Measured(live, None, live * 2, math.nan, mask)
    two, three = precision.by_length(m, [2, 3, 4])  # a single response has four
    sums = np.array([0.3, 0.6, 0.2])
    assert (two["length"], two["responses"]) == (2, 3)
    assert two["mean"] == pytest.approx(sums.mean()) and two["variance"] == pytest.approx(
        sums.var(ddof=1)
    )
    w = np.exp(sums)
    assert two["ess"] == pytest.approx(w.sum() ** 2 / (3 * (w**2).sum()))
    tokens = np.array([0.1, 0.2, 0.5, 0.1, 0.3, -0.1])
    assert two["k3"] == pytest.approx((np.exp(tokens) - 1 - tokens).mean(), rel=1e-6)
    # the third tokens alone, and sums of three
    third = np.array([-0.3, 0.2])
    assert three["responses"] == 2 and three["mean"] == pytest.approx((0.0 + 0.8) / 2, abs=1e-7)
    assert three["k3"] == pytest.approx((np.exp(third) - 1 - third).mean(), rel=1e-6)
    doubled = precision.by_length(m, [2], "unified")[0]
    assert doubled["variance"] == pytest.approx(4 * two["variance"])


@pytest.mark.parametrize("n", [6, 10])
def test_the_interval_is_students(n):
    values = np.random.default_rng(n).normal(3, 1, n)
    mean, low, high = precision.interval(list(values) + [math.nan])
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5
    assert (mean, low, high) == pytest.approx((values.mean(), mean - half, mean + half), abs=5e-3)
    assert precision.interval([2.0]) == (2.0, -math.inf, math.inf)
    assert all(math.isnan(x) for x in precision.interval([math.nan]))


def test_lengths():
    assert precision.lengths_up_to(64) == [8, 12, 16, 24, 32, 48, 64]
    assert precision.lengths_up_to(5) == [5] and precision.lengths_up_to(20)[-1] == 20


def test_the_command_measures_any_folder_and_keeps_its_numbers(moe_folder, tmp_path, capsys):
    out = tmp_path / "new" / "numbers.json"
    words = f"--model {moe_folder} --seeds 2 --prompts 3 --responses 12 --max_new_tokens 12"
    precision.main([*words.split(), "--schemes", "none", "mxfp4", "--output", str(out)])
    printed = capsys.readouterr().out
    assert "scheme" in printed and "mxfp4" in printed and "4.25" in printed
    kept = json.loads(out.read_text())
    assert kept["config"]["prompts"] == 3 and "NaN" not in out.read_text()
    records = precision.load_records(out)
    assert [(r["scheme"], r["seed"]) for r in records] == [
        (s, seed) for seed in (0, 1) for s in ("none", "mxfp4")
    ]
    assert math.isnan(records[0]["r3_factor"]) and records[0]["k3"] < 1e-8 < records[1]["k3"]
    assert {r["by_length"][0]["length"] for r in records} == {8}
    with pytest.raises(ValueError, match="did you mean .*seeds"):
        precision.main(["--seed", "3"])


def test_the_recorded_table_is_of_every_scheme_and_the_commands_defaults():
    kept = json.loads(RECORDED.read_text())
    assert kept["config"] == json.loads(
        json.dumps(
            precision.asdict(precision.PrecisionConfig(output="data/results/precision.json"))
        )
    )
    records = precision.load_records(RECORDED)
    assert {(r["scheme"], r["seed"]) for r in records} == {
        (s, seed) for s in ("none", *fp8.SCHEMES) for seed in range(6)
    }
    assert all(r["bits"] == (s and s.bits) for r in records for s in [fp8.scheme(r["scheme"])])
    rows = precision.table(records)
    assert len(rows) == 2 + len(fp8.SCHEMES) and all(len(row) == 6 for row in rows)
