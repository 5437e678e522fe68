"""The trainer's log-probabilities of an engine's responses, token by token."""

import torch

from minirl_nb.policy import token_logprobs
from minirl_nb.rollout import Sampling

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4], [2]]
# float32 log-probabilities up to 20: an ulp is 2e-6, and a forward of two layers adds some tens of
# roundings
ROUNDING = 2e-5
SHORT = Sampling(n=4, max_new_tokens=16)


def teacher_forced_gap(model, r, temperature=1.0):
    with torch.no_grad():
        logp, _ = token_logprobs(
            model, r.tokens, r.response_mask, temperature=temperature, entropy=False
        )
    return (logp - r.logp_mu).abs()


def check_teacher_forced(model, r, temperature=1.0):
    assert teacher_forced_gap(model, r, temperature).max() < ROUNDING
