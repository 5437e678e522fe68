"""The table of metrics names what a run writes, and nothing that it cannot write."""

import json

import pytest

from minirl_nb.metrics import METRICS, metric, names_of
from minirl_nb.weights import ratio_stats

WRITTEN_ELSEWHERE = {
    "parity/floor",  # engines whose model can be read
    # with batch.resample: test_resample.py
    "resample/reward",
    "resample/equal_groups",
    "resample/replaced",
    "resample/further",
    "version",  # runs one step off
    "lag",
}


@pytest.fixture(scope="module")
def keys(finished):
    rows = [json.loads(x) for x in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    return {key for row in rows for key in row}


def test_every_key_of_a_run_is_in_the_table(keys):
    unknown = {key for key in keys if metric(key) is None}
    assert not unknown, unknown


def test_every_entry_of_the_table_is_written_by_a_run(keys):
    unused = {m.key for m in METRICS if not any(metric(key) is m for key in keys)}
    assert unused <= WRITTEN_ELSEWHERE, unused


def test_the_table_has_every_statistic_of_a_ratio():
    import torch

    for name in ratio_stats(torch.zeros(1, 2), mask=torch.ones(1, 2)):
        assert metric(f"weight/{name}"), name


def test_flips_by_layer_agree_with_their_summary(finished):
    "Mean and largest of the list are the two numbers beside it."
    rows = [r for r in finished.rows if r["kind"] == "step"]
    assert any(sum(r["discrepancy/flip_by_layer"]) for r in rows)
    for row in rows:
        for ratio in ("discrepancy", "staleness"):
            by_layer = row[f"{ratio}/flip_by_layer"]
            assert len(by_layer) == 3  # layers of the cold start
            assert row[f"{ratio}/flip"] == pytest.approx(sum(by_layer) / 3)
            assert row[f"{ratio}/flip_max"] == max(by_layer)


def test_names_of_others_are_given_once():
    for framework in ("trl", "verl"):
        ours = list(names_of(framework).values())
        assert len(ours) == len(set(ours)) and all(metric(key) for key in ours)
        assert "kl" not in ours  # TRL's kl is the divergence from a reference model
    with pytest.raises(KeyError):
        names_of("else")
