"""Lengths of responses, continuous batching, and micro-batches that ranks compute together."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import THIN, case_of

from minirl_nb.plan.cluster import Cluster
from minirl_nb.plan.time import decode, lengths, meetings


@given(st.integers(1, 2000), st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_lengths_have_the_mean_that_was_asked_for(n, m):
    length = lengths(n, 4096, m)
    assert length.min() >= 1 and length.max() <= 4096 and (np.diff(length) >= 0).all()
    if n > 500:  # the midpoint rule at the singular end, and rounding to whole tokens
        assert length.mean() == pytest.approx(4096 * m, rel=0.03, abs=1)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(70, 2000),
    st.integers(1, 16),
)
@settings(max_examples=80, deadline=None)
def test_an_engine_finishes_within_its_cache(length, prompt, capacity, max_running):
    seen = []

    def step(b, tokens):
        seen.append(b)
        return float(b)  # a second for each response: total tokens, in the end

    length = np.array(length)
    out = decode(length, prompt, capacity, max_running, step, lambda tokens: 0.0)
    assert out.seconds == pytest.approx(length.sum()) and out.tokens == length.sum()
    assert out.cached <= capacity and max(seen) <= max_running and out.steps >= length.max()
    free = decode(length, prompt, 10**9, 10**6, lambda b, tokens: 1.0, lambda tokens: 0.0)
    assert free.steps == length.max() and free.evicted == 0
    assert math.isinf(
        decode(
            length, prompt, prompt + length.max() - 1, max_running, step, lambda tokens: 0.0
        ).seconds
    )


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_of_all_ranks_hold_every_token(packed):
    limits = {"rollout.max_new_tokens": 400, "batch.tokens": 2048, "batch.packed": packed}
    case = case_of(THIN, limits, Cluster.with_gpus("h100", 4))
    met, fullest = meetings(case, 64)
    loads = [load for loads in met for load in loads]
    tokens = int(lengths(64, 400, case.assume.mean_length).sum()) + 64 * case.assume.prompt_tokens
    padded = sum(load.tokens for load in loads)
    assert 1 <= fullest <= 4 / 3  # Graham's bound
    assert all(load.tokens <= 2048 for load in loads)
    assert padded == tokens if packed else tokens <= padded <= 1.06 * tokens
