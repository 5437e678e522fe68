import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import PROPERTY, batches, make

from minirl_nb.weights import (
    MIS,
    TIS,
    WEIGHTS,
    Clamp,
    Gamma,
    Geometric,
    IcePop,
    diagnostics,
    log_factors,
    log_ratio,
    log_weight,
    ratio_stats,
    sequence_mean,
    truncation,
)

EPS = torch.finfo(torch.float64).eps
ALL = [TIS(5.0), MIS(2.0), IcePop(0.5, 5.0), Clamp(0.8, 1.27), Geometric(0.9, 1.1)]


# ------------------------------------------------------------ ratios
@PROPERTY
@given(batches)
def test_eq5_factorises(b):
    def weight(kind):
        return log_weight(kind, **b.policies())

    # three subtractions of numbers below 20 in size: a few units of rounding of 20
    torch.testing.assert_close(
        weight("pi/mu"), weight("old/mu") + weight("pi/old"), rtol=0, atol=100 * EPS
    )
    torch.testing.assert_close(
        weight("sequence")[:, 0], weight("pi/mu").sum(-1), rtol=0, atol=100 * EPS
    )
    # the product up to the last token is that of the whole response
    torch.testing.assert_close(
        weight("prefix")[:, -1], weight("sequence")[:, -1], rtol=0, atol=100 * EPS
    )
    torch.testing.assert_close(
        weight("geometric"), sequence_mean(weight("pi/old"), mask=b.response_mask)
    )


@PROPERTY
@given(batches, st.sampled_from(WEIGHTS))
def test_factors_add_up_to_the_weight(b, kind):
    d, s = log_factors(kind, **b.policies())
    torch.testing.assert_close(d + s, log_weight(kind, **b.policies()), rtol=0, atol=200 * EPS)
    # an equal pair of engines leaves the staleness alone, an equal pair of weights the discrepancy
    assert torch.equal(log_factors(kind, **b.policies(logp_old=b.logp_mu))[0], torch.zeros_like(d))
    assert torch.equal(log_factors(kind, **b.policies(logp=b.logp_old))[1], torch.zeros_like(d))


@PROPERTY
@given(batches, st.sampled_from(WEIGHTS), st.sampled_from([math.nan, math.inf, -math.inf, 3.0]))
def test_padding_never_enters(b, kind, junk):
    T, padded = b.logp.shape[1], b.padded(3, junk)
    a = log_weight(kind, **b.policies())
    p = log_weight(kind, **padded.policies())
    torch.testing.assert_close(p[:, :T][b.response_mask], a[b.response_mask])
    for cut in ALL:
        for x, y in zip(cut(a, mask=b.response_mask), cut(p, mask=padded.response_mask)):
            torch.testing.assert_close(y[:, :T][b.response_mask], x[b.response_mask])
        assert not cut(p, mask=padded.response_mask)[1][~padded.response_mask].any()


def test_log_ratio_is_at_least_float32_and_carries_its_gradient():
    a, b, m = (
        torch.tensor([[-1.0, -2.0]]),
        torch.tensor([[-1.5, math.nan]]),
        torch.tensor([[True, False]]),
    )
    assert log_ratio(numerator=a, denominator=b, mask=m).tolist() == [[0.5, 0.0]]
    assert (
        log_ratio(numerator=a.bfloat16(), denominator=b.bfloat16(), mask=m).dtype == torch.float32
    )
    assert log_ratio(numerator=a.bfloat16(), denominator=b.double(), mask=m).dtype == torch.float64
    # -10.0625 and -9.9375 are bfloat16 numbers; their difference must not be rounded to bfloat16
    # before exp
    lo, hi = torch.tensor([[-10.0625]]).bfloat16(), torch.tensor([[-9.9375]]).bfloat16()
    ratio = log_ratio(numerator=hi, denominator=lo, mask=torch.tensor([[True]])).exp()
    assert float(ratio) == pytest.approx(math.exp(0.125), rel=1e-6)  # float32: 8 roundings of 1e-7
    x = a.clone().requires_grad_()
    log_ratio(numerator=x, denominator=b, mask=m).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]


