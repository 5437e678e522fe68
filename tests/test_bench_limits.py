"""The benchmark against limits, at a tiny size: its counts of work are torch's own, and its table
is whole. What it measures here means nothing."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minirl_nb.policy import token_logprobs
from tests.bench import bench_limits as bench

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [bench.DENSE, bench.MIXTURE], ids=["dense", "mixture"])
def test_operations_of_a_forward_are_what_torch_counts(sizes):
    model = bench.random_model(sizes | TINY, 2, CPU, torch.float32)
    # the implementations whose products torch counts on a processor
    model.set_attn_implementation("eager")
    if "experts" in repr(model):
        model.set_experts_implementation("eager")
    work, rows, width = bench.Work.from_model(model), 3, 16
    tokens = bench.tokens_of(model, rows, width)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    with torch.no_grad():
        token_logprobs(model, tokens, mask)  # the first time checks the head, with products of it
        with FlopCounterMode(display=False) as counted:
            token_logprobs(model, tokens, mask)
    # torch counts attention without the causal mask, twice as much; the head has no work for the
    # last token of a row; and norms, which are no matrices, are counted here as two operations
    expected = work.forward(rows, width) + 2 * work.attention * rows * width**2
    expected -= 2 * rows * TINY["vocab_size"] * TINY["hidden_size"]
    expected -= 2 * rows * width * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_a_step_of_many_rows_reads_all_experts_and_one_of_a_single_row_its_own():
    model = bench.random_model(bench.MIXTURE | TINY, 2, CPU, torch.float32)
    work = bench.Work.from_model(model)
    assert (work.E, work.K) == (8, 4) and work.cache == 2 * 2 * 16
    whole = sum(p.numel() for p in model.parameters())
    one, of_many = (work.decoding(rows, 0, 4)[1] for rows in (1, 10_000))
    assert of_many == pytest.approx(4 * whole)
    assert one == pytest.approx(4 * (whole - work.experts / 2))
    longer = work.decoding(1, 100, 4)
    assert longer[1] - one == 4 * 100 * work.cache
    assert longer[0] - work.decoding(1, 0, 4)[0] == 4 * work.attention * 100


def test_what_a_side_adds_is_the_median_of_the_rounds():
    seconds = {"base": [1.0, 2.0, 1.0], "more": [1.1, 2.2, 9.0]}
    assert bench.added(seconds, "more", "base") == pytest.approx(10)


def test_the_table_is_whole_and_memory_does_not_grow_with_micro_batches():
    rows = list(bench.limits(1, layers=1, width=32, batches=(1, 4), new=2, changes=TINY))
    found = {label: value for label, value, unit, goal in rows}
    assert len(found) == len(rows) == 17
    assert all(math.isfinite(value) for value in found.values())
    for label, value in found.items():
        # a loaded machine can make a difference of two times negative, but not these
        if "training step, share" in label or "recompute" in label or "limit" in label:
            assert value > 0, label
    assert found["memory of 8 micro-batches over that of 2"] <= 1.01
