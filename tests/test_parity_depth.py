"""The parity probe where an FP8 engine does not agree with itself: a mixture of 30 layers."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from minirl_nb import fp8
from minirl_nb.parity import Parity, ParityError, parity, self_noise, widened
from minirl_nb.rollout import Sampling, TorchEngine

PROMPTS = [[5, 9, 3], [7, 7, 2, 11], [4], [8, 1, 6, 2, 2]]
SAMPLING = Sampling(n=2, max_new_tokens=24)


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize("scheme", fp8.VLLM_SCHEMES)
def test_an_engine_that_is_chaotic_but_right_passes(scheme, deep):
    e = TorchEngine(deep, fp8=scheme, routes=True)
    found = parity(e, deep, PROMPTS, SAMPLING)
    noise = self_noise(e, e.generate(PROMPTS, SAMPLING))
    # a float32 engine without FP8 stays below 1e-4 here; this one may not be asked to
    assert noise["prefill"].abs().max() > 1e-3 and noise["alone"].abs().max() > 1e-3
    assert 0 < found.floor < found.k3 and found.stats()["parity/floor"] == found.floor


@pytest.mark.parametrize("scheme", ["mxfp4_weights", "nvfp4_weights"])
def test_rounded_weights_alone_are_not_chaotic(scheme, deep):
    "Only a rounded activation turns a last digit into another code: this engine has no floor."
    engine = TorchEngine(deep, fp8=scheme, routes=True)
    noise = self_noise(engine, engine.generate(PROMPTS, SAMPLING))
    # the bound of a float32 engine of 30 layers, as in the test below
    assert noise["prefill"].abs().max() < 1e-4 and noise["alone"].abs().max() < 1e-4


@pytest.mark.parametrize("routes", [True, False])
def test_a_float32_engine_agrees_with_itself_at_any_depth(routes, deep):
    found = parity(TorchEngine(deep, routes=routes), deep, PROMPTS, SAMPLING)
    assert found.q90 < 1e-4 and found.floor < 1e-8


def stale_expert(e):
    dict(e.model.named_parameters())["model.layers.17.mlp.experts.down_proj"][3] *= 0.99


def swapped_layer(e):
    layers = e.model.model.layers
    layers[20].self_attn.q_proj.weight.copy_(layers[21].self_attn.q_proj.weight)


def wrong_scale(e):
    e.model.model.layers[9].self_attn.o_proj.weight.mul_(2)


def wrong_frequencies(e):
    e.model.base_model.rotary_emb.inv_freq.mul_(1.1)


def wrong_norm(e):
    e.model.model.layers[12].input_layernorm.variance_epsilon = 0.3


def while_decoding(change):
    def spoil(e):
        def hook(module, args, kwargs):
            if kwargs["input_ids"].shape[1] == 1 and "past_key_values" in kwargs:
                change(kwargs)
            return args, kwargs

        e.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)

    return spoil


shifted_position = while_decoding(lambda k: k.update(position_ids=k["position_ids"] + 1))
hidden_token = while_decoding(lambda k: k["attention_mask"][..., 0].fill_(False))


def lost_key(e):
    "The cache of one layer forgets what was written first."
    attention = e.model.model.layers[15].self_attn

    def hook(module, args, kwargs):
        cache = kwargs["past_key_values"]
        if cache is not None and cache.position is not None:
            cache.layers[15].k[:, :, 0] = 0

    attention.register_forward_pre_hook(hook, with_kwargs=True)


FAULTS = {
    "stale_expert": (stale_expert, r"layers\.17\.mlp\.experts\.down_proj \(expert 3\)"),
    "swapped_layer": (swapped_layer, r"layers\.20\.self_attn\.q_proj\.weight"),
    "wrong_scale": (wrong_scale, r"layers\.9\.self_attn\.o_proj\.weight is off by 1e\+02%"),
    "wrong_frequencies": (wrong_frequencies, "they part at layer 0"),
    "wrong_norm": (wrong_norm, "they part at layer 12"),
    "shifted_position": (shifted_position, "positions, masks or the cache are wrong"),
    "hidden_token": (hidden_token, "positions, masks or the cache are wrong"),
    "lost_key": (lost_key, "positions, masks or the cache are wrong"),
}


@pytest.mark.parametrize("scheme", [None, "fp8_per_channel"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(fault, scheme, deep):
    spoil, words = FAULTS[fault]
    e = TorchEngine(deep, fp8=scheme, routes=True)
    with torch.no_grad():
        spoil(e)
    with pytest.raises(ParityError, match=words):
        parity(e, deep, PROMPTS, SAMPLING)


def test_an_engine_in_another_type_is_compared_in_its_own(deep):
    e = TorchEngine(deep, dtype=torch.bfloat16, routes=True)
    assert parity(e, deep, PROMPTS, SAMPLING).q90 > 1e-3
    e.model.base_model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(ParityError, match="in equal precision"):
        parity(e, deep, PROMPTS, SAMPLING)


def test_the_trainer_is_left_as_it_was(deep):
    before = {n: p.clone() for n, p in deep.named_parameters()}
    parity(TorchEngine(deep, fp8="fp8_per_channel", routes=True), deep, PROMPTS, SAMPLING)
    assert all(torch.equal(p, before[n]) for n, p in deep.named_parameters())
    assert deep.lm_head.weight is deep.model.embed_tokens.weight
    assert all("forward" not in m.__dict__ for m in deep.modules())


def test_paused_rounding_comes_back(deep):
    e = TorchEngine(deep, fp8="fp8_per_block")
    tokens = torch.tensor([PROMPTS[1]])
    weights_only = fp8.restore(TorchEngine(deep, fp8="fp8_per_block").model)(tokens).logits
    rounded = e.model(tokens).logits
    with fp8.paused(e.model):
        assert torch.equal(e.model(tokens).logits, weights_only)
        assert fp8.emulation(e.model) == fp8.SCHEMES["fp8_per_block"]
    assert torch.equal(e.model(tokens).logits, rounded) and not torch.equal(rounded, weights_only)
    with fp8.paused(deep) as same:
        assert same is deep


def test_the_band_follows_the_largest_quantile():
    def found(q90):
        return Parity(tokens=100, median=0.0, q90=q90, max=1.0, k1=0.0, k3=0.0)

    band = widened(None, found(0.04))
    assert band == pytest.approx(0.16)
    assert widened(band, found(0.001)) == band  # it never narrows
    assert widened(band, found(0.05)) == pytest.approx(0.2)
    # a policy that is sure of its tokens: 0.0014 and then 0.0083 were both healthy
    assert widened(None, found(0.0014)) == 0.1
    assert "parity/floor" not in found(0.1).stats()
