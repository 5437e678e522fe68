"""`exact`: the listing is a partition, its expectations and derivatives are exact, and Eq. 2
holds for random problems.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb.exact import (
    AttentionPolicy,
    TablePolicy,
    angle,
    expectation,
    expected_loss,
    expected_reward,
    expected_step,
    floored,
    gradient,
    hessian_vector,
    list_responses,
    noisy,
    random_reward,
    relative_error,
    rounded,
    sample,
    sequence_logp,
    tempered,
    token_scores,
)
from minirl_nb.objective import MINIRL, REINFORCE, Objective

SEQUENCE = Objective(weight="sequence", truncation=None, clip=None)
# a few hundred float64 terms of order one, each rounded at 1e-16, against a gradient of order 0.1
TOLERANCE = 1e-12
quick = settings(max_examples=25, deadline=None, derandomize=True)


def make(kind, V, T, end=0, prompts=1):
    ys = list_responses(V, T, end)
    return {
        "tree": lambda: TablePolicy(ys, prompts=prompts),
        "bigrams": lambda: TablePolicy(ys, 1, prompts),
        "attention": lambda: AttentionPolicy(ys, 4, prompts),
    }[kind]()


problems = st.tuples(
    st.sampled_from(["tree", "bigrams", "attention"]),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
engines = st.sampled_from(
    [
        lambda t: noisy(t, 0.5, 1),
        lambda t: tempered(t, 1.5),
        lambda t: floored(t, 0.2),
        lambda t: rounded(t, 0.5),
    ]
)


@pytest.mark.parametrize(
    "V,T,end", [(2, 1, 0), (2, 6, 1), (3, 4, 0), (4, 3, 3), (3, 3, None), (2, 5, None)]
)
def test_listing_is_every_response_once(V, T, end):
    ys = list_responses(V, T, end)
    k = V - (end is not None)
    assert len(ys) == (V**T if end is None else k**T + sum(k**t for t in range(T)))
    seen = {tuple(y[m].tolist()) for y, m in zip(ys.tokens, ys.response_mask)}
    assert len(seen) == len(ys)
    for y in seen:
        assert end not in y[:-1] and (len(y) == T or y[-1] == end)
    # the mask is a prefix of the row, and token t of a response continues the prefix it names
    assert torch.equal(ys.response_mask, torch.arange(T) < ys.length[:, None])
    for n in range(len(ys)):
        for t in range(int(ys.length[n])):
            row = ys.prefix[n, t]
            assert ys.prefix_length[row] == t and torch.equal(
                ys.prefixes[row, :t], ys.tokens[n, :t]
            )
    assert len({tuple(p[:n].tolist()) for p, n in zip(ys.prefixes, ys.prefix_length)}) == len(
        ys.prefixes
    )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="vocab = 1"):
        list_responses(1, 3)
    with pytest.raises(ValueError, match="T = 0"):
        list_responses(3, 0)
    with pytest.raises(ValueError, match="end = 3"):
        list_responses(3, 2, end=3)
    with pytest.raises(ValueError, match="more than limit"):
        list_responses(10, 10)
    with pytest.raises(ValueError, match="must have shape"):
        list_responses(3, 2).gather(torch.zeros(2, 3))


@quick
@given(problems, engines)
def test_policies_and_engines_are_distributions(problem, engine):
    kind, V, T, seed = problem
    pi = make(kind, V, T)
    table = pi.table(pi.init(seed))
    assert table.dtype == torch.float64 and table.shape == (len(pi.listing.prefixes), V)
    for t in (table, engine(table)):
        assert torch.allclose(t.exp().sum(-1), torch.ones(len(t), dtype=t.dtype), atol=1e-14)
        logp = pi.listing.gather(t)
        assert (logp[~pi.listing.response_mask] == 0).all()
        assert abs(float(sequence_logp(logp).exp().sum()) - 1) < TOLERANCE


@pytest.mark.parametrize("kind", ["tree", "attention"])
def test_prompts_have_their_own_policy(kind):
    pi = make(kind, 3, 3, prompts=2)
    params = pi.init(0)
    assert not torch.allclose(pi(params, 0), pi(params, 1))
    with pytest.raises(IndexError):
        pi(params, 2)


@pytest.mark.parametrize("kind", ["tree", "bigrams", "attention"])
def test_several_prompts_at_once(kind):
    pi = make(kind, 3, 4, prompts=3)
    params = pi.init(0)
    together = pi(params, torch.arange(3))
    assert together.shape == (3, *pi.listing.tokens.shape)
    # the same sums in another order: a few roundings of numbers of size ten
    for x in range(3):
        torch.testing.assert_close(together[x], pi(params, x), rtol=0, atol=1e-14)


def test_attention_is_causal_and_sees_all_of_its_prefix():
    pi = make("attention", 3, 4, end=None)
    table, ys = pi.table(pi.init(3)), pi.listing
    assert len(table.round(decimals=10).unique(dim=0)) == len(
        ys.prefixes
    )  # no two prefixes get the same answer


@quick
@given(problems)
def test_derivatives_agree_with_torch(problem):
    kind, V, T, seed = problem
    pi = make(kind, V, T)
    theta, R = pi.init(seed), random_reward(pi.listing, seed + 1)

    def J(p):
        return expected_reward(pi, p, R)

    v = pi.init(seed + 2)
    assert torch.allclose(
        gradient(J, theta), torch.autograd.functional.jacobian(J, theta), atol=1e-14
    )
    assert torch.allclose(
        hessian_vector(J, theta, v), torch.autograd.functional.hvp(J, theta, v)[1], atol=TOLERANCE
    )
    # and with Eq. 1 in its first form, differentiated by hand: sum_y pi(y) R(y) S(y)
    scores = token_scores(pi, theta)
    assert torch.allclose(
        gradient(J, theta), expectation(pi(theta), R[:, None] * scores.sum(1)), atol=TOLERANCE
    )
    assert (scores[~pi.listing.response_mask] == 0).all()


def test_gradient_of_what_does_not_depend_on_the_parameters_is_zero():
    x = torch.ones(3, dtype=torch.float64)
    assert torch.equal(gradient(lambda p: p.sum() * 0 + 1, x), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(hessian_vector(lambda p: p.sum(), x, x), torch.zeros(3, dtype=torch.float64))


@quick
@given(problems, engines, st.floats(-10, 10))
def test_eq2_is_exact_for_any_engine_and_any_baseline(problem, engine, baseline):
    kind, V, T, seed = problem
    pi = make(kind, V, T)
    old, theta = pi.init(seed), pi.init(seed) + 0.3 * pi.init(seed + 1)
    R = random_reward(pi.listing, seed + 2)
    logp_mu = pi.listing.gather(engine(pi.table(old))).detach()

    step = expected_step(
        SEQUENCE.loss,
        pi,
        theta,
        logp_old=pi(old).detach(),
        logp_mu=logp_mu,
        advantage=R - baseline,
        response_mask=pi.listing.response_mask,
    )
    g = gradient(lambda p: expected_reward(pi, p, R), theta)
    assert (step - g).norm() < TOLERANCE * (1 + abs(baseline))
    # Eq. 1's two forms
    weight = (sequence_logp(pi(theta)) - sequence_logp(logp_mu)).exp()
    assert abs(float(expectation(logp_mu, weight * R) - expected_reward(pi, theta, R))) < TOLERANCE


@quick
@given(problems, st.sampled_from([MINIRL, REINFORCE, SEQUENCE]), st.randoms(use_true_random=False))
def test_expected_loss_does_not_depend_on_order_padding_or_micro_batches(
    problem, objective, random
):
    kind, V, T, seed = problem
    pi = make(kind, V, T)
    old, theta = pi.init(seed), pi.init(seed) + 0.3 * pi.init(seed + 1)
    mask, R = pi.listing.response_mask, random_reward(pi.listing, seed)
    logp_mu = pi.listing.gather(noisy(pi.table(old), 0.3, seed)).detach()
    batch = dict(logp=pi(theta), logp_old=pi(old), logp_mu=logp_mu, advantage=R, response_mask=mask)

    def loss(change):
        changed = {name: change(x) for name, x in batch.items()}
        return float(expected_loss(objective.loss, **changed).detach())

    def pad(x):
        return torch.cat([x, torch.zeros(len(x), 2, dtype=x.dtype)], 1) if x.ndim == 2 else x

    whole, order = loss(lambda x: x), list(range(len(R)))
    random.shuffle(order)
    parts = [slice(0, len(R) // 2), slice(len(R) // 2, None)]
    assert abs(loss(lambda x: x[order]) - whole) < TOLERANCE
    assert abs(sum(loss(lambda x, s=s: x[s]) for s in parts) - whole) < TOLERANCE
    assert abs(loss(pad) - whole) < TOLERANCE


def test_sample_follows_the_probabilities():
    pi = make("bigrams", 3, 3)
    logp = pi(pi.init(0))
    n = 20_000
    share = torch.bincount(sample(logp, n, seed=1), minlength=len(pi.listing)) / n
    p = sequence_logp(logp).exp()
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()  # five standard errors
    assert torch.equal(sample(logp, 10, seed=1), sample(logp, 10, seed=1))


def test_engines_do_what_they_say():
    table = make("tree", 3, 3).table(make("tree", 3, 3).init(0))
    assert torch.equal(floored(table, 0), table)
    assert torch.allclose(floored(table, 0.3).exp(), 0.7 * table.exp() + 0.1, atol=1e-15)
    assert torch.allclose(
        floored(torch.tensor([[0.0, -torch.inf]]), 0.2).exp(), torch.tensor([[0.9, 0.1]])
    )
    assert torch.allclose(tempered(table, 2.0), torch.log_softmax(table / 2, -1))
    assert torch.allclose(noisy(table, 0.0, 1), table, atol=1e-15) and not torch.allclose(
        noisy(table, 0.1, 1), noisy(table, 0.1, 2)
    )
    steps = (rounded(table, 0.5) - rounded(table, 0.5)[:, :1]) / 0.5
    assert torch.allclose(steps, steps.round(), atol=1e-12)  # differences are multiples of the step


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 1.0, 45.0, 90.0, 179.0])
def test_angle_and_relative_error(degrees):
    a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    exact = torch.tensor([3.0, 0.0], dtype=torch.float64)
    assert angle(2 * torch.stack([a.cos(), a.sin()]), exact) == pytest.approx(
        degrees, abs=1e-13, rel=1e-9
    )
    assert relative_error(exact * 1.5, exact) == pytest.approx(0.5)
