"""The probe of an engine: stale tensors, bands, and heads that scale or cap, in every family."""

import copy

import moe_families
import pytest
import torch
from teacher_forcing import PROMPTS, ROUNDING, SHORT, check_teacher_forced, teacher_forced_gap
from torch import nn

from minirl_nb import policy
from minirl_nb.parity import ParityError, parity
from minirl_nb.rollout import TorchEngine


@pytest.mark.parametrize("scheme", [None, "fp8_per_channel"])
def test_every_single_stale_tensor_is_named(scheme, moe):
    names = [n for n, _ in moe.named_parameters()]
    for name in names:
        trainer = copy.deepcopy(moe)
        e = TorchEngine(trainer, fp8=scheme)
        with torch.no_grad():
            dict(trainer.named_parameters())[name].mul_(1.5).add_(0.01)
        with pytest.raises(ParityError, match=name.replace(".", r"\.")):
            parity(e, trainer, PROMPTS)


def test_band_of_a_quantised_engine(moe):
    e = TorchEngine(moe, fp8="fp8_per_channel")
    k3 = parity(e, moe, PROMPTS).k3
    assert k3 > 1e-3  # ten seeds: 0.009 to 0.021
    with pytest.raises(ParityError, match="outside the band"):
        parity(e, moe, PROMPTS, band=k3 / 10)


def test_bfloat16_engine(moe):
    e = TorchEngine(moe, dtype=torch.bfloat16)
    p = parity(e, moe, PROMPTS)
    assert 0.002 < p.median < 0.03  # ten seeds: 0.006 to 0.010


# ---------------------------------------------------------------- one head, in every family
# What a family may do between the output matrix and its logits; far from the neutral values, so
# that an engine which forgets one is off by more than a nat
HEAD = dict(
    logits_scaling=8.0, logit_scale=1 / 16, final_logit_softcapping=0.5, lm_head_multiplier=0.1
)
# 57 families of tiny models; these keep another state than keys and values
OTHER_STATE = "keeps keys and values only: use the vLLM engine"


def family(name):
    "A tiny model of a MoE family whose head scales and caps, where the family knows how."
    cls = moe_families.discover()[name]
    known = moe_families.config(cls)
    windows = {k: 64 for k in ("sliding_window", "sliding_window_size") if getattr(known, k, None)}
    changes = {k: v for k, v in HEAD.items() if hasattr(known, k)}
    return moe_families.build(cls, **windows, **changes)


@pytest.mark.parametrize("name", moe_families.discover())
def test_engine_trainer_and_probe_agree_in_every_moe_family(name):
    model = family(name)
    try:
        engine = TorchEngine(model)
    except ValueError as refused:
        assert OTHER_STATE in str(refused)
        return
    if name == "doge":  # no function of a prefix (data/routing_conformance.md): the probe finds out
        with pytest.raises(ParityError, match="while sampling differ from its teacher-forced ones"):
            parity(engine, model, PROMPTS, SHORT)
        return
    check_teacher_forced(model, engine.generate(PROMPTS, SHORT))
    assert parity(engine, model, PROMPTS, SHORT).max < ROUNDING


SCALED = ["beam", "cohere2_moe", "gemma4", "granitemoe", "granitemoeshared"]


@pytest.mark.parametrize("name", SCALED)
def test_the_probe_finds_an_engine_that_takes_the_bare_output_matrix(name, monkeypatch):
    model = family(name)
    engine = TorchEngine(model)
    monkeypatch.setattr(
        policy.Head, "logits", lambda self, states: nn.functional.linear(states, self.weight)
    )
    gap = teacher_forced_gap(model, engine.generate(PROMPTS, SHORT))
    assert gap.max() > 1  # in nats
    with pytest.raises(ParityError, match="while sampling differ from its teacher-forced ones"):
        parity(engine, model, PROMPTS, SHORT)
