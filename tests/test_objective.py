import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import PROPERTY, batches, make
from textbook_masks import dppo_kl, dppo_tv, one_by_one, opsm, trm_max

from minirl_nb.clipping import Clip
from minirl_nb.exact import (
    AttentionPolicy,
    TablePolicy,
    expectation,
    expected_reward,
    expected_step,
    gradient,
    list_responses,
    noisy,
    random_reward,
)
from minirl_nb.objective import (
    CISPO,
    DPPO_KL,
    DPPO_TV,
    GRPO,
    GSPO,
    MINIRL,
    MINIRL_LENGTH_NORM,
    MINIRL_NO_IS,
    OPSM,
    PRESETS,
    REINFORCE,
    TRM,
    VESPO,
    Objective,
    equal_groups,
    group_advantage,
)
from minirl_nb.trust import CTPO_REGIONS, TRM_MEAN_REGION
from minirl_nb.weights import MIS, TIS, Clamp, Gamma, Geometric, IcePop

EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**31)


def loss_and_grad(objective, b, count=None):
    logp = b.logp.clone().requires_grad_()
    loss = objective.loss(**b.named(logp=logp), count=count)
    loss.backward()
    return loss.detach(), logp.grad


# ------------------------------------------------------------ textbook forms
# Written from the papers' formulas, in loops and with autograd's own min and clip; they share no
# line with the package.
def tokens_of(b, i):
    return [t for t in range(b.logp.shape[1]) if b.response_mask[i, t]]


def eq7(b, logp):
    total = 0.0
    for i in range(len(logp)):
        for t in tokens_of(b, i):
            a, r = float(b.advantage[i]), math.exp(b.logp[i, t] - b.logp_old[i, t])
            keep = not (a > 0 and r > 1.27 or a < 0 and r < 0.8)
            total = (
                total + keep * min(math.exp(b.logp[i, t] - b.logp_mu[i, t]), 5.0) * a * logp[i, t]
            )
    return total / len(logp)


def ppo_min(r, a, low, high):
    return torch.minimum(r * a, torch.clamp(r, 1 - low, 1 + high) * a)


def grpo(b, logp):
    total = 0.0
    for i in range(len(logp)):
        y = tokens_of(b, i)
        for t in y:
            total = total + ppo_min(
                (logp[i, t] - b.logp_old[i, t]).exp(), b.advantage[i], 0.2, 0.27
            ) / len(y)
    return total / len(logp)


def cispo(b, logp):
    total = 0.0
    for i in range(len(logp)):
        for t in tokens_of(b, i):
            r = (logp[i, t] - b.logp_old[i, t]).exp()
            total = total + torch.clamp(r, 0.8, 1.27).detach() * b.advantage[i] * logp[i, t]
    return total / int(b.response_mask.sum())


def gspo(b, logp):
    total = 0.0
    for i in range(len(logp)):
        y = tokens_of(b, i)
        s = (sum(logp[i, t] - b.logp_old[i, t] for t in y) / len(y)).exp()
        total = total + ppo_min(s, b.advantage[i], 3e-4, 4e-4)
    return total / len(logp)


def reinforce(b, logp):
    return sum(
        (b.logp[i, t] - b.logp_mu[i, t]).exp() * b.advantage[i] * logp[i, t]
        for i in range(len(logp))
        for t in tokens_of(b, i)
    ) / len(logp)


def no_is(b, logp):
    c = replace(b, logp_mu=b.logp_old)
    return eq7(c, logp)


def length_norm(b, logp):
    total = 0.0
    for i in range(len(logp)):
        total = total + eq7(b.rows([i]), logp[i : i + 1]) / len(tokens_of(b, i))
    return total / len(logp)


def without(b, logp, gone):
    "E_mu[A sum_t rho_t] over the tokens that a mask leaves, one response at a time."
    total = 0.0 * logp.sum()  # all may be gone
    for i in range(len(logp)):
        for t in tokens_of(b, i):
            if (i, t) not in gone:
                total = total + (logp[i, t] - b.logp_mu[i, t]).exp() * b.advantage[i]
    return total / len(logp)


