"""What a plan says: numbers that add up, and the setting that helps against what does not fit."""

import json
from dataclasses import replace

import pytest
from plan_models import small

from minirl_nb import plan
from minirl_nb.plan import Assumptions, Cluster, GiB, Plan


def test_all_phases_add_up_and_say_so(mixture):
    found = plan.plan(small(mixture, **{"objective.replay": "R2"}), Cluster.with_gpus("h100", 8))
    assert (
        isinstance(found, Plan)
        and found.fits
        and [p.name for p in found.phases] == ["rollout", "recompute", "update", "transfer"]
    )
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["seconds"] == pytest.approx(sum(p["time"] for p in numbers["phases"]))
    assert numbers["gpu hours a gradient step"] == pytest.approx(numbers["seconds"] * 8 / 3600)
    assert numbers["route bytes per token"] == 3 * 2
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


def test_the_knob_is_one_that_the_engine_has(mixture):
    "The torch engine refuses rollout.tensor_parallel and reserves full length for max_batch."
    tight = replace(Cluster.with_gpus("h100", 1), memory=Assumptions().context + 2**21)
    changes = {"rollout.engine": "torch", "rollout.max_new_tokens": 4000}
    found = plan.plan(small(mixture, **changes), tight, search=False)
    of_cache = [w for w in found.warnings if "KV cache" in w]
    assert of_cache and all("max_batch" in w and "tensor_parallel" not in w for w in of_cache)


@pytest.mark.parametrize("setting", [{"objective.pi_old": "rollout"}, {}])
def test_pi_old_that_takes_no_pass_of_its_own_costs_none(mixture, setting):
    "Two policies, and one update whose forward gives it. R2 must record before it replays."
    cluster = Cluster.with_gpus("h100", 8)
    apart = plan.plan(small(mixture, **{"objective.replay": "R2"}), cluster, search=False)
    setting = setting | {"objective.replay": "R3"}
    saved = plan.plan(small(mixture, **setting), cluster, search=False)
    assert [p.name for p in saved.phases] == ["rollout", "update", "transfer"]
    difference = apart.numbers["seconds"] - saved.numbers["seconds"]
    assert difference == pytest.approx(apart.phase("recompute").time) and difference > 0
    for name in ("rollout", "update", "transfer"):
        assert saved.phase(name) == apart.phase(name)
    assert "recompute" not in saved.report()


def test_of_two_updates_the_second_is_recomputed(mixture):
    cluster, setting = Cluster.with_gpus("h100", 8), {"objective.replay": "R3", "batch.updates": 2}
    half = plan.plan(small(mixture, **setting), cluster, search=False)
    setting |= {"objective.replay": "R2"}
    whole = plan.plan(small(mixture, **setting), cluster, search=False)
    share = half.phase("recompute").time / whole.phase("recompute").time
    assert 0.4 < share < 0.7  # half of the responses, in micro-batches that are less full
