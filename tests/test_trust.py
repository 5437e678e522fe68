import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import PROPERTY, batches, make
from textbook_masks import (
    ctpo,
    ctpo_grown,
    dppo_kl,
    dppo_tv,
    gspo,
    minirl,
    opsm,
    trm_max,
    trm_mean,
)

from minirl_nb.clipping import Clip
from minirl_nb.trust import (
    CTPO_GROWN_REGION,
    CTPO_REGION,
    CTPO_REGIONS,
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


# ------------------------------------------------------------ against the papers' formulas
TEXTBOOK = {
    "minirl": (TrustRegion(), minirl),
    "gspo": (TrustRegion(3e-4, 4e-4, over="mean"), gspo),
    "dppo_tv": (DPPO_TV_REGION, dppo_tv),
    "dppo_kl": (DPPO_KL_REGION, dppo_kl),
    "trm_max": (TRM_MAX_REGION, trm_max),
    "trm_mean": (TRM_MEAN_REGION, trm_mean),
    "opsm": (OPSM_REGION, opsm),
    "ctpo": (CTPO_REGION, ctpo),
    "ctpo, grown": (CTPO_GROWN_REGION, ctpo_grown),
    "ctpo, both": (CTPO_REGIONS, lambda b: ctpo(b) | ctpo_grown(b)),
}


@pytest.mark.parametrize("name", TEXTBOOK)
@PROPERTY
@given(b=batches)
def test_the_settings_drop_what_their_papers_drop(name, b):
    region, textbook = TEXTBOOK[name]
    keep, high, low = region(**b.named())
    assert {tuple(x) for x in (~keep).nonzero().tolist()} == textbook(b)
    assert torch.equal(~keep, high | low) and not (~keep & ~b.response_mask).any()


@pytest.mark.parametrize("name", TEXTBOOK)
def test_every_setting_drops_some_and_keeps_some(name):
    "Or the comparison above would say nothing."
    region, shift = TEXTBOOK[name][0], 0.02 if name == "trm_mean" else 0.3
    found = [region(**make(s, shift=shift).named()) for s in range(30)]
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
    """Eq. 7 as it was computed before there were other regions: the same float operations in the
    same order.
    """
    b = b.to(dtype)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    mask, a = b.response_mask, b.advantage[:, None]
    log_r = torch.where(mask, b.logp.to(at_least_float32) - b.logp_old.to(at_least_float32), 0.0)
    if ratio == "sequence":
        log_r = (log_r.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(
            a * log_r
        )
    r, (low, high) = log_r.exp(), bounds
    above, below = (a > 0) & (r > 1 + high) & mask, (a < 0) & (r < 1 - low) & mask
    for got, want in zip(Clip(low, high, ratio)(**b.named()), (~(above | below), above, below)):
        assert torch.equal(got, want)
    assert Clip() == TrustRegion()


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
    logp, logp_mu = (x.clamp(max=-1e-3) for x in (b.logp, b.logp_mu))  # probabilities below one
    d = displacement(measure, logp=logp, anchor=logp_mu, mask=b.response_mask)
    up = torch.where(b.response_mask, logp - logp_mu, 0.0)
    # a divergence of a tiny log ratio may round to zero, never to the other sign
    assert ((d == 0) | (d.sign() == up.sign())).all() and (d[~b.response_mask] == 0).all()
    if measure != "k3":  # whose two sides differ in size
        back = displacement(measure, logp=logp_mu, anchor=logp, mask=b.response_mask)
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
