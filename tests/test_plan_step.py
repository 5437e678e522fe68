"""A step on fake tensors takes what the same step on real ones takes; layers repeat."""

import pytest
from plan_models import DENSE, MIXTURE, THIN, case_of
from transformers import Qwen3MoeConfig

from minirl_nb import policy
from minirl_nb.plan.cluster import Cluster
from minirl_nb.plan.step import MicroBatch, fake_processes, measure, run_pass

# Positions and tokens are made outside of the watched step on one side: a few kilobytes of 1 MB
SPREAD = {"model.compute": "bfloat16", "model.gradient_checkpointing": True}


def test_shapes_that_dtensor_works_out_are_not_counted():
    "On tensors of global size, once for each operation: a process's first pass must not see them."
    unused = Qwen3MoeConfig(**THIN.to_dict() | {"hidden_size": 80})  # shapes of no other test
    case = case_of(unused, SPREAD | {"parallel.expert": 4}, Cluster.with_gpus("h100", 8))
    with fake_processes(8):
        first, second = (run_pass(case, 3, MicroBatch(1, 64, 60)) for _ in range(2))
    assert first.peak == second.peak
    # one temporary of all parameters: foreach
    assert first.peak["step"] < first.states + 1.2 * first.weights


@pytest.mark.parametrize("expert", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_line_through_two_depths_gives_a_third(expert):
    case = case_of(MIXTURE, SPREAD | {"parallel.expert": expert}, Cluster.with_gpus("h100", 8))
    with fake_processes(8):
        a, b, c = (run_pass(case, layers, MicroBatch(1, 512, 500)) for layers in (3, 5, 9))
    line = a.along(b, 3.0)
    # states are sums of shards; padding of odd shards is at most one row in thousands
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(line, name) == pytest.approx(getattr(c, name), rel=1e-6)
    # sums over layers that are alike; what differs is the order of a float's additions. Seconds are
    # sums of maxima (operations, bytes, launch), and all layers have the same kernels
    for name in ("peak", "flops", "moved", "seconds"):
        for key, size in getattr(c, name).items():
            assert getattr(line, name)[key] == pytest.approx(size, rel=1e-9), (name, key)
    # two moments a weight, and a counter of 4 bytes for each tensor of thousands of weights
    assert c.optimizer == pytest.approx(2 * c.weights, rel=1e-3)
    # sharded: only the padding of uneven shards is more
    assert 1 <= c.weights / (case.model.parameters * 4 / 8) < 1.1


def test_many_chunks_of_the_head_from_few(monkeypatch):
    monkeypatch.setattr(policy, "CHUNK", 512 * 16)  # 16 rows a chunk
    case, micro = case_of(DENSE), MicroBatch(4, 128, 400)
    found, whole = measure(case, micro), run_pass(case, 4, micro)
    # four chunks stand in for 25. What they leave out: of each answer two numbers of 8 bytes and up to
    # three of 4, and, at the peak of the head, two chunks of logits that wait for their gradients
    logits, left_out = 16 * 512 * 4, 400 - 4 * 16
    for key, size in whole.peak.items():
        missing = left_out * (2 * 8 + 3 * 4) + (2 * logits if key == "head" else 0)
        assert size - missing <= found.peak[key] <= size, key
    for key, seconds in whole.seconds.items():
        assert found.seconds[key] == pytest.approx(seconds, rel=1e-9), key


def test_a_forward_alone_holds_what_it_holds_before_a_backward():
    case, micro = case_of(THIN, SPREAD), MicroBatch(1, 64, 60)
    whole = run_pass(case, 3, micro, accumulate=False)
    alone = run_pass(case, 3, micro, backward=False)
    assert whole.optimizer > 0 == alone.optimizer and "backward" not in alone.peak
    assert alone.peak["forward"] == whole.peak["forward"] - whole.optimizer
