"""`first_order`: the surrogate is exact at its point and nowhere else; a shifted problem has the
size it was asked for.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_policies import make, surrogate_gradient

from minirl_nb.exact import (
    expectation,
    expected_reward,
    gradient,
    noisy,
    random_reward,
    token_scores,
)
from minirl_nb.first_order import ShiftedProblem
from minirl_nb.objective import REINFORCE

quick = settings(max_examples=20, deadline=None, derandomize=True)
# a few hundred float64 terms of order one, each rounded at 1e-16
ROUNDING = 1e-12


problems = st.tuples(
    st.sampled_from(["tree", "bigrams", "attention"]),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(0, 10**6),
)


@quick
@given(problems, st.floats(-5, 5))
def test_exact_at_the_point(problem, baseline):
    kind, V, T, seed = problem
    pi = make(kind, V, T)
    theta, R = pi.init(seed), random_reward(pi.listing, seed + 1)
    logp = pi(theta).detach()
    g = gradient(lambda p: expected_reward(pi, p, R), theta)
    assert (surrogate_gradient(pi, theta, logp, logp, R - baseline) - g).norm() < ROUNDING * (
        1 + abs(baseline)
    )


@quick
@given(problems, st.floats(0.01, 1.0))
def test_the_gap_is_the_neglected_factor(problem, shift):
    """grad J - grad J_token = E_mu[R sum_t rho_t (c_t - 1) s_t], for shifts of any size; zero for
    responses of one token.
    """
    kind, V, T, seed = problem
    pi = make(kind, V, T)
    old, theta = pi.init(seed), pi.init(seed) + shift * pi.init(seed + 1)
    R, mask = random_reward(pi.listing, seed + 2), pi.listing.response_mask
    logp_mu = pi.listing.gather(noisy(pi.table(old), shift, seed)).detach()
    log_rho = (pi(theta) - logp_mu).detach()
    c = (log_rho.sum(-1, keepdim=True) - log_rho).exp()
    weight = torch.where(mask, log_rho.exp() * (c - 1), 0.0) * R[:, None]
    gap = expectation(logp_mu, torch.einsum("nt,ntp->np", weight, token_scores(pi, theta)))
    g = gradient(lambda p: expected_reward(pi, p, R), theta)
    measured = g - surrogate_gradient(pi, theta, pi(old).detach(), logp_mu, R)
    # ratios of up to e^5 at the largest shifts: one digit more
    assert (measured - gap).norm() < 10 * ROUNDING * (1 + gap.norm())
    if T == 1:
        assert measured.norm() < ROUNDING


@pytest.mark.parametrize("kind", ["tree", "bigrams", "attention"])
def test_the_gradient_gap_is_first_order_not_second(kind):
    pi = make(kind, 3, 4)
    theta, R = pi.init(0), random_reward(pi.listing, 1)
    g = gradient(lambda p: expected_reward(pi, p, R), theta)

    def engine(s):
        return pi.listing.gather(noisy(pi.table(theta), s, 2)).detach()

    gap = [
        float((surrogate_gradient(pi, theta, pi(theta).detach(), engine(s), R) - g).norm())
        for s in (1e-3, 1e-4)
    ]
    # the next order adds a share of the shift itself, 1e-3, to the larger gap
    assert math.log10(gap[0] / gap[1]) == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------ shifted problems
@pytest.mark.parametrize("kind", ["tree", "bigrams", "attention"])
@pytest.mark.parametrize("way", ["noise", "temperature", "floor", "gradient", "random", "sampled"])
def test_a_shift_has_the_size_that_was_asked_for(kind, way):
    p, size = ShiftedProblem(kind, 3, 4, seed=1, prompts=3), 1e-3
    if way in ("noise", "temperature", "floor"):
        logp = p.engine(way, size)
    else:
        logp = p.logp(p.moved(way, size)).detach()
    assert p.size(logp) == pytest.approx(size, rel=0.02)  # of first order: off by a few times 1e-3
    assert torch.equal(p.engine("noise", 0), p.logp_old) and p.moved("random", 0) is p.theta_old


def test_prompts_of_a_shifted_problem_are_averaged():
    p = ShiftedProblem("attention", 3, 3, seed=0, prompts=2)
    alone = [p.policy(p.theta_old, x) for x in range(2)]
    assert torch.equal(torch.cat(alone), p.logp(p.theta_old))
    means = [expectation(x, r) for x, r in zip(alone, p.reward.view(2, -1))]
    assert float(p.J(p.theta_old)) == pytest.approx(float(sum(means)) / 2, abs=ROUNDING)
    step = p.surrogate_gradient(REINFORCE.loss, p.theta_old, p.logp_old)
    assert (step - gradient(p.J, p.theta_old)).norm() < ROUNDING
