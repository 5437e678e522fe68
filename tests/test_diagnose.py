"""Broken runs get their diagnosis, healthy runs none; logs of TRL and verl are read by their names."""

import json
from dataclasses import replace
from pathlib import Path

import broken_runs
import pytest
from broken_runs import BROKEN, DIAGNOSES, HEALTHY, RECORDED, ROOT

from minirl_nb.cli import main
from minirl_nb.diagnose import LEAST_POINTS, LIMITS, RULES, diagnose, diagnosis, limit, series
from minirl_nb.logs import Log, read_log
from minirl_nb.metrics import metric, names_of
from minirl_nb.parity import Parity, widened


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())


def log_of(columns, name="run"):
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return Log(name, "minirl", Path(), rows, [])


def made(**columns):
    "A log of one mini-batch a rollout step."
    n = len(next(iter(columns.values())))
    place = {"step": range(1, n + 1), "rollout_step": range(1, n + 1)}
    return log_of(place | columns)


def rules(log):
    return [f.rule for f in diagnose(log)]


# ---------------------------------------------------------------------------------- recorded runs
def test_every_run_of_the_list_is_recorded(recorded):
    assert list(recorded) == list(HEALTHY | BROKEN) and len(HEALTHY) == 10
    assert set(DIAGNOSES) == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_gets_its_diagnosis(name, recorded):
    wanted, first = DIAGNOSES[name]
    found = rules(log_of(recorded[name]))
    assert wanted <= set(found) and found[0] == first, found


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_healthy_run(name, recorded):
    assert not diagnose(log_of(recorded[name]))


@pytest.mark.parametrize(
    "folder", ["data/demo", "data/results/smollm2_moe/R3_0", "data/results/smollm2_moe/none_0"]
)
def test_nothing_is_said_of_the_recorded_results(folder):
    assert not diagnose(read_log(ROOT / folder))


def test_every_rule_but_one_is_seen_at_work(recorded):
    "Exploding entropy has no run: `test_each_rule_alone` has rows of it."
    seen = {rule for name in BROKEN for rule in rules(log_of(recorded[name]))}
    assert {rule.name for rule in RULES} - seen == {"entropy rises"}


def test_the_drifting_engine_took_the_band_of_its_run_along(recorded):
    """The run's own probe let every transfer pass, and the diagnosis names the drift from the
    transfer on at which the band of the first probes is left for good."""
    log = log_of(recorded["transfer"])
    probes = series(log.steps, "parity/q90")
    band = None
    for step, q90 in zip(probes.step, probes.value):
        found = Parity(tokens=0, median=0, q90=float(q90), max=0, k1=0, k3=0)
        assert band is None or q90 <= band, step  # else the run would have ended here
        band = widened(band, found)
    (drift,) = [f for f in diagnose(log) if f.rule == "parity"]
    assert probes.step[0] < drift.since < probes.step[-1]
    early = replace(log, steps=[row for row in log.steps if row["step"] < drift.since])
    assert "parity" not in rules(early)


