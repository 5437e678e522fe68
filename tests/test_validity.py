"""`validity`: the meter's value, shares, limits and faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_policies import make, surrogate_gradient

from minirl_nb.exact import (
    expected_reward,
    gradient,
    noisy,
    random_reward,
    relative_error,
    sample,
    sequence_logp,
)
from minirl_nb.validity import VALIDITY_LIMIT, validity

quick = settings(max_examples=30, deadline=None, derandomize=True)
KEYS = {
    "validity/breakdown",
    "validity/spread",
    "validity/discrepancy",
    "validity/staleness",
    "validity/horizon",
}
# log-ratios of up to 30 in sums of eight tokens, rounded at 1e-16 of their size, in exponents
CLOSE = dict(rel=1e-9, abs=1e-12)


def meter(logp, logp_old, logp_mu, mask, weight=None):
    "These tests build tuples in this order, once; the meter itself takes keywords only."
    return validity(
        logp=logp, logp_old=logp_old, logp_mu=logp_mu, response_mask=mask, weight=weight
    )


@st.composite
def batches(draw):
    B, T, seed = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(0, 10**6))
    scale = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]))
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3

    def noise():
        return scale * torch.randn(B, T, generator=g, dtype=torch.float64)

    return logp, logp + noise(), logp + noise(), torch.rand(B, T, generator=g) < 0.7


def reference(logp, logp_old, logp_mu, mask):
    "The definition, token by token, in plain Python."
    num = den = square = cross = n = 0.0
    for lp, lo, lm, row in zip(logp.tolist(), logp_old.tolist(), logp_mu.tolist(), mask.tolist()):
        ts = [t for t, m in enumerate(row) if m]
        for t in ts:
            c = sum(lp[s] - lm[s] for s in ts if s != t)
            weight = math.exp(lp[t] - lm[t]) * (1 - math.exp(lp[t]))
            num, den = num + weight * max(0.0, 1 - math.exp(min(c, 0))), den + weight
            square, cross, n = (
                square + c * c,
                cross + c * sum(lo[s] - lm[s] for s in ts if s != t),
                n + 1,
            )
    return (
        num / den if den else 0.0,
        math.sqrt(square / n) if n else 0.0,
        cross / square if square > 1e-18 * n else None,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches())
def test_meter_is_its_definition(batch):
    out = meter(*batch)
    m, spread, share = reference(*batch)
    assert set(out) == KEYS and all(math.isfinite(v) for v in out.values())
    assert 0 <= out["validity/breakdown"] <= 1
    assert out["validity/breakdown"] == pytest.approx(m, **CLOSE)
    assert out["validity/spread"] == pytest.approx(spread, **CLOSE)
    if share is not None:
        assert out["validity/discrepancy"] == pytest.approx(share, rel=1e-6, abs=1e-9)
        assert out["validity/discrepancy"] + out["validity/staleness"] == pytest.approx(1)


@quick
@given(batches(), st.randoms(use_true_random=False))
def test_meter_ignores_padding_order_repetition_and_what_is_masked(batch, random):
    out = meter(*batch)

    def same(other):
        return all(other[k] == pytest.approx(v, **CLOSE) for k, v in out.items())

    B, T = batch[3].shape
    order = random.sample(range(B), B)
    assert same(meter(*(x[order] for x in batch)))
    assert same(meter(*(torch.cat([x, x]) for x in batch)))
    assert same(
        meter(
            *(
                torch.cat([x, torch.full((B, 3), fill)], 1)
                for x, fill in zip(batch, (math.nan, -math.inf, 7.0, False))
            )
        )
    )
    hidden = [torch.where(batch[3], x, math.nan) for x in batch[:3]]
    assert same(meter(*hidden, batch[3]))
    assert same(meter(*batch, weight=torch.full((B,), 0.1)))
    twice = meter(*batch, weight=torch.tensor([2.0] + [1.0] * (B - 1)))
    assert all(
        twice[k] == pytest.approx(v, **CLOSE)
        for k, v in meter(*(torch.cat([x, x[:1]]) for x in batch)).items()
    )


def test_meter_is_zero_where_the_surrogate_is_exact():
    logp = -torch.rand(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    out = meter(logp, logp, logp, mask)
    assert [out[k] for k in sorted(KEYS - {"validity/horizon"})] == [0.0] * 4 and out[
        "validity/horizon"
    ] == 1e9
    # a single token has no others, however far its own ratio is from one
    one = meter(logp[:, :1], logp[:, :1], logp[:, :1] - 3, mask[:, :1])
    assert one["validity/breakdown"] == 0 and one["validity/spread"] == 0
    empty = meter(logp, logp, logp - 1, torch.zeros(4, 5, dtype=torch.bool))
    assert empty["validity/breakdown"] == 0 and empty["validity/spread"] == 0
    assert (
        meter(*(torch.zeros(0, 5),) * 3, torch.zeros(0, 5, dtype=torch.bool))["validity/breakdown"]
        == 0
    )
    certain = meter(
        torch.zeros(4, 5), torch.zeros(4, 5), logp, mask
    )  # pi = 1 on every token: no gradient to get wrong
    assert certain["validity/breakdown"] == 0


def test_meter_is_one_where_pi_left_the_responses():
    logp_mu, mask = torch.full((8, 50), -0.1), torch.ones(8, 50)
    for gone in (-5.0, -1000.0, -math.inf):
        logp = torch.full((8, 50), gone)
        assert meter(logp, logp_mu, logp_mu, mask)["validity/breakdown"] == pytest.approx(
            1, abs=1e-12
        )


@quick
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(2, 4))
def test_meter_is_a_total_variation_distance(seed, shift, T):
    """pi uniform and one length: all scores have one size, and the meter is the mean over t of
    TV(pi, mu with token t from pi).
    """
    pi = make("tree", 3, T, end=None)
    uniform = pi(torch.zeros(pi.size, dtype=torch.float64))
    logp_mu = pi.listing.gather(noisy(pi.table(pi.init(seed)), shift, seed))
    q = sequence_logp(logp_mu)[:, None] + uniform - logp_mu
    tv = (uniform.sum(-1).exp()[:, None] - q.exp()).abs().sum(0).mean() / 2
    m = meter(
        uniform, uniform, logp_mu, pi.listing.response_mask, weight=sequence_logp(logp_mu).exp()
    )["validity/breakdown"]
    assert m == pytest.approx(float(tv), abs=1e-12)


def test_shares_name_the_culprit():
    g = torch.Generator().manual_seed(0)
    logp, mask = -torch.rand(16, 20, generator=g), torch.ones(16, 20)
    noise = 0.1 * torch.randn(16, 20, generator=g)

    def share(*x):
        return [meter(*x, mask)[f"validity/{k}"] for k in ("discrepancy", "staleness")]

    assert share(logp, logp, logp + noise) == pytest.approx([1, 0])
    assert share(logp, logp + noise, logp + noise) == pytest.approx([0, 1])
    assert share(logp, logp + noise, logp + 2 * noise) == pytest.approx([0.5, 0.5], rel=1e-4)
    assert share(logp, logp - 3 * noise, logp - noise) == pytest.approx(
        [-2, 3], rel=1e-4
    )  # the update undoes the engine's error


@pytest.mark.parametrize("T", [100, 2000])
def test_meter_of_independent_coins_and_its_horizon(T):
    q, g = 0.51, torch.Generator().manual_seed(T)
    logp_mu = torch.where(torch.rand(512, T, generator=g) < q, math.log(q), math.log(1 - q))
    logp = torch.full((512, T), math.log(0.5))
    out = meter(logp, logp, logp_mu, torch.ones(512, T))
    s = 0.02 * math.sqrt(T)
    # (1 - c)_+ lies in [0, 1]: its mean over 512 responses has a standard error below 0.5 /
    # sqrt(512) = 0.022; four of them
    assert out["validity/breakdown"] == pytest.approx(math.erf(s / math.sqrt(8)), abs=0.09)
    assert out["validity/spread"] == pytest.approx(s, rel=0.15)
    assert math.erf(0.02 * math.sqrt(out["validity/horizon"] / 8)) == pytest.approx(
        VALIDITY_LIMIT, abs=1e-3
    )


def test_sampled_meter_agrees_with_the_listed_one():
    pi = make("tree", 3, 6)
    old = pi.init(0)
    theta, logp_mu = old + 0.3 * pi.init(1), pi.listing.gather(noisy(pi.table(old), 0.3, 2))
    x = (pi(theta), pi(old), logp_mu, pi.listing.response_mask)
    listed = meter(*x, weight=sequence_logp(logp_mu).exp())
    rows = sample(logp_mu, 20_000, seed=3)
    drawn = meter(*(a[rows] for a in x))
    # standard errors of 20,000 responses: 0.5 / sqrt(20,000) = 0.0035, and a percent of the spread
    assert drawn["validity/breakdown"] == pytest.approx(listed["validity/breakdown"], abs=0.014)
    assert drawn["validity/spread"] == pytest.approx(listed["validity/spread"], rel=0.05)
    assert drawn["validity/discrepancy"] == pytest.approx(listed["validity/discrepancy"], abs=0.05)


def test_meter_orders_growing_shifts_as_the_true_error_does():
    pi = make("tree", 3, 5)
    old, R = pi.init(0), random_reward(pi.listing, 1)
    g = gradient(lambda p: expected_reward(pi, p, R), old)
    last = (0.0, 0.0)
    for scale in (0.01, 0.03, 0.1, 0.3, 1.0):
        logp, logp_mu = pi(old).detach(), pi.listing.gather(noisy(pi.table(old), scale, 2)).detach()
        m = meter(
            logp, logp, logp_mu, pi.listing.response_mask, weight=sequence_logp(logp_mu).exp()
        )["validity/breakdown"]
        error = relative_error(surrogate_gradient(pi, old, logp, logp_mu, R), g)
        assert m > last[0] and error > last[1]
        last = m, error


def test_large_batches_are_cut_into_parts_without_changing_the_result():
    g = torch.Generator().manual_seed(0)
    logp, noise = -torch.rand(7, 750_000, generator=g), 1e-4 * torch.randn(7, 750_000, generator=g)
    mask = torch.ones(7, 750_000, dtype=torch.bool)
    whole = meter(logp, logp, logp + noise, mask)  # 5.25 million tokens: two parts
    halves = [
        meter(logp[s], logp[s], (logp + noise)[s], mask[s]) for s in (slice(0, 5), slice(5, 7))
    ]
    square = sum(n * h["validity/spread"] ** 2 for n, h in zip((5, 2), halves)) / 7
    assert whole["validity/spread"] == pytest.approx(math.sqrt(square), rel=1e-9)
    low, high = sorted(h["validity/breakdown"] for h in halves)
    assert low - 1e-12 <= whole["validity/breakdown"] <= high + 1e-12


def test_gradients_do_not_flow_and_inputs_stay_as_they_are():
    logp = (-torch.rand(2, 3)).requires_grad_()
    before = logp.detach().clone()
    assert isinstance(meter(logp, logp, logp - 0.1, torch.ones(2, 3))["validity/breakdown"], float)
    assert logp.grad is None and torch.equal(logp.detach(), before)


def test_faults_are_named_and_nan_is_not_hidden():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"one shape \[B, T\]"):
        meter(x, x, x[:, :2], x)
    with pytest.raises(ValueError, match=r"weight \(3,\) must have shape \[2\]"):
        meter(x, x, x, x, weight=torch.ones(3))
    bad = -torch.rand(2, 3)
    bad[0, 1] = math.nan
    assert math.isnan(meter(bad, x - 1, x - 1, torch.ones(2, 3))["validity/breakdown"])


@quick
@given(batches(), st.sampled_from([2, 4, 6]))
def test_a_window_neglects_the_factors_around_a_token_only(batch, window):
    logp, logp_old, logp_mu, mask = batch
    out = validity(logp=logp, logp_old=logp_old, logp_mu=logp_mu, response_mask=mask, window=window)
    num = den = 0.0
    log_rho = torch.where(mask, logp - logp_mu, 0.0).tolist()
    for b, t in mask.nonzero().tolist():
        near = range(max(0, t - window // 2), min(mask.shape[1], t + window // 2 + 1))
        c = sum(log_rho[b][s] for s in near if s != t)
        weight = math.exp(log_rho[b][t]) * (1 - math.exp(float(logp[b, t])))
        num, den = num + weight * (1 - math.exp(min(c, 0))), den + weight
    assert out["validity/breakdown"] == pytest.approx(num / den if den else 0.0, **CLOSE)


def test_a_window_as_wide_as_the_responses_changes_nothing():
    g = torch.Generator().manual_seed(0)
    logp, noise = -torch.rand(5, 9, generator=g), 0.3 * torch.randn(5, 9, generator=g)
    batch = dict(logp=logp, logp_old=logp, logp_mu=logp + noise, response_mask=torch.ones(5, 9))
    assert validity(**batch, window=18) == {
        k: pytest.approx(v, **CLOSE) for k, v in validity(**batch).items()
    }
    for wrong in (0, 1, 3, -2):
        with pytest.raises(ValueError, match="even number"):
            validity(**batch, window=wrong)
