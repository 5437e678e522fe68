import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import PROPERTY, batches, make

from minirl_nb.clipping import Clip
from minirl_nb.trust import (
    CTPO_REGION,
    DPPO_KL_REGION,
    DPPO_TV_REGION,
    OPSM_REGION,
    TRM_MAX_REGION,
    TRM_MEAN_REGION,
    Measure,
    Together,
    TrustRegion,
    displacement,
)
from minirl_nb.weights import Geometric

MEASURES = Measure.__args__


# ------------------------------------------------------------ textbook forms
# Written from the papers' formulas in plain Python, one token at a time; they share no line with
# the package. A mask is a list of (response, token) that lose their gradient.
def tokens_of(b, i):
    return [t for t in range(b.logp.shape[1]) if b.response_mask[i, t]]


def probabilities(b, i, t):
    return tuple(math.exp(float(x[i, t])) for x in (b.logp, b.logp_old, b.logp_mu))


def one_by_one(b, drops):
    return {
        (i, t)
        for i in range(len(b.logp))
        for t in tokens_of(b, i)
        if drops(*probabilities(b, i, t), float(b.advantage[i]))
    }


def by_response(b, drops):
    gone = set()
    for i in range(len(b.logp)):
        y = tokens_of(b, i)
        if y and drops([probabilities(b, i, t) for t in y], float(b.advantage[i])):
            gone |= {(i, t) for t in y}
    return gone


def minirl(b):
    "2512.01374, Eq. 7."

    def drops(pi, old, mu, a):
        return a > 0 and pi / old > 1.27 or a < 0 and pi / old < 0.8

    return one_by_one(b, drops)


def gspo(b):
    "2507.18071: the geometric mean of pi/old outside [1 - 3e-4, 1 + 4e-4]."

    def drops(y, a):
        s = math.prod(pi / old for pi, old, _ in y) ** (1 / len(y))
        return a > 0 and s > 1 + 4e-4 or a < 0 and s < 1 - 3e-4

    return by_response(b, drops)


def dppo_tv(b):
    "2602.04879, binary total variation around the rollout policy."

    def drops(pi, old, mu, a):
        return a > 0 and pi - mu > 0.15 or a < 0 and mu - pi > 0.15

    return one_by_one(b, drops)


def dppo_kl(b):
    "2602.04879, binary KL divergence around the rollout policy."

    def drops(pi, old, mu, a):
        kl = mu * math.log(mu / pi)
        if mu < 1:
            kl += (1 - mu) * math.log((1 - mu) / (1 - pi)) if pi < 1 else math.inf
        return kl > 0.05 and (a > 0 and pi > mu or a < 0 and pi < mu)

    return one_by_one(b, drops)


def trm_max(b):
    "2512.23075, the largest (log rho)^2 / 2 of a response."
    return by_response(b, lambda y, a: max(math.log(p / m) ** 2 / 2 for p, _, m in y) > 0.05)


def trm_mean(b):
    "2512.23075, the mean of rho - 1 - log rho."

    def drops(y, a):
        return sum(p / m - 1 - math.log(p / m) for p, _, m in y) / len(y) > 1e-3

    return by_response(b, drops)


def opsm(b):
    "2512.02556: A < 0 and mean of log(mu/pi) above a bound."
    return by_response(
        b, lambda y, a: a < 0 and sum(math.log(m / p) for p, _, m in y) / len(y) > 0.1
    )


def ctpo(b):
    "2605.07331: the log of the product of pi/old up to t, against bounds that grow with sqrt(t)."
    gone = set()
    for i in range(len(b.logp)):
        product, a = 1.0, float(b.advantage[i])
        for k, t in enumerate(tokens_of(b, i), start=1):
            pi, old, _ = probabilities(b, i, t)
            product *= pi / old
            high, low = math.exp(0.05 * k**0.5), math.exp(-0.025 * k**0.5)
            if a > 0 and product > high or a < 0 and product < low:
                gone.add((i, t))
    return gone


TEXTBOOK = {
    "minirl": (TrustRegion(), minirl),
    "gspo": (TrustRegion(3e-4, 4e-4, over="mean"), gspo),
    "dppo_tv": (DPPO_TV_REGION, dppo_tv),
    "dppo_kl": (DPPO_KL_REGION, dppo_kl),
    "trm_max": (TRM_MAX_REGION, trm_max),
    "trm_mean": (TRM_MEAN_REGION, trm_mean),
    "opsm": (OPSM_REGION, opsm),
    "ctpo": (CTPO_REGION, ctpo),
}


def proper(b):
    "The same batch with log-probabilities of at most -1e-3, so that 1 - p is a number above zero."
    from dataclasses import replace

    names = ("logp", "logp_old", "logp_mu")
    return replace(b, **{name: getattr(b, name).clamp(max=-1e-3) for name in names})