def opsm_form(b, logp):
    "2512.02556: GRPO's loss with the rollout engine in the place of pi_old, times the mask."

    def ppo_drops(pi, old, mu, a):
        return a > 0 and pi / mu > 1.2 or a < 0 and pi / mu < 0.8

    gone = opsm(b) | one_by_one(b, ppo_drops)
    return sum(
        without(b.rows([i]), logp[i : i + 1], {(0, t) for j, t in gone if j == i})
        / len(tokens_of(b, i))
        for i in range(len(logp))
    ) / len(logp)


def vespo(b, logp):
    "2602.10693, Eq. 20."
    total = 0.0
    for i in range(len(logp)):
        y, a = tokens_of(b, i), float(b.advantage[i])
        W = math.prod(math.exp(b.logp[i, t] - b.logp_mu[i, t]) for t in y)
        c1, c2 = (2, 3) if a >= 0 else (3, 2)
        phi = W**c1 * math.exp(c2 * (1 - W)) if W < 200 else 0.0
        total = total + sum(phi * a * logp[i, t] for t in y)
    return total / len(logp)


TEXTBOOK = {
    "dppo_tv": (DPPO_TV, lambda b, logp: without(b, logp, dppo_tv(b))),
    "dppo_kl": (DPPO_KL, lambda b, logp: without(b, logp, dppo_kl(b))),
    "trm": (TRM, lambda b, logp: without(b, logp, trm_max(b))),
    "opsm": (OPSM, opsm_form),
    "vespo": (VESPO, vespo),
    "minirl": (MINIRL, eq7),
    "minirl_no_is": (MINIRL_NO_IS, no_is),
    "minirl_length_norm": (MINIRL_LENGTH_NORM, length_norm),
    "reinforce": (REINFORCE, reinforce),
    "grpo": (GRPO, grpo),
    "cispo": (CISPO, cispo),
    "gspo": (GSPO, gspo),
}


def test_every_preset_has_a_textbook_form():
    assert TEXTBOOK.keys() == PRESETS.keys() and all(
        TEXTBOOK[k][0] is v for k, v in PRESETS.items()
    )


@pytest.mark.parametrize("name", TEXTBOOK)
@PROPERTY
@given(b=batches)
def test_gradients_are_the_textbooks(name, b):
    objective, textbook = TEXTBOOK[name]
    if (b.response_mask.sum(-1) == 0).any():
        return  # the textbooks' 1/|y| has no value for an empty response
    logp = b.logp.clone().requires_grad_()
    surrogate = textbook(b, logp)
    (g,) = torch.autograd.grad(surrogate, logp)
    torch.testing.assert_close(-loss_and_grad(objective, b)[1], g, rtol=1e-12, atol=1e-14)


@PROPERTY
@given(batches)
def test_the_value_of_minirl_is_eq7(b):
    torch.testing.assert_close(
        -loss_and_grad(MINIRL, b)[0],
        torch.as_tensor(eq7(b, b.logp)).double(),
        rtol=1e-12,
        atol=1e-13,
    )


@PROPERTY
@given(batches)
def test_truncated_discrepancy_is_the_literatures_form(b):
    """clip of PPO on r = pi/old, times sg[f(old/mu)]: TIS, MIS and IcePop as their authors write
    them.
    """
    rho = (b.logp_old - b.logp_mu).exp()
    for cut, f in (
        (TIS(2.0), rho.clamp(max=2.0)),
        (MIS(2.0), rho * (rho <= 2.0)),
        (IcePop(0.5, 2.0), rho * ((rho >= 0.5) & (rho <= 2.0))),
    ):
        logp = b.logp.clone().requires_grad_()
        (f * ppo_min((logp - b.logp_old).exp(), b.advantage[:, None], 0.2, 0.27))[
            b.response_mask
        ].sum().div(len(logp)).backward()
        ours = loss_and_grad(Objective(truncation=cut, truncation_of="discrepancy"), b)[1]
        torch.testing.assert_close(-ours, logp.grad, rtol=1e-12, atol=1e-14)


