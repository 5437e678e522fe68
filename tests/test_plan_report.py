"""What a plan says: numbers that add up, and the setting that helps against what does not fit."""

import json
from dataclasses import replace

import pytest
from plan_models import small

from minirl_nb import plan
from minirl_nb.plan import Assumptions, Cluster, GiB, Plan


def test_all_phases_add_up_and_say_so(mixture):
    found = plan.plan(small(mixture), Cluster.with_gpus("h100", 8))
    assert (
        isinstance(found, Plan)
        and found.fits
        and [p.name for p in found.phases] == ["rollout", "recompute", "update", "transfer"]
    )
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["seconds"] == pytest.approx(sum(p["time"] for p in numbers["phases"]))
    assert numbers["gpu hours a gradient step"] == pytest.approx(numbers["seconds"] * 8 / 3600)
    assert numbers["route bytes a token"] == 3 * 2
    text = found.report()
    for word in (
        "weights",
        "activations",
        "KV cache",
        "optimiser",
        "GPU hours",
        "largest micro-batch",
        "8 x h100",
    ):
        assert word in text, word


def test_what_does_not_fit_is_said_with_the_knob_that_helps(mixture):
    tight = replace(Cluster.with_gpus("h100", 8), memory=6 * GiB)
    found = plan.plan(small(mixture, **{"batch.tokens": 10**6}), tight, search=False)
    assert not found.fits and any(
        "activations" in w and "lower batch.tokens" in w for w in found.warnings
    )
    found = plan.plan(
        small(mixture, **{"batch.tokens": 2**18, "model.gradient_checkpointing": False}),
        tight,
        search=False,
    )
    assert any("gradient_checkpointing to True" in w for w in found.warnings)
    reserved = Assumptions().context + Assumptions().workspace
    config = small(mixture, **{"rollout.max_new_tokens": 4000})
    cache = plan.plan(
        config, replace(Cluster.with_gpus("h100", 8), memory=reserved + 2**21), search=False
    )
    assert not cache.fits and any(
        "room for" in w and "rollout.tensor_parallel" in w for w in cache.warnings
    )


def test_two_policies_save_the_recomputation(mixture):
    cluster = Cluster.with_gpus("h100", 8)
    two = {"objective.pi_old": "rollout", "objective.replay": "R3"}
    recomputed = plan.plan(small(mixture, **{"objective.replay": "R3"}), cluster, search=False)
    saved = plan.plan(small(mixture, **two), cluster, search=False)
    assert [p.name for p in saved.phases] == ["rollout", "update", "transfer"]
    difference = recomputed.numbers["seconds"] - saved.numbers["seconds"]
    assert difference == pytest.approx(recomputed.phase("recompute").time)
    for name in ("rollout", "update", "transfer"):
        assert saved.phase(name) == recomputed.phase(name)
    assert "recompute" not in saved.report()
