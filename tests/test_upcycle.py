"""A mixture of experts from a dense model: the same function, and what is refused."""

import copy

import pytest
import real_model
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minirl_nb.cli import main
from minirl_nb.rollout import Sampling, TorchEngine, parity
from minirl_nb.routing import routers
from minirl_nb.upcycle import UpcycleConfig, describe, expert_load, upcycle

SIZES = dict(
    vocab_size=80,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
TOKENS = torch.randint(2, 80, (4, 24), generator=torch.Generator().manual_seed(0))
DENSE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama_scaled_positions": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)),
}


def dense(family):
    torch.manual_seed(1)
    model = DENSE[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.3, 1.5)
    return model


def gap(model, mixture):
    with torch.no_grad():
        before, after = model(TOKENS).logits, mixture(TOKENS).logits
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 8, "top_k": 2},
        {"experts": 4, "top_k": 1},
        {"experts": 8, "top_k": 4, "slices": 4},
        {"experts": 9, "top_k": 6, "slices": 3},
    ],
)
@pytest.mark.parametrize("family", DENSE)
def test_without_noise_it_is_the_same_function(family, options):
    model = dense(family)
    mixture = upcycle(model, UpcycleConfig(**options, noise=0.0, router=1.0))
    # sums of 96 numbers in three layers, added in another order: some tens of 6e-8
    assert gap(model, mixture) < 5e-6
    assert len(routers(mixture)) == 3
    tied = mixture.lm_head.weight is mixture.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


def test_paired_routers_choose_one_copy_of_each_slice():
    model = dense("llama")
    config = UpcycleConfig(experts=8, top_k=4, slices=4, routers="paired", noise=0.0, router=1e-4)
    mixture = upcycle(model, config)
    assert gap(model, mixture) < 3e-3  # first order in the size of the rows
    r = TorchEngine(mixture, routes=True).generate([[5, 6, 7]], Sampling(n=4, max_new_tokens=8))
    chosen = r.routes[r.routes_valid].long()  # [n, L, 4]
    assert torch.equal(chosen.remainder(4).sort(-1).values.unique(), torch.arange(4))
    assert (chosen.remainder(4).sort(-1).values == torch.arange(4)).all()
    assert len(chosen.sort(-1).values.flatten(0, 1).unique(dim=0)) > 2  # not only whole copies


def test_noise_parts_the_experts_and_a_seed_repeats_them():
    model = dense("llama")
    first, again, other = (
        upcycle(model, UpcycleConfig(noise=0.1, seed=seed)).model.layers[0].mlp.experts.down_proj
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    w = model.model.layers[0].mlp.down_proj.weight
    share = (first - w).std(dim=(1, 2)) / w.std()
    assert (share - 0.1).abs().max() < 0.01  # 4,608 numbers: 0.1 / sqrt(9216) = 0.001
    assert len({float(e.detach().sum()) for e in first}) == 8


def test_the_dense_model_is_left_alone_and_a_mixture_trains():
    model = dense("llama")
    before = copy.deepcopy(model.state_dict())
    mixture = upcycle(model, UpcycleConfig(noise=0.1))
    mixture(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert parity(TorchEngine(mixture, routes=True), mixture, [[5, 6], [7]]).q90 < 1e-4


@pytest.mark.parametrize(
    "options, words",
    [
        ({"experts": 6, "slices": 4, "top_k": 4}, "both must be multiples"),
        ({"experts": 4, "top_k": 8}, "top_k at most experts"),
        ({"experts": 12, "slices": 4, "top_k": 4, "routers": "paired"}, "needs two copies"),
        ({"noise": -0.1}, "noise must not be negative"),
        ({"router": 0.0}, "router must be positive"),
        ({"experts": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        UpcycleConfig(**options)


def test_families_without_a_mixture_are_refused_with_the_reason():
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    with pytest.raises(ValueError, match="shared expert"):
        upcycle(Qwen2ForCausalLM(Qwen2Config(**sizes)), UpcycleConfig())
    biased = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    with pytest.raises(ValueError, match="has biases"):
        upcycle(biased, UpcycleConfig())
    with pytest.raises(ValueError, match="does not divide the width 96"):
        upcycle(dense("llama"), UpcycleConfig(experts=10, top_k=5, slices=5))
    mixture = upcycle(dense("llama"), UpcycleConfig())
    with pytest.raises(ValueError, match="no mixture for mixtral"):
        upcycle(mixture, UpcycleConfig())


def test_counts_are_those_of_the_weights():
    model = dense("qwen3")
    mixture = upcycle(model, UpcycleConfig(experts=8, top_k=2))
    text = describe(model, mixture)
    every = sum(p.numel() for p in mixture.parameters())
    of_expert = 3 * 96 * 48
    assert (
        f"{every / 1e6:.1f} M, of which a token uses {(every - 18 * of_expert) / 1e6:.1f} M" in text
    )
    assert "gate_up_proj [8, 192, 48]" in text and "router [8, 48]" in text


def test_load_of_experts():
    routes = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    routes[..., 1] = 1
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert expert_load(routes, valid, 4).tolist() == [[2.0, 2.0, 0.0, 0.0]]
    routes[0, 0, 0] = torch.tensor([2, 3], dtype=torch.uint8)
    assert expert_load(routes, valid, 4)[0].tolist() == pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])


# -------------------------------------------------------------------------------- the real model
def test_the_real_model_by_command(tmp_path, capsys):
    "30 layers, tied head, a vocabulary of 49,152: shapes first, then the same logits from the file."
    source = real_model.smollm2()
    words = ["upcycle", str(source), str(tmp_path / "moe"), "--experts", "4", "--top_k", "2"]
    assert main([*words, "--slices", "2", "--noise", "0"]) == 0
    out = capsys.readouterr().out
    assert "134.5 M parameters" in out and "30 layers of 4 experts, 2 a token" in out
    assert main(words) == 2 and "is not empty" in capsys.readouterr().err
    assert "lm_head.weight" not in load_file(tmp_path / "moe" / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids = torch.tensor([tokenizer("The capital of France is Paris.")["input_ids"]])
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits
            for place in (source, tmp_path / "moe")
        )
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    assert tokenizer.decode(after[0, -2].argmax()) == "."