@PROPERTY
@given(batches)
def test_ctpos_two_clips_have_the_gradient_of_its_min_and_max(b):
    """2605.07331 as its code has it: PPO's min around the product of ratios up to the token, and a
    second clip for A < 0. The earlier tokens' ratios carry no gradient."""
    b = replace(b, logp_old=b.logp_mu)
    logp, total = b.logp.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(b.advantage.tolist()):
        earlier = 0.0
        for k, t in enumerate(tokens_of(b, i), start=1):
            ratio = (earlier + logp[i, t] - b.logp_mu[i, t]).exp()
            earlier += float(b.logp[i, t] - b.logp_mu[i, t])
            low, high, grown = (math.exp(c * k**0.5) for c in (-0.025, 0.05, 0.05))
            cost = torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
            total = total + (cost.clamp(max=-a * grown) if a < 0 else cost)
    (total / len(logp) + 0 * logp.sum()).backward()
    ours = loss_and_grad(Objective(weight="prefix", truncation=None, clip=CTPO_REGIONS), b)[1]
    torch.testing.assert_close(ours, logp.grad, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------ invariances
MANY = [
    *PRESETS.values(),
    Objective(weight="sequence", truncation=TIS(3.0)),
    Objective(weight="old/mu", truncation=MIS(2.0)),
    Objective(truncation=IcePop(), truncation_of="discrepancy"),
    Objective(truncation=Geometric(0.8, 1.2), normalizer="tokens"),
    Objective(weight="none", truncation=None, clip=None),
    Objective(weight="sequence", truncation=TIS(), truncation_of="discrepancy"),
    Objective(weight="prefix", truncation=None, clip=CTPO_REGIONS),
    Objective(weight="prefix", truncation=Gamma(), clip=TRM_MEAN_REGION),
]


@PROPERTY
@given(batches, st.sampled_from(MANY), st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
def test_padding_changes_nothing(b, objective, junk):
    loss, g = loss_and_grad(objective, b)
    wide_loss, wide_g = loss_and_grad(objective, b.padded(3, junk))
    torch.testing.assert_close(wide_loss, loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        wide_g, torch.cat([g, torch.zeros(len(g), 3, dtype=g.dtype)], 1), rtol=1e-13, atol=0
    )


@PROPERTY
@given(batches, st.sampled_from(MANY), seeds)
def test_the_order_of_responses_changes_nothing(b, objective, seed):
    order = torch.randperm(len(b.logp), generator=torch.Generator().manual_seed(seed))
    (loss, g), (loss2, g2) = loss_and_grad(objective, b), loss_and_grad(objective, b.rows(order))
    torch.testing.assert_close(loss2, loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(g2, g[order], rtol=1e-13, atol=0)


@PROPERTY
@given(batches, st.sampled_from(MANY), st.integers(1, 4))
def test_micro_batches_add_up_to_the_mini_batch(b, objective, size):
    loss, g = loss_and_grad(objective, b)
    parts = [b.rows(i) for i in torch.arange(len(b.logp)).split(size)]
    n = sum(objective.count(p.response_mask) for p in parts)
    assert n == objective.count(b.response_mask)
    got = [loss_and_grad(objective, p, max(n, 1)) for p in parts]
    torch.testing.assert_close(sum(x for x, _ in got), loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([x for _, x in got]), g, rtol=1e-13, atol=0)


@PROPERTY
@given(seeds, st.sampled_from(MANY))
def test_float32_and_bfloat16_inputs(seed, objective):
    """The same numbers in another type give the same float32 gradient: nothing is computed in the
    narrow type.
    """
    b = make(seed, shift=0.1).to(torch.bfloat16)
    b.advantage = b.advantage.float()
    in_float64 = b.to(torch.float64)
    g = loss_and_grad(objective, in_float64)[1]
    loss32, g32 = loss_and_grad(objective, b.to(torch.float32))
    # ratios in float32 carry a relative error of some 1e-7, sequence ones of T = 7 times that
    torch.testing.assert_close(g32.double(), g, rtol=1e-5, atol=1e-9)
    loss16, g16 = loss_and_grad(objective, b)
    assert loss16.dtype == torch.float32 and g16.dtype == torch.bfloat16
    torch.testing.assert_close(loss16, loss32)
    torch.testing.assert_close(g16, g32.bfloat16())


@PROPERTY
@given(batches)
def test_knobs_at_their_ends(b):
    def grad(o):
        return loss_and_grad(o, b)[1]

    assert torch.equal(
        grad(Objective(truncation=TIS(math.inf), clip=Clip(1 - EPS, math.inf))),
        grad(Objective(truncation=None, clip=None)),
    )
    on_policy = replace(b, logp=b.logp_old)

    def same(o, p):
        return torch.testing.assert_close(
            loss_and_grad(o, on_policy)[1], loss_and_grad(p, on_policy)[1], rtol=1e-13, atol=0
        )

    same(
        Objective(truncation=IcePop()), Objective(truncation=IcePop(), truncation_of="discrepancy")
    )
    same(Objective(weight="pi/old"), Objective(weight="none"))
    same(Objective(weight="pi/mu"), Objective(weight="old/mu"))
    one_length = replace(b, response_mask=torch.ones_like(b.response_mask))
    a, c = loss_and_grad(MINIRL, one_length)[1], loss_and_grad(MINIRL_LENGTH_NORM, one_length)[1]
    torch.testing.assert_close(a, c * b.logp.shape[1], rtol=1e-13, atol=0)


# ------------------------------------------------------------ against the listing
YS = list_responses(vocab=3, T=3)


def engines(seed, scale=0.3):
    pi = AttentionPolicy(YS)
    old = pi.init(seed)
    theta = old + scale * pi.init(seed + 1)
    mu = YS.gather(noisy(pi.table(old), scale, seed + 2))
    return pi, theta, pi(old), mu


SEQUENCE = Objective(weight="sequence", truncation=None, clip=None)


@PROPERTY
@given(seeds, st.floats(-5, 5))
def test_the_sequence_weight_gives_the_exact_gradient_with_any_baseline(seed, baseline):
    pi, theta, old, mu = engines(seed)
    reward = random_reward(YS, seed + 3)

    def J(p):
        return expected_reward(pi, p, reward)

    exact = torch.autograd.functional.jacobian(J, theta)
    batch = dict(logp_old=old, logp_mu=mu, response_mask=YS.response_mask)
    g = expected_step(SEQUENCE.loss, pi, theta, advantage=reward - baseline, **batch)
    # sums of 15 responses with |A| below 10 and scores of a few units
    torch.testing.assert_close(g, exact, rtol=0, atol=1e-12)


@PROPERTY
@given(seeds)
def test_a_constant_reward_has_no_gradient_with_the_weight_and_has_one_without(seed):
    pi, theta, old, mu = engines(seed)
    one = torch.ones(len(YS), dtype=torch.float64)

    def g(o):
        batch = dict(logp_old=old, logp_mu=mu, response_mask=YS.response_mask)
        return expected_step(o.loss, pi, theta, advantage=one, **batch)

    assert g(REINFORCE).norm() < 1e-13 and g(SEQUENCE).norm() < 1e-13
    assert g(Objective(weight="none", truncation=None, clip=None)).norm() > 1e-3


@pytest.mark.parametrize("G", [2, 3, 4])
def test_the_group_mean_scales_the_expected_gradient(G):
    """All groups of G responses, each with its probability under mu: E[gradient] = (G - 1)/G of
    that with the exact baseline.
    """
    ys = list_responses(vocab=2, T=3)  # 4 responses
    pi = TablePolicy(ys)
    old = pi.init(0)
    theta, mu = old + 0.2 * pi.init(1), ys.gather(noisy(pi.table(old), 0.3, 2))
    reward = random_reward(ys, 3)
    members = torch.cartesian_prod(*[torch.arange(len(ys))] * G).reshape(
        -1
    )  # [number of groups * G]
    group = torch.arange(len(members)) // G
    p_group = mu.sum(-1)[members].view(-1, G).sum(-1).exp()
    assert float(p_group.sum()) == pytest.approx(1, abs=1e-12)
    a = REINFORCE.advantages(reward[members], group) * p_group[group]

    listed = dict(logp_old=pi(old), logp_mu=mu, response_mask=ys.response_mask)

    def grouped(p):
        batch = {name: x[members] for name, x in (listed | {"logp": pi(p)}).items()}
        return -REINFORCE.loss(**batch, advantage=a, count=G)

    A = reward - expectation(mu, reward)
    exact = expected_step(REINFORCE.loss, pi, theta, advantage=A, **listed)
    # sums of up to 4^4 groups of 4 responses, rounded at 1e-16 each
    torch.testing.assert_close(
        gradient(grouped, theta), (G - 1) / G * exact, rtol=1e-12, atol=1e-14
    )


# ------------------------------------------------------------ advantages
@PROPERTY
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_group_advantage_is_a_loop_over_groups(seed, groups, G, std):
    g = torch.Generator().manual_seed(seed)
    reward = torch.randint(0, 3, (groups * G,), generator=g).double()
    group = (10 * torch.arange(groups).repeat(G) + 3)[torch.randperm(groups * G, generator=g)]
    a, equal = group_advantage(reward, group, std), equal_groups(reward, group)
    for i, k in enumerate(sorted(set(group.tolist()))):
        r = reward[group == k]
        want = r - r.mean()
        if (r == r[0]).all():
            assert equal[i] and (a[group == k] == 0).all()
        else:
            assert not equal[i]
            torch.testing.assert_close(
                a[group == k], want / want.pow(2).mean().sqrt() if std else want
            )
    # any constant added to the rewards of one prompt is forgotten
    torch.testing.assert_close(
        group_advantage(reward + group.double(), group, std), a, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("std", [False, True])
def test_group_advantage_is_its_definition_to_the_bit(std):
    "Group by group, sums in the order of the responses."
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, 7, (60,), generator=g) * 3
    reward = torch.randn(60, dtype=torch.float64, generator=g)
    found = group_advantage(reward, group, std)
    for k in group.unique():
        members = (group == k).nonzero()[:, 0].tolist()
        rewards = [float(reward[b]) for b in members]
        mean = sum(rewards) / len(rewards)
        centred = [x - mean for x in rewards]
        deviation = math.sqrt(sum(x * x for x in centred) / len(rewards)) if std else 1.0
        assert [float(found[b]) for b in members] == [x / deviation for x in centred]


def test_group_advantage_on_literals():
    reward, group = torch.tensor([1.0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 7, 7])
    assert group_advantage(reward, group).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0]
    assert group_advantage(reward, group, std=True).tolist() == [1, -1, -1, 1, 0, 0]
    assert equal_groups(reward, group).tolist() == [False, True]
    # 0.1 three times has a mean that is not 0.1 in floating point
    assert (
        group_advantage(torch.full((3,), 0.1, dtype=torch.float64), torch.zeros(3).long(), std=True)
        == 0
    ).all()
    assert group_advantage(torch.tensor([1, 0]), torch.tensor([0, 0])).tolist() == [0.5, -0.5]
    assert group_advantage(torch.zeros(0), torch.zeros(0).long()).shape == (0,)
    assert group_advantage(reward.bfloat16(), group).dtype == torch.float32
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"response 1 is"):
            group_advantage(torch.tensor([0.0, wrong]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"\[B\]"):
        group_advantage(torch.zeros(2, 1), torch.zeros(2, 1).long())


# ------------------------------------------------------------ statistics and refusals
def test_stats_on_literals():
    def logs(*x):
        return torch.tensor([x], dtype=torch.float64).log()

    #            kept       clipped high  truncated    off the mask
    logp, old, mu = logs(0.5, 0.6, 0.5, 0.9), logs(0.5, 0.4, 0.5, 0.1), logs(0.4, 0.5, 0.05, 0.001)
    mask = torch.tensor([[True, True, True, False]])
    batch = dict(logp=logp, logp_old=old, logp_mu=mu, response_mask=mask)
    loss, s = MINIRL(**batch, advantage=torch.tensor([0.5]))
    assert (
        s["truncated"] == s["clip_high"] == s["zero_gradient"] == pytest.approx(1 / 3)
        and s["clip_low"] == 0
    )
    assert (
        s["weight/max"] == pytest.approx(10)
        and s["staleness/max"] == pytest.approx(1.5)
        and s["discrepancy/min"] == pytest.approx(0.8)
    )
    assert float(loss) == pytest.approx(-0.5 * (1.25 * math.log(0.5) + 5 * math.log(0.5)))
    expected = {
        "truncated",
        "clip_high",
        "clip_low",
        *(
            f"{a}/{b}"
            for a in ("discrepancy", "staleness", "weight")
            for b in ("k1", "k3", "ess", "min", "max")
        ),
    }
    assert expected <= s.keys() and all(type(v) is float for v in s.values())
    assert MINIRL(**batch, advantage=torch.tensor([0.0]))[1]["zero_gradient"] == 1
    unclipped = replace(MINIRL, clip=None)
    assert unclipped(**batch, advantage=torch.tensor([-0.5]))[1]["clip_low"] == 0


def test_no_gradient_but_through_logp_and_none_from_the_statistics():
    b = make(4)
    for x in (b.logp, b.logp_old, b.logp_mu, b.advantage):
        x.requires_grad_()
    loss, _ = MINIRL(**b.named())
    loss.backward()
    assert b.logp.grad.abs().sum() > 0 and b.logp_old.grad is None and b.logp_mu.grad is None


def test_degenerate_batches():
    b = make(5)
    loss, g = loss_and_grad(MINIRL, replace(b, advantage=torch.zeros_like(b.advantage)))
    assert float(loss) == 0 and (g == 0).all()
    loss, g = loss_and_grad(CISPO, replace(b, response_mask=torch.zeros_like(b.response_mask)))
    assert float(loss) == 0 and (g == 0).all()
    # an untruncated sequence weight may overflow: without advantage it must not become inf * 0
    far = replace(b, logp_mu=b.logp - 500, advantage=torch.tensor([0.0, 0, 0, 0, 0, 1e-300])).to(
        torch.float32
    )
    loss, g = loss_and_grad(SEQUENCE, far)
    assert g[:5].isfinite().all()


@pytest.mark.parametrize("b_nan", ["logp", "logp_old", "logp_mu"])
def test_a_nan_on_a_response_token_reaches_the_loss(b_nan):
    b = make(6)
    b.advantage[:] = 1.0
    row, column = b.response_mask.nonzero()[0]
    getattr(b, b_nan)[row, column] = math.nan
    for objective in MANY:
        uses = {
            "logp": True,
            "logp_old": objective.clip is not None
            or objective.weight not in ("pi/mu", "none", "prefix", "sequence"),
            "logp_mu": objective.weight in ("pi/mu", "prefix", "sequence", "old/mu"),
        }[b_nan]
        _, s = objective(**b.named())
        assert any(math.isnan(v) for v in s.values())  # the statistics always show it
        follows_mu = objective.weight in ("pi/mu", "prefix", "sequence")
        if uses and not (b_nan == "logp_old" and follows_mu):
            assert not torch.isfinite(objective.loss(**b.named())), objective


def test_what_is_refused():
    b = make(7)
    for name, value in (
        ("weight", "mu/pi"),
        ("advantage", "median"),
        ("normalizer", "x"),
        ("truncation_of", "x"),
        ("truncation", "tis:5"),
        ("clip", 0.2),
    ):
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            Objective(**{name: value})
    with pytest.raises(ValueError, match=r"\(5,\).*\[6\]"):
        MINIRL.loss(**b.named(advantage=b.advantage[:5]))
    for count in (0, -3, math.nan):
        with pytest.raises(ValueError, match="count"):
            MINIRL.loss(**b.named(), count=count)


def test_presets_are_the_papers_settings():
    assert MINIRL == Objective("pi/mu", TIS(5.0), Clip(0.2, 0.27), "mean", "responses")
    assert CISPO.truncation == Clamp(0.8, 1.27) and GSPO.clip == Clip(3e-4, 4e-4, "sequence")
    assert {o.advantage for o in (GRPO, CISPO, GSPO)} == {"mean_std"}


@PROPERTY
@given(batches, st.sampled_from(["pi/mu", "prefix", "sequence"]))
def test_rejection_and_weighting_combine_freely(b, weight):
    "The mask drops tokens and leaves the weights of the others, and other masks, as they are."
    plain = Objective(weight=weight, truncation=None, clip=None)
    _, free = loss_and_grad(plain, b)
    for region in (CTPO_REGIONS, TRM_MEAN_REGION, DPPO_TV.clip, OPSM.clip, MINIRL.clip):
        keep, _, _ = region(**b.named())
        _, g = loss_and_grad(replace(plain, clip=region), b)
        assert torch.equal(g, torch.where(keep, free, 0.0))


@PROPERTY
@given(batches)
def test_the_later_presets_do_not_look_at_pi_old(b):
    "A run of two policies need not recompute it."
    for objective in (DPPO_TV, DPPO_KL, TRM, OPSM, VESPO):
        got = loss_and_grad(objective, replace(b, logp_old=b.logp_mu))
        for x, y in zip(got, loss_and_grad(objective, b)):
            assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_on_an_accelerator():
    b = make(8, B=32, T=32)
    on = b.map(lambda x: x.cuda())
    for objective in MANY:
        for on_cpu, on_device in zip(loss_and_grad(objective, b), loss_and_grad(objective, on)):
            torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-11, atol=1e-13)
        assert objective.stats(**on.named()) == {
            k: pytest.approx(v, rel=1e-9, abs=1e-12)
            for k, v in objective.stats(**b.named()).items()
        }
    reward, group = torch.rand(32), torch.arange(32) // 8
    torch.testing.assert_close(
        group_advantage(reward.cuda(), group.cuda(), True).cpu(),
        group_advantage(reward, group, True),
    )


@pytest.mark.parametrize("call", ["__call__", "loss", "stats", "coefficient"])
def test_tensors_of_one_shape_cannot_be_passed_by_position(call):
    b = make(9)
    with pytest.raises(TypeError, match="positional"):
        getattr(MINIRL, call)(b.logp, b.logp_old, b.logp_mu, b.advantage, b.response_mask)


# ------------------------------------------------------------ infinities, parts and ranks
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("why", ["clipped", "no advantage"])
def test_a_token_without_gradient_may_have_probability_zero(name, why):
    "Its term is 0 x inf: the loss and all gradients must be those of the batch without it."
    objective = PRESETS[name]
    b = make(10, B=4, T=5)
    b = replace(b, response_mask=torch.ones(4, 5, dtype=torch.bool))
    b.advantage[0] = 0.0 if why == "no advantage" else -1.0
    b.logp[0] = b.logp_old[0]
    logp = b.logp.clone()
    logp[0, 2] = -math.inf
    (_, finite), (loss, g) = (
        loss_and_grad(objective, b),
        loss_and_grad(objective, replace(b, logp=logp)),
    )
    # GSPO clips the response as one, GRPO and MiniRL the token; CISPO keeps a clamped weight
    unclipped = why == "clipped" and name == "cispo"
    assert unclipped or torch.isfinite(loss), loss
    assert torch.isfinite(g).all()
    torch.testing.assert_close(g[1:], finite[1:])
    assert unclipped or g[0, 2] == 0


NORMALIZERS = ["responses", "response_length", "tokens"]
EVERY = [replace(o, normalizer=n) for o in PRESETS.values() for n in NORMALIZERS] + MANY


def in_parts(b, sizes):
    "Rows in parts of these sizes and a last one with the rest; parts may be empty."
    ends = torch.tensor(sizes).cumsum(0).clamp(max=len(b.logp)).tolist()
    cuts = [0, *ends, len(b.logp)]
    return [b.rows(slice(i, j)) for i, j in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("objective", EVERY, ids=range(len(EVERY)))
@settings(PROPERTY, max_examples=20)
@given(
    b=batches,
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    micro=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    infinite=st.floats(0, 1),
    seed=seeds,
)
def test_any_split_over_ranks_and_micro_batches_is_the_whole(
    objective, b, ranks, micro, infinite, seed
):
    """Every preset under every normaliser. Ranks hold any number of responses and cut them into any
    micro-batches, none and empty ones included; each part divides by the count of the whole, and
    the ranks add up. Tokens that count for nothing (off the mask, or without advantage) may have
    any probability, also zero or NaN off the mask: loss and gradient stay those of the whole.
    """
    clean_loss, clean_g = loss_and_grad(objective, b)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(b.logp.shape, generator=g) < infinite
    junk = torch.tensor([-math.inf, math.inf, math.nan], dtype=torch.float64)
    off, idle = chosen & ~b.response_mask, chosen & (b.advantage == 0)[:, None] & b.response_mask
    for name in ("logp", "logp_old", "logp_mu"):
        x = getattr(b, name).clone()
        x[off] = junk[torch.randint(0, 3, (int(off.sum()),), generator=g)]
        setattr(b, name, x)
    b.logp = b.logp.masked_fill(idle, -math.inf)
    loss, grad = loss_and_grad(objective, b)
    parts = [m for rank in in_parts(b, ranks) for m in in_parts(rank, micro)]
    n = max(sum(objective.count(p.response_mask) for p in parts), 1)
    assert n == max(objective.count(b.response_mask), 1)
    got = [loss_and_grad(objective, p, n) for p in parts]
    # sums of up to 72 terms in another order, each rounded at 1e-16
    torch.testing.assert_close(sum(x for x, _ in got), loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([x for _, x in got]), grad, rtol=1e-13, atol=0)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    torch.testing.assert_close(grad, clean_g, rtol=1e-13, atol=0)
    if not idle.any():
        torch.testing.assert_close(loss, clean_loss, rtol=1e-12, atol=1e-13)
