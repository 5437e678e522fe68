"""The parity probe on the real mixture of 30 layers: it passes, and planted faults are named."""

import pytest
import real_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirl_nb.parity import ParityError, parity
from minirl_nb.rollout import Sampling, TorchEngine
from minirl_nb.tasks import encode_prompt
from minirl_nb.upcycle import UpcycleConfig, upcycle

SAMPLING = Sampling(n=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def mixture():
    folder = real_model.smollm2()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = UpcycleConfig(experts=8, top_k=4, slices=4, routers="paired")
    model = upcycle(dense, config)
    model.set_experts_implementation("grouped_mm")
    prompts = [encode_prompt(AutoTokenizer.from_pretrained(folder), "What is 3 + 5?")]
    return model, prompts


def stale_expert(e):
    e.model.model.layers[17].mlp.experts.down_proj[3] *= 0.9


def swapped_layers(e):
    a, b = (e.model.model.layers[i].self_attn.k_proj.weight for i in (11, 12))
    a_before = a.clone()
    a.copy_(b)
    b.copy_(a_before)


def shifted_position(e):
    def hook(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1 and "past_key_values" in kwargs:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return args, kwargs

    e.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def wrong_scale(e):
    e.model.model.layers[4].self_attn.o_proj.register_forward_hook(lambda m, x, y: 1.05 * y)


FAULTS = {
    stale_expert: r"1 of the engine's tensors .*layers\.17\.mlp\.experts\.down_proj \(expert 3\)",
    swapped_layers: r"2 of the engine's tensors .*layers\.1[12]\.self_attn\.k_proj\.weight",
    shifted_position: "positions, masks or the cache are wrong",
    wrong_scale: "they part at layer 4",
}


def test_a_healthy_engine_passes_though_it_disagrees_with_itself(mixture):
    model, prompts = mixture
    found = parity(TorchEngine(model, fp8="fp8_per_channel", routes=True), model, prompts, SAMPLING)
    # untrained, 64 tokens: floor 0.02 to 0.03, k3 0.045; decoding and prefill of a float32 engine
    # may differ by a k3 of 1e-8
    assert 1e-4 < found.floor < 1 and 1e-3 < found.k3 < 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_faults_are_named(fault, mixture):
    model, prompts = mixture
    e = TorchEngine(model, fp8="fp8_per_channel", routes=True)
    with torch.no_grad():
        fault(e)
    with pytest.raises(ParityError, match=FAULTS[fault]):
        parity(e, model, prompts, SAMPLING)