# ------------------------------------------------------------------------------------- live runs
@pytest.mark.parametrize("name", ["scale", "cap"])
def test_a_live_run_is_diagnosed(name, tmp_path, capsys):
    "The whole way: train, metrics.jsonl, command line."
    broken_runs.run(name, tmp_path, steps=16)
    assert main(["diagnose", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    page = next(r.page for r in RULES if r.name == DIAGNOSES[name][1])
    assert f"1. Since gradient step 1: {'The discrepancy' if name == 'scale' else ''}" in said
    assert f"Explained on page {page}." in said


# ------------------------------------------------------------------------------------- each rule
N = 12
FLAT = {
    "reward": [0.5] * N,
    "entropy": [0.3] * N,
    "k3": [1e-3] * N,
    "staleness/k3": [5e-4] * N,
    "equal_groups": [0.1] * N,
}
RISE = [1.0] * 6 + [10.0] * 6


@pytest.mark.parametrize(
    "rule, columns, since",
    [
        ("discrepancy", {"k3": [1e-3 * x for x in RISE]}, 7),
        ("discrepancy", {"k3": [0.1] * N}, 1),
        ("staleness", {"staleness/k3": [1e-3 * x for x in RISE]}, 7),
        ("validity", {"validity/local_shift": [0.06 * x for x in RISE], "validity/staleness": [0.9] * N}, 7),
        ("parity", {"parity/q90": [0.03 * x for x in RISE]}, 7),
        ("layer", {"discrepancy/flip_by_layer": [[0.02, 0.02 * x, 0.03] for x in RISE]}, 7),
        ("entropy falls", {"entropy": [0.3] * 6 + [0.01] * 6}, 7),
        ("entropy rises", {"entropy": [0.3] * 6 + [1.0] * 6}, 7),
        ("reward falls", {"reward": [0.5] * 6 + [0.1] * 6}, 7),
        ("one side", {"clip_low": [0.01 * x for x in RISE], "clip_high": [0.0] * N}, 7),
        ("truncated", {"truncated": [0.002 * x for x in RISE]}, 7),
        ("cut", {"cut": [0.02 * x for x in RISE]}, 7),
        ("equal groups", {"equal_groups": [0.08 * x for x in RISE]}, 7),
    ],
)  # fmt: skip
def test_each_rule_alone(rule, columns, since):
    "On a flat run with one thing wrong in it, exactly that is found, at its step."
    assert not diagnose(made(**FLAT))
    (finding,) = diagnose(made(**(FLAT | columns)))
    assert (finding.rule, finding.since) == (rule, since)
    assert finding.says.endswith(".") and finding.tries


@pytest.mark.parametrize(
    "columns",
    [
        {"k3": [1e-3] * 6 + [0.5] + [1e-3] * 5},  # a spike
        {"k3": [1e-3] * 4 + [0.1] * 4 + [1e-3] * 4},  # a run that has recovered
        {"k3": [1e-9] * 6 + [1e-4] * 6},  # growth that does not matter
        {"discrepancy/flip_by_layer": [[0.02 * x, 0.02 * x, 0.02 * x] for x in RISE]},
        {"clip_low": [0.05] * N, "clip_high": [0.02] * N},  # both sides
        {"entropy": [0.3 * 0.93**i for i in range(N)]},
        {"k3": [None] * N, "entropy": [float("nan")] * N},
    ],
)
def test_what_is_not_a_finding(columns):
    assert not diagnose(made(**(FLAT | columns)))


def test_ratios_after_a_collapse_count_as_not_measured():
    "All groups are equal, no token has a gradient, and the ratio of nothing is one."
    equal = [0.1] * 4 + [1.0] * 8
    stale = [0.2] * 4 + [0.0] * 8
    assert rules(made(**(FLAT | {"equal_groups": equal, "staleness/k3": stale})))[0] == "staleness"


def test_a_short_run_is_not_judged():
    short = LEAST_POINTS - 1
    assert not diagnose(made(k3=[0.5] * short))
    assert diagnose(made(k3=[0.5] * LEAST_POINTS))


def test_limits_have_reasons_and_rules_have_pages():
    assert all(reason for _, reason in LIMITS.values()) and limit("kl") == pytest.approx(
        0.0284, rel=1e-2
    )
    for rule in RULES:
        assert (ROOT / "nbs" / f"{rule.page}.ipynb").is_file(), rule.page
        assert all(metric(key) for key in rule.needs)


# ----------------------------------------------------------------------------------------- advice
def test_advice_that_the_config_follows_is_left_out(finished):
    log = read_log(finished.folder)
    damaged = [row | {"k3": 0.5} for row in log.steps]
    (found,) = [f for f in diagnose(replace(log, steps=damaged)) if f.rule == "discrepancy"]
    without = [
        f for f in diagnose(replace(log, steps=damaged, config=None)) if f.rule == "discrepancy"
    ]
    assert any("replay" in t for t in without[0].tries)
    assert not any("replay" in t for t in found.tries)  # that run replays with R3


# ------------------------------------------------------------------------------- logs of others
def test_trl_logs_are_diagnosed(tmp_path):
    "Names of GRPOTrainer; its kl is the divergence from a reference model and says nothing here."
    names = {ours: theirs for theirs, ours in names_of("trl").items()}
    history = [
        {
            "step": i,
            names["reward"]: 0.5,
            names["entropy"]: 0.3,
            names["discrepancy/abs"]: 0.02 if i <= 20 else 0.2,
            names["cut"]: 0.5,
            names["equal_groups"]: 0.1,
            names["clip_low"]: 0.05,
            names["clip_high"]: 0.0,
            "kl": 50.0,
        }
        for i in range(1, 41)
    ]
    state = {"log_history": [*history, {"step": 40, "train_runtime": 1.0}]}
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "checkpoint-40" / "trainer_state.json").write_text(json.dumps(state))
    log = read_log(tmp_path)
    assert log.source == "trl" and len(log.steps) == 40
    found = {f.rule: f.since for f in diagnose(log)}
    assert found == {"one side": 1, "cut": 1, "discrepancy": 21}
    assert "not judged" in diagnosis(log) and "parity" in diagnosis(log)


def test_verl_logs_are_diagnosed(tmp_path):
    "The file logger and the console logger give the same rows."
    names = {ours: theirs for theirs, ours in names_of("verl").items()}
    steps = [
        {
            names["reward"]: 0.5 if i < 15 else 0.0,
            names["entropy"]: 0.3 if i < 15 else 2.0,
            names["discrepancy/k3"]: 1e-3 if i < 10 else 0.1,
            names["staleness/k1"]: 1e-4,
            "training/rollout_probs_diff_mean": 0.01,
        }
        for i in range(20)
    ]
    file, console = tmp_path / "run.jsonl", tmp_path / "run.log"
    lines = [json.dumps({"step": i, "data": data}) for i, data in enumerate(steps)]
    file.write_text("\n".join(lines) + "\n")
    lines = [
        f"(TaskRunner pid=1) step:{i} - " + " - ".join(f"{k}:{v}" for k, v in data.items())
        for i, data in enumerate(steps)
    ]
    console.write_text("loading\n" + "\n".join(lines) + "\n")
    log = read_log(file)
    assert log.source == "verl" and log.steps == read_log(console).steps
    found = [(f.rule, f.since) for f in diagnose(log)]
    assert found == [("discrepancy", 10), ("entropy rises", 15), ("reward falls", 15)]


@pytest.mark.parametrize(
    "words, said",
    [
        (["diagnose"], "wants the folder or log of a run"),
        (["diagnose", "nowhere"], "there is no run folder and no log nowhere"),
        (["diagnose", "data"], "holds no metrics.jsonl"),
        (["diagnose", "README.md"], "no gradient step of minirl, TRL or verl"),
    ],
)
def test_mistakes_are_one_sentence(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
