"""Policies whose every response is listed, and the surrogate's gradient on them, for several files of tests."""

from minirl_nb.exact import AttentionPolicy, TablePolicy, expected_step, list_responses
from minirl_nb.objective import REINFORCE


def make(kind, V, T, end=0):
    "A listed policy by its kind, with V tokens and at most T of them in a response."
    ys = list_responses(V, T, end)
    return {
        "tree": lambda: TablePolicy(ys),
        "bigrams": lambda: TablePolicy(ys, 1),
        "attention": lambda: AttentionPolicy(ys),
    }[kind]()


def surrogate_gradient(pi, theta, logp_old, logp_mu, R):
    "What ascent on REINFORCE's token-level surrogate follows, in expectation over y ~ mu."
    batch = dict(logp_old=logp_old, logp_mu=logp_mu, advantage=R)
    return expected_step(REINFORCE.loss, pi, theta, **batch, response_mask=pi.listing.response_mask)