@pytest.mark.parametrize("name", TEXTBOOK)
@PROPERTY
@given(b=batches)
def test_the_settings_drop_what_their_papers_drop(name, b):
    region, textbook = TEXTBOOK[name]
    b = proper(b)
    keep, high, low = region(**b.named())
    assert {tuple(x) for x in (~keep).nonzero().tolist()} == textbook(b)
    assert torch.equal(~keep, high | low) and not (~keep & ~b.response_mask).any()


@pytest.mark.parametrize("name", TEXTBOOK)
def test_every_setting_drops_some_and_keeps_some(name):
    "Or the comparison above would say nothing."
    region, shift = TEXTBOOK[name][0], 0.02 if name == "trm_mean" else 0.3
    found = [region(**proper(make(s, shift=shift)).named()) for s in range(30)]
    masks = [make(s, shift=shift).response_mask for s in range(30)]
    share = sum(float((~k & m).sum()) for (k, *_), m in zip(found, masks)) / sum(
        float(m.sum()) for m in masks
    )
    assert 0.02 < share < 0.98


@PROPERTY
@given(
    batches,
    st.sampled_from(["token", "sequence"]),
    st.sampled_from([(0.2, 0.27), (0.0, 0.0), (3e-4, 4e-4), (0.1, math.inf)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_minirls_clip_is_a_setting_to_the_bit(b, ratio, bounds, dtype):
    b = b.to(dtype)
    region = TrustRegion(*bounds, over="token" if ratio == "token" else "mean")
    for got, want in zip(region(**b.named()), Clip(*bounds, ratio)(**b.clip())):
        assert torch.equal(got, want)


@PROPERTY
@given(batches)
def test_the_geometric_truncation_rejects_the_same_responses(b):
    region = TrustRegion(0.1, 0.1, anchor="mu", over="mean", side="any")
    log_w = torch.where(b.response_mask, b.logp - b.logp_mu, 0.0)
    _, dropped = Geometric(0.9, 1.1)(log_w, mask=b.response_mask)
    assert torch.equal(~region(**b.named())[0], dropped)


# ------------------------------------------------------------ the measures
@PROPERTY
@given(batches, st.sampled_from(MEASURES))
def test_measures_are_signed_divergences(b, measure):
    b = proper(b)
    pair = dict(logp=b.logp, anchor=b.logp_mu, mask=b.response_mask)
    d = displacement(measure, **pair)
    up = torch.where(b.response_mask, b.logp - b.logp_mu, 0.0)
    # a divergence of a tiny log ratio may round to zero, never to the other sign
    assert ((d == 0) | (d.sign() == up.sign())).all() and (d[~b.response_mask] == 0).all()
    if measure != "k3":  # whose two sides differ in size
        back = displacement(measure, logp=b.logp_mu, anchor=b.logp, mask=b.response_mask)
        assert torch.equal(back.sign(), -d.sign())


@PROPERTY
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_two_outcomes_bound_the_whole_vocabulary_from_below(seed, V):
    g = torch.Generator().manual_seed(seed)
    log_p, log_q = (
        torch.randn(5, V, dtype=torch.float64, generator=g).log_softmax(-1) for _ in range(2)
    )
    pair = dict(logp=log_p, anchor=log_q, mask=torch.ones(5, V, dtype=torch.bool))
    tv = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    for measure, exact in (("tv", tv), ("kl", kl)):
        binary = displacement(measure, **pair).abs()
        assert (binary <= exact[:, None] + 1e-14).all()
        if V == 2:
            torch.testing.assert_close(binary, exact[:, None].expand(5, 2), rtol=1e-9, atol=1e-14)
    # k3 is an unbiased estimate of the KL divergence; signs are taken off first
    k3 = displacement("k3", **pair).abs()
    torch.testing.assert_close((log_q.exp() * k3).sum(-1), kl, rtol=1e-12, atol=1e-14)


def test_certain_tokens_have_a_finite_divergence():
    "A float32 log-probability of zero is a rounded one: it must not drop its token for good."

    def kl(p, q):
        one = torch.tensor([[True]])
        pair = dict(logp=torch.tensor([[p]]), anchor=torch.tensor([[q]]))
        return float(displacement("kl", **pair, mask=one))

    assert kl(0.0, 0.0) == 0 and 0 < kl(0.0, -1e-4) < 2e-3
    assert kl(-math.inf, -1.0) == -math.inf  # cannot be sampled any more
    assert kl(-50.0, -1e-9) < -49


# ------------------------------------------------------------ padding, order, types, NaN
REGIONS = [
    *(region for region, _ in TEXTBOOK.values()),
    Together((TrustRegion(), DPPO_TV_REGION, TRM_MEAN_REGION)),
]


@PROPERTY
@given(batches, st.sampled_from(REGIONS), st.sampled_from([math.nan, math.inf, 5.0]))
def test_padding_and_order_change_nothing(b, region, junk):
    keep, high, low = region(**b.named())
    w_keep, w_high, w_low = region(**b.padded(2, junk).named())
    T = b.logp.shape[1]
    assert torch.equal(w_keep[:, :T], keep) and w_keep[:, T:].all()
    assert not (w_high | w_low)[:, T:].any()
    order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(1))
    assert torch.equal(region(**b.rows(order).named())[0], keep[order])


@PROPERTY
@given(batches, st.sampled_from(REGIONS))
def test_nothing_is_dropped_where_nothing_has_moved(b, region):
    assert region(**b.named(logp=b.logp_mu, logp_old=b.logp_mu))[0].all()


@PROPERTY
@given(batches, st.sampled_from(["old", "mu"]), st.sampled_from(MEASURES))
def test_the_anchor_is_the_policy_that_is_named(b, anchor, measure):
    other = {"old": "mu", "mu": "old"}[anchor]
    region = TrustRegion(0.01, 0.01, measure=measure, anchor=anchor)
    batch = b.named()
    alone = {k: v for k, v in batch.items() if k != f"logp_{other}"}
    assert torch.equal(region(**alone)[0], region(**batch)[0])
    swapped = batch | dict(logp_old=b.logp_mu, logp_mu=b.logp_old)
    twin = TrustRegion(0.01, 0.01, measure=measure, anchor=other)
    assert torch.equal(twin(**swapped)[0], region(**batch)[0])
    with pytest.raises(ValueError, match=f"needs logp_{anchor}"):
        region(**{k: v for k, v in batch.items() if k != f"logp_{anchor}"})


@PROPERTY
@given(batches, st.sampled_from(["tv", "kl", "k2", "k3", "ratio", "log_ratio"]))
def test_sides(b, measure):
    "`any` is the union of both advantages' `towards`; `negative` is `any` where A < 0."

    def keep(side, advantage):
        region = TrustRegion(0.05, 0.05, measure=measure, anchor="mu", side=side)
        return region(**b.named(advantage=advantage))[0]

    one = torch.ones_like(b.advantage)
    both = keep("towards", one) & keep("towards", -one)
    assert torch.equal(keep("any", b.advantage), both)
    negative = (b.advantage < 0)[:, None]
    assert torch.equal(keep("negative", b.advantage), both | ~negative)


@PROPERTY
@given(batches)
def test_together_keeps_what_all_keep(b):
    regions = (TrustRegion(), DPPO_TV_REGION, OPSM_REGION)
    keep, high, low = Together(regions)(**b.named())
    alone = [region(**b.named()) for region in regions]
    assert torch.equal(keep, alone[0][0] & alone[1][0] & alone[2][0])
    assert torch.equal(keep, ~(high | low))


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("name", ["logp", "logp_old", "logp_mu"])
def test_a_nan_drops_nothing(region, name):
    "It has to reach the loss through the weight of a token that is kept."
    b = make(6, shift=3.0)
    b.advantage[:] = -1.0
    row, column = b.response_mask.nonzero()[0]
    getattr(b, name)[row, column] = math.nan
    keep, _, _ = region(**b.named())
    anchors = {r.anchor for r in getattr(region, "regions", (region,))}
    uses = name == "logp" or name[5:] in anchors
    if uses and not isinstance(region, Together):
        assert keep[row, column]


def test_empty_batches():
    for B, T in ((0, 3), (2, 0), (0, 0)):
        x, mask = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.bool)
        for region in REGIONS:
            keep, _, _ = region(
                logp=x, logp_old=x, logp_mu=x, advantage=torch.zeros(B), response_mask=mask
            )
            assert keep.shape == (B, T) and keep.all()


# ------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    "setting, words",
    [
        (dict(low=1.0), "low must lie in"),
        (dict(low=-0.1, measure="tv"), "none may be negative"),
        (dict(high=math.nan), "none may be negative"),
        (dict(measure="js"), "measure 'js'"),
        (dict(anchor="ref"), "anchor 'ref'"),
        (dict(over="words"), "over 'words'"),
        (dict(side="up"), "side 'up'"),
        (dict(measure="tv", over="prefix"), "takes ratio or log_ratio, not 'tv'"),
        (dict(growth=0.5), "growth = 0.5"),
        (dict(measure="kl", over="mean"), "the mean of kl"),
        (dict(over="max"), "the max of ratio"),
    ],
)
def test_what_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        TrustRegion(**setting)


def test_shapes_and_measures_are_checked():
    b = make(0)
    with pytest.raises(ValueError, match=r"\(5,\).*\[6\]"):
        TrustRegion()(**b.named(advantage=b.advantage[:5]))
    with pytest.raises(ValueError, match="one shape"):
        TrustRegion()(**b.named(logp_old=b.logp_old[:, :-1]))
    with pytest.raises(ValueError, match="measure 'js'"):
        displacement("js", logp=b.logp, anchor=b.logp_mu, mask=b.response_mask)
    assert TrustRegion(low=3.0, measure="log_ratio").low == 3.0  # a log has no such limit