@PROPERTY
@given(batches)
def test_the_prefix_weight_is_the_product_up_to_the_token(b):
    got = log_weight("prefix", **b.policies())
    for i, row in enumerate(b.response_mask.tolist()):
        product = 1.0
        for t, counts in enumerate(row):
            if counts:
                product *= math.exp(float(b.logp[i, t])) / math.exp(float(b.logp_mu[i, t]))
                assert float(got[i, t].exp()) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_carry_no_gradient(kind):
    b = make(0)
    assert not log_weight(kind, **b.policies(logp=b.logp.requires_grad_())).requires_grad


def test_what_is_refused():
    b = make(0)
    with pytest.raises(ValueError, match=r"\(6, 7\).*\(6, 6\)"):
        log_ratio(numerator=b.logp, denominator=b.logp_old[:, :-1], mask=b.response_mask)
    with pytest.raises(ValueError, match="'pi/nu'.*pi/mu"):
        log_weight("pi/nu", **b.policies())
    for wrong in (
        lambda: TIS(0.0),
        lambda: TIS(-1.0),
        lambda: TIS(math.nan),
        lambda: IcePop(2.0, 1.0),
        lambda: Clamp(-0.1, 1.0),
    ):
        with pytest.raises(ValueError, match="0 <= low < high"):
            wrong()
    for spec, message in (
        ("tos:5", "unknown"),
        ("tis:five", "numbers"),
        ("tis:1,2", "takes 1"),
        ("icepop:0.5", "takes 2"),
        ("none:1", "unknown"),
        ("tis:0", "low < high"),
        ("tis:5,", "numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            truncation(spec)


# ------------------------------------------------------------ truncations
def test_truncations_on_literal_weights():
    w, m = (
        torch.tensor([[0.25, 0.5, 1.0, 2.0, 5.0, 8.0]], dtype=torch.float64),
        torch.ones(1, 6, dtype=torch.bool),
    )
    expected = {
        TIS(5.0): [0.25, 0.5, 1, 2, 5, 5],
        MIS(2.0): [0.25, 0.5, 1, 2, 0, 0],
        IcePop(0.5, 5.0): [0, 0.5, 1, 2, 5, 0],
        Clamp(0.8, 1.27): [0.8, 0.8, 1, 1.27, 1.27, 1.27],
    }
    for cut, values in expected.items():
        got, changed = cut(w.log(), mask=m)
        torch.testing.assert_close(
            got, torch.tensor([values], dtype=torch.float64), rtol=8 * EPS, atol=0
        )
        # exp(log 5) may lie a rounding above 5: a weight exactly on a bound has either flag, and
        # the same value
        off = ~torch.isin(w, torch.tensor([0.5, 2.0, 5.0], dtype=torch.float64))
        torch.testing.assert_close(changed[off], (got != w)[off] & ((got - w).abs() > 1e-9)[off])
    kept, changed = Geometric(0.9, 1.1)(
        torch.tensor([[2.0, 0.5, 7.0], [2.0, 2.0, 7.0]]).log(),
        mask=torch.tensor([[True, True, False]] * 2),
    )
    torch.testing.assert_close(kept[:, :2], torch.tensor([[2.0, 0.5], [0.0, 0.0]]))
    assert changed.tolist() == [[False] * 3, [True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cap_is_exact_and_overflow_is_capped(dtype):
    log_w, m = (
        torch.tensor([[math.log(5.0) + 0.01, 20.0, 1e4, math.inf, -1e4, -math.inf]], dtype=dtype),
        torch.ones(1, 6).bool(),
    )
    assert TIS(5.0)(log_w, mask=m)[0].tolist() == [[5.0, 5.0, 5.0, 5.0, 0.0, 0.0]]
    assert MIS(5.0)(log_w, mask=m)[0].tolist() == [[0.0] * 6]
    assert IcePop(0.5, 5.0)(log_w, mask=m)[1].all() and Clamp(0.5, 5.0)(log_w, mask=m)[1].all()


@pytest.mark.parametrize("cut", ALL, ids=lambda c: type(c).__name__)
def test_nan_is_never_hidden(cut):
    assert cut(torch.full((1, 2), math.nan), mask=torch.ones(1, 2).bool())[0].isnan().all()


@PROPERTY
@given(batches, st.floats(0.5, 4.0), st.floats(0.1, 4.0))
def test_the_gamma_kernel_is_its_formula(b, c1, c2):
    "2602.10693, Eq. 20, a token at a time; what overflows must fade."
    log_w = log_weight("sequence", **b.policies())
    cut = Gamma(c1, c2, c1 + 1, c2 / 2)
    got, smaller = cut(log_w, mask=b.response_mask, advantage=b.advantage)
    for i, t in b.response_mask.nonzero().tolist():
        x = float(log_w[i, t])
        power, rate = (c1 + 1, c2 / 2) if b.advantage[i] < 0 else (c1, c2)
        want = math.exp(power * x + rate * (1 - math.exp(x))) if x < 300 else 0.0
        # the exponent is a difference of numbers up to 1e4 times larger than itself
        assert float(got[i, t]) == pytest.approx(want, rel=1e-11, abs=1e-300)
        assert bool(smaller[i, t]) == (float(got[i, t]) < math.exp(min(x, 700)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gamma_kernel_far_out(dtype):
    log_w = torch.tensor([[1e4, math.inf, -1e5, -math.inf, 0.0, math.nan]], dtype=dtype)
    mask = torch.ones(1, 6, dtype=torch.bool)
    for a in (1.0, -1.0):
        got, _ = Gamma()(log_w, mask=mask, advantage=torch.tensor([a]))
        assert got.dtype == dtype and got[0, :5].tolist() == [0, 0, 0, 0, 1] and got[0, 5].isnan()
        none, _ = Gamma(0, 0, 0, 0)(log_w, mask=mask, advantage=torch.tensor([a]))
        assert none[0, :5].tolist() == [1] * 5 and none[0, 5].isnan()
    with pytest.raises(ValueError, match="needs the advantage"):
        Gamma()(log_w, mask=mask)
    with pytest.raises(ValueError, match="must be finite"):
        Gamma(c2=-1.0)


@pytest.mark.parametrize(
    "cut",
    [
        TIS(math.inf),
        MIS(math.inf),
        IcePop(0.0, math.inf),
        Clamp(0.0, math.inf),
        Geometric(0.0, math.inf),
    ],
    ids=lambda c: type(c).__name__,
)
@PROPERTY
@given(b=batches)
def test_a_truncation_with_its_knob_at_infinity_is_none(cut, b):
    log_w = log_weight("pi/mu", **b.policies())
    w, changed = cut(log_w, mask=b.response_mask)
    assert torch.equal(w, log_w.exp()) and not changed.any()


def test_short_forms():
    assert truncation("none") is None
    assert truncation("tis:5") == truncation("tis") == TIS(5.0)
    assert truncation("icepop:0.5,5") == IcePop(0.5, 5.0) and truncation(
        "geometric:0.9,1.1"
    ) == Geometric(0.9, 1.1)
    assert truncation("gamma") == truncation("gamma:2,3,3,2") == Gamma()


# ------------------------------------------------------------ diagnostics
@PROPERTY
@given(batches, st.sampled_from([1.5, 2.0, 10.0]))
def test_ratio_stats_are_their_definitions(b, tau):
    log_r = log_ratio(numerator=b.logp, denominator=b.logp_mu, mask=b.response_mask)
    if not b.response_mask.any():
        return
    x = log_r[b.response_mask]
    r, s = x.exp(), ratio_stats(log_r, mask=b.response_mask, taus=(tau,))
    want = {
        "k1": -x.mean(),
        "k3": (r - 1 - x).mean(),
        "chi2": (r * r).mean() - 1,
        "ess": r.sum() ** 2 / (len(r) * (r * r).sum()),
        "abs": x.abs().mean(),
        "min": r.min(),
        "max": r.max(),
        f"f_{tau:g}": (torch.maximum(r, 1 / r) > tau).double().mean(),
    }
    for k, v in want.items():
        assert s[k] == pytest.approx(float(v), rel=1e-9, abs=1e-13), k
    assert (
        s["k3"] >= 0 and 0 < s["ess"] <= 1 + 1e-12 and s["min"] <= s["q01"] <= s["q99"] <= s["max"]
    )
    order = torch.randperm(len(b.logp), generator=torch.Generator().manual_seed(0))
    for k, v in ratio_stats(log_r[order], mask=b.response_mask[order], taus=(tau,)).items():
        assert v == pytest.approx(s[k], rel=1e-9, abs=1e-13), k


@pytest.mark.parametrize("seed", range(5))
def test_ratio_stats_are_their_definitions_to_the_bit(seed):
    "On one block of tokens the sums are those of the formulas, rounded in the same way."
    b = make(seed)
    log_r = log_ratio(numerator=b.logp, denominator=b.logp_mu, mask=b.response_mask)
    x = log_r[b.response_mask].double()
    r, scaled, n = x.exp(), (x - x.max()).exp(), x.numel()
    expected = {
        "k1": (-x).sum() / n,
        "k3": (torch.expm1(x) - x).sum() / n,
        "chi2": (r * r).sum() / n - 1,
        "ess": (scaled.sum() / n) ** 2 / ((scaled * scaled).sum() / n),
        "abs": x.abs().sum() / n,
        "f_2": (x.abs() > math.log(2)).double().sum() / n,
        "min": x.min().exp(),
        "max": x.max().exp(),
        "q01": x.sort().values[max(math.ceil(0.01 * n), 1) - 1].exp(),
        "q99": x.sort().values[math.ceil(0.99 * n) - 1].exp(),
    }
    assert ratio_stats(log_r, b.response_mask) == {k: float(v) for k, v in expected.items()}


def test_ratio_stats_on_a_batch_that_is_its_distribution():
    "Tokens a, a, b, c are exactly q = (1/2, 1/4, 1/4): the batch means are the expectations."
    q, p = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    r = torch.tensor([[p[i] / q[i] for i in (0, 0, 1, 2)]], dtype=torch.float64)
    s = ratio_stats(r.log(), mask=torch.ones(1, 4).bool())
    kl = sum(x * math.log(x / y) for x, y in zip(q, p))
    assert s["k1"] == pytest.approx(kl) and s["k3"] == pytest.approx(kl)
    assert s["chi2"] == pytest.approx(sum(y * y / x for x, y in zip(q, p)) - 1) and s[
        "ess"
    ] == pytest.approx(1 / (1 + s["chi2"]))
    assert (
        s["f_2"] == 0.0
        and ratio_stats(r.log() * 1.001, mask=torch.ones(1, 4).bool())["f_2"] == 0.75
    )


def test_quantiles_are_order_statistics():
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    s = ratio_stats(
        (order.double() + 1).log()[None], mask=torch.ones(1, 1000).bool()
    )  # the ratios 1 .. 1000
    assert [round(s[k], 6) for k in ("min", "q01", "q99", "max")] == [1, 10, 990, 1000]
    one = ratio_stats(torch.tensor([[0.5]]), mask=torch.ones(1, 1).bool())
    assert one["q01"] == one["q99"] == one["min"] == one["max"]


def test_ratio_stats_at_extreme_ratios_and_without_tokens():
    n = 1000
    log_r = torch.zeros(1, n)
    log_r[0, 0] = math.log(1e6)
    s = ratio_stats(log_r, mask=torch.ones(1, n).bool())
    assert s["max"] == pytest.approx(1e6, rel=1e-6) and s["q99"] == 1.0
    assert s["ess"] == pytest.approx((1e6 + n - 1) ** 2 / (n * (1e12 + n - 1)), rel=1e-5)
    assert s["k3"] == pytest.approx((1e6 - 1 - math.log(1e6)) / n, rel=1e-5)
    huge = ratio_stats(
        torch.tensor([[800.0, 0.0]]), mask=torch.ones(1, 2).bool()
    )  # e^1600 is beyond float64, its ESS is not
    assert huge["ess"] == pytest.approx(0.5) and huge["chi2"] == math.inf
    empty = ratio_stats(torch.full((2, 3), math.nan), mask=torch.zeros(2, 3).bool())
    assert (
        empty["k1"] == empty["k3"] == empty["chi2"] == empty["f_2"] == 0.0
        and empty["ess"] == empty["min"] == empty["q99"] == 1.0
    )
    assert math.isnan(
        ratio_stats(torch.tensor([[math.nan, 0.0]]), mask=torch.ones(1, 2).bool())["k1"]
    )


def test_ratio_stats_beyond_the_limit_of_torch_quantile():
    n = (1 << 24) + 3  # also more than one block of the sums
    log_r = 0.01 * torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    s = ratio_stats(log_r, mask=torch.ones(1, n, dtype=torch.bool))
    # standard error of k1 2.4e-6, of the 1% quantile of log r 0.01 * sqrt(.01*.99/n)/0.0267 =
    # 9e-6; five of each
    assert s["k1"] == pytest.approx(0, abs=1.3e-5) and math.log(s["q01"]) == pytest.approx(
        -0.0232635, abs=5e-5
    )
    assert s["k3"] == pytest.approx(5e-5, rel=1e-2)


def test_float32_diagnostics_equal_float64_ones():
    b = make(3, B=64, T=32, shift=1.0)
    lo = b.to(torch.float32)
    # log-probabilities of size 3 are rounded by 2e-7, so ratios by that relative amount; means of
    # few percent-sized terms likewise
    for k, v in diagnostics(**b.policies()).items():
        assert diagnostics(**lo.policies())[k] == pytest.approx(v, rel=3e-6, abs=3e-7), k


def test_diagnostics_name_the_factors():
    b = make(1, B=16, T=16)
    d = diagnostics(**b.policies())
    assert {k.split("/")[0] for k in d} == {"discrepancy", "staleness", "weight", "response"}
    assert d["weight/k1"] == pytest.approx(d["discrepancy/k1"] + d["staleness/k1"])
    assert d["discrepancy/k1"] == pytest.approx(
        float((b.logp_mu - b.logp_old)[b.response_mask].mean())
    )


@PROPERTY
@given(batches)
def test_chi2_and_ess_of_whole_responses(b):
    "One weight a response, which is the product of its tokens'; a response without tokens has none."
    W = [
        math.exp(sum(float(x) for x in (b.logp - b.logp_mu)[i][row]))
        for i, row in enumerate(b.response_mask)
        if row.any()
    ]
    d, n = diagnostics(**b.policies()), len(W)
    square = sum(w * w for w in W)
    assert d["response/chi2"] == pytest.approx(square / n - 1, rel=1e-9, abs=1e-12)
    assert d["response/ess"] == pytest.approx(sum(W) ** 2 / (n * square), rel=1e-9)


def test_whole_responses_of_a_long_batch():
    "The product of 4,000 ratios overflows; the effective sample size must not."
    logp_mu = torch.full((3, 4000), -2.0)
    logp = logp_mu + torch.tensor([[0.3], [0.29], [-0.3]])
    d = diagnostics(
        logp=logp, logp_old=logp, logp_mu=logp_mu, response_mask=torch.ones(3, 4000).bool()
    )
    assert d["response/chi2"] == math.inf
    # float32 log ratios of 0.3 are off by 1e-7, 4,000 times
    assert d["response/ess"] == pytest.approx(1 / 3, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_on_an_accelerator():
    b = make(2, B=32, T=32)
    here = b.to(torch.float32)
    on_gpu = here.map(lambda x: x.cuda())
    for kind in WEIGHTS:
        for cut in ALL:
            cpu, gpu = (
                cut(log_weight(kind, **x.policies()), mask=x.response_mask)[0]
                for x in (here, on_gpu)
            )
            torch.testing.assert_close(gpu.cpu(), cpu)
    cpu, gpu = diagnostics(**here.policies()), diagnostics(**on_gpu.policies())
    assert gpu == {k: pytest.approx(v, rel=1e-5, abs=1e-7) for k, v in cpu.items()}
