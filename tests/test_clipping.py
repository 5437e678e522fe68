import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_batches import PROPERTY, batches, make

from minirl_nb.clipping import Clip

ONE = torch.ones(1, 1, dtype=torch.bool)


def cell(ratio, advantage, clip=None):
    log_r = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    keep, high, low = (clip or Clip())(
        logp=log_r,
        logp_old=torch.zeros_like(log_r),
        advantage=torch.tensor([advantage], dtype=torch.float64),
        response_mask=ONE,
    )
    return bool(keep), bool(high), bool(low)


@pytest.mark.parametrize(
    "ratio, advantage, keep",
    [
        (1.28, 1, False),
        (1.26, 1, True),
        (0.5, 1, True),
        (0.79, -1, False),
        (0.81, -1, True),
        (3.0, -1, True),
        (1.0, 1, True),
        (9.0, 0, True),
        (0.1, 0, True),
    ],
)
def test_the_cells_of_eq7(ratio, advantage, keep):
    assert cell(ratio, float(advantage)) == (
        keep,
        not keep and advantage > 0,
        not keep and advantage < 0,
    )


@PROPERTY
@given(batches)
def test_kept_tokens_are_those_where_ppo_has_a_gradient(b):
    """Autograd of min(r A, clip(r) A), written here as in PPO's paper, is nonzero exactly where
    M_t = 1 and A is not 0.
    """
    logp = b.logp.clone().requires_grad_()
    r, a = (logp - b.logp_old).exp(), b.advantage[:, None]
    torch.minimum(r * a, r.clamp(0.8, 1.27) * a)[b.response_mask].sum().backward()
    keep, high, low = Clip(0.2, 0.27)(**b.clip())
    assert torch.equal((logp.grad != 0)[b.response_mask], (keep & (a != 0))[b.response_mask])
    assert (
        torch.equal(keep, ~(high | low))
        and not (high & low).any()
        and not ((high | low) & ~b.response_mask).any()
    )


@PROPERTY
@given(batches, st.sampled_from(["token", "sequence"]), st.sampled_from([math.nan, math.inf, 5.0]))
def test_padding_and_order_change_nothing(b, ratio, junk):
    clip, padded = Clip(0.2, 0.27, ratio), b.padded(2, junk)
    keep, high, low = clip(**b.clip())
    w_keep, w_high, w_low = clip(**padded.clip())
    T = b.logp.shape[1]
    assert (
        torch.equal(w_keep[:, :T], keep)
        and w_keep[:, T:].all()
        and not (w_high | w_low)[:, T:].any()
    )
    order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(1))
    s = b.rows(order)
    assert torch.equal(clip(**s.clip())[0], keep[order])


@PROPERTY
@given(batches)
def test_the_first_update_clips_nothing(b):
    assert Clip(0.0, 0.0)(**b.clip(logp=b.logp_old))[0].all()


def test_the_sequence_ratio_is_the_geometric_mean():
    logp, old, m = (
        torch.tensor([[1.0, -0.4, 9.0]]),
        torch.zeros(1, 3),
        torch.tensor([[True, True, False]]),
    )

    def keep(high):
        return Clip(0.2, high, "sequence")(
            logp=logp, logp_old=old, advantage=torch.ones(1), response_mask=m
        )[0].tolist()

    assert keep(math.exp(0.3) - 1 - 1e-3) == [[False, False, True]] and keep(
        math.exp(0.3) - 1 + 1e-3
    ) == [[True] * 3]


def test_what_is_refused():
    b = make(0)
    for low, high in ((1.0, 0.2), (-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2)):
        with pytest.raises(ValueError, match="low must lie in"):
            Clip(low, high)
    with pytest.raises(ValueError, match="'words'"):
        Clip(ratio="words")
    with pytest.raises(ValueError, match=r"\(5,\).*\[6\]"):
        Clip()(**b.clip(advantage=b.advantage[:5]))
    with pytest.raises(ValueError, match="one shape"):
        Clip()(**b.clip(logp_old=b.logp_old[:, :-1]))
