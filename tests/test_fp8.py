"""Hugging Face models emulated in FP8."""

import copy

import moe_families
import pytest
import small_models
import torch
import torch.nn.functional as F
from test_e4m3 import by_cast, reference, same_bits
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from minirl_nb import fp8, routing
from minirl_nb.policy import token_logprobs
from minirl_nb.weights import ratio_stats

E4M3 = torch.float8_e4m3fn
KINDS = ["tensor", "channel", "block"]


# ------------------------------------------------------------------------------------------- models
FAMILIES = small_models.FAMILIES | {
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "flex_olmo": dict(num_experts=4, num_experts_per_tok=2),
    "glm4_moe": dict(
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
    ),
    "phimoe": dict(num_local_experts=4),
    "llama": {},
    "qwen3": {},
}


def build(family="qwen3_moe", seed=0, **overrides):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, **small_models.SMALL | FAMILIES.get(family, {}) | overrides
    )
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model, seed=0):
    tokens = torch.randint(1, 48, (4, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("none", [None, "none"])
def test_no_scheme_leaves_every_bit_and_k3_is_exactly_zero(none):
    model = build()
    other = fp8.emulate(copy.deepcopy(model), none)
    assert [type(m) for m in other.modules()] == [
        type(m) for m in model.modules()
    ] and fp8.emulation(other) is None
    tokens = torch.randint(1, 48, (4, 9))
    mask = torch.arange(9).expand(4, 9) > 2
    with torch.no_grad():
        a, b = token_logprobs(model, tokens, mask)[0], token_logprobs(other, tokens, mask)[0]
    stats = ratio_stats(a - b, mask)
    assert torch.equal(a, b) and stats["k3"] == 0.0 and stats["k1"] == 0.0 and stats["max"] == 1.0
    with torch.no_grad():
        c = token_logprobs(fp8.emulate(other, "fp8_per_channel"), tokens, mask)[0]
    assert ratio_stats(a - c, mask)["k3"] > 0


@pytest.mark.parametrize("spec", fp8.SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_round_products_and_nothing_else(family, spec):
    model = build(family)
    before, plain = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    untouched = build(family)
    linears, experts = fp8.targets(model)
    rounded = {f"{n}.weight" for n in linears}
    rounded |= {f"{n}.{k}" for n, m in experts.items() for k in m._parameters if k.endswith("proj")}
    assert rounded and not any("lm_head" in n or "embed" in n or "norm" in n for n in rounded)
    fp8.emulate(model, spec)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != (n in rounded), n
        if any(part in n for part in ("router", "gate.weight", "shared_expert_gate")):
            assert n not in rounded
    noisy = logits(model)
    assert noisy.isfinite().all() and not torch.equal(noisy, plain)
    assert torch.equal(logits(untouched), plain), "another model of the process must not notice"
    fp8.restore(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    assert torch.equal(logits(model), plain) and [type(m) for m in model.modules()] == [
        type(m) for m in untouched.modules()
    ]


def test_linears_and_experts_compute_what_the_scheme_says():
    model = fp8.emulate(build(hidden_act="silu"), "fp8_per_channel")
    plain = build(hidden_act="silu")
    layer, theirs = model.model.layers[0], plain.model.layers[0]
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 32, generator=g)

    def rounded(rows):
        scales = [(row.abs().max() / 448).clamp(min=1 / (448 * 512)) for row in rows]
        return torch.stack([by_cast(row / s) * s for row, s in zip(rows, scales)])

    weight = reference(theirs.self_attn.o_proj.weight.detach(), "channel")
    with torch.no_grad():
        assert torch.equal(layer.self_attn.o_proj(x), F.linear(rounded(x), weight))
        _, gates, index = theirs.mlp.gate(x)
        out, expected = layer.mlp.experts(x, index, gates), torch.zeros_like(x)
        up, down = (
            reference(getattr(theirs.mlp.experts, k).detach(), "channel")
            for k in ("gate_up_proj", "down_proj")
        )
        for t in range(7):
            for j in range(2):
                e = int(index[t, j])
                a, b = (up[e] @ rounded(x)[t]).chunk(2)
                expected[t] += gates[t, j] * (down[e] @ rounded((F.silu(a) * b)[None])[0])
    # sums in another order differ by 1e-7, which may move an intermediate across a rounding
    # threshold: 2^-4 of it at most
    off = (out - expected).abs()
    assert off.median() < 1e-7 and off.max() < 2**-4 * expected.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementations_agree(implementation):
    # they sum in other orders (1e-7), which now and then moves an intermediate across a rounding
    # threshold: hence the median
    model = build()
    model.set_experts_implementation(implementation)
    other = build()
    other.set_experts_implementation("grouped_mm")
    a, b = (logits(fp8.emulate(m, "fp8_per_channel")) for m in (model, other))
    assert (a - b).abs().median() < 1e-5


def test_one_rounding_serves_all_readers_of_a_tensor(monkeypatch):
    calls = []
    real = fp8.round_activation
    monkeypatch.setattr(
        fp8, "round_activation", lambda x, kind: calls.append(tuple(x.shape)) or real(x, kind)
    )
    model = fp8.emulate(build("qwen3_moe"), "fp8_per_channel")
    logits(model)
    assert (
        len(calls) == 2 * 4
    )  # per layer: q/k/v together, o, experts' input, experts' intermediate
    calls.clear()
    logits(fp8.emulate(build("llama"), "fp8_per_channel"))
    assert len(calls) == 2 * 4  # q/k/v, o, gate/up, down
    assert all(m._fp8.x is None for m in model.modules() if hasattr(m, "_fp8")), (
        "no activation outlives the forward"
    )


def test_matrices_that_an_engine_fuses_share_their_scales():
    model, plain = fp8.emulate(build("llama"), "fp8_per_tensor"), build("llama")
    for layer, ref in zip(model.model.layers, plain.model.layers):
        for block, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            ws = [getattr(getattr(ref, block), f"{n}_proj").weight.detach() for n in names]
            fused = reference(torch.cat(ws), "tensor").split([len(w) for w in ws])
            for n, w in zip(names, fused):
                assert same_bits(getattr(getattr(layer, block), f"{n}_proj").weight.detach(), w)
    moe, ref = fp8.emulate(build(), "fp8_per_block"), build()
    w, r = (m.model.layers[0].mlp.experts.gate_up_proj.detach() for m in (moe, ref))
    assert same_bits(w, torch.cat([reference(h.contiguous(), "block") for h in r.chunk(2, 1)], 1))
    gpt, ref = fp8.emulate(build("gpt_oss"), "fp8_per_channel"), build("gpt_oss")
    w, r = (m.model.layers[0].mlp.experts.gate_up_proj.detach() for m in (gpt, ref))
    assert same_bits(
        w.mT.contiguous(), reference(r.mT.contiguous(), "channel")
    )  # stored [input, output]


# ------------------------------------------------------------------------ life of an emulated model
@pytest.mark.parametrize("spec", [None, *fp8.SCHEMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_equals_a_new_emulation_of_the_new_weights(spec, dtype):
    engine = fp8.emulate(build(seed=0).to(dtype), spec)
    trainer = build(seed=1)
    addresses = [p.data_ptr() for p in engine.parameters()]
    fp8.load_(engine, trainer.named_parameters())
    fresh = fp8.emulate(build(seed=1).to(dtype), spec)
    assert all(torch.equal(a, b) for a, b in zip(engine.parameters(), fresh.parameters()))
    assert addresses == [p.data_ptr() for p in engine.parameters()]
    assert torch.equal(logits(engine), logits(fresh)) and logits(engine).dtype == dtype


def test_load_takes_a_state_dict_with_tied_weights_and_names_what_is_wrong():
    engine = fp8.emulate(build(tie_word_embeddings=True), "fp8_per_channel")
    trainer = build(seed=1, tie_word_embeddings=True)
    fp8.load_(engine, trainer.state_dict())
    fp8.load_(engine, trainer.named_parameters())
    assert torch.equal(engine.lm_head.weight, trainer.model.embed_tokens.weight)
    other = build("glm4_moe", seed=1)
    assert len(other.state_dict()) > len(dict(other.named_parameters())), "buffers of the routers"
    fp8.load_(build("glm4_moe"), other.state_dict())
    weights = dict(trainer.named_parameters())
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(KeyError, match=f"no new value for {name}"):
        fp8.load_(engine, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(KeyError, match="layers.9.q is no parameter of Qwen3MoeForCausalLM"):
        fp8.load_(engine, weights | {"layers.9.q": weights[name]})
    with pytest.raises(ValueError, match=f"{name} is .*, must be"):
        fp8.load_(engine, weights | {name: weights[name][:2]})
    with pytest.raises(ValueError, match=f"{name}: weights are not finite"):
        fp8.load_(engine, weights | {name: torch.full_like(weights[name], float("nan"))})


def test_a_copy_of_an_emulated_model_stands_on_its_own():
    model = fp8.emulate(build(), "fp8_per_channel")
    twin = copy.deepcopy(model)
    before = logits(model)
    assert (
        torch.equal(logits(twin), before)
        and fp8.emulation(twin) == fp8.emulation(model) == fp8.SCHEMES["fp8_per_channel"]
    )
    fp8.load_(twin, build(seed=1).named_parameters())
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    with pytest.raises(ValueError, match="emulated already"):
        fp8.emulate(twin, "fp8_per_tensor")


def test_the_context_gives_every_bit_back_also_after_an_error():
    model = build()
    before, plain = [p.clone() for p in model.parameters()], logits(model)
    with fp8.emulated(model, "fp8_per_block") as m:
        assert m is model and not torch.equal(logits(m), plain)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and torch.equal(
        logits(model), plain
    )
    with pytest.raises(RuntimeError, match="stop"), fp8.emulated(model, "fp8_per_tensor"):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), plain)


def test_what_cannot_be_emulated_is_refused_by_name():
    with pytest.raises(
        ValueError, match="unknown FP8 scheme 'fp4'; use none or one of fp8_per_tensor"
    ):
        fp8.scheme("fp4")
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layer"):
        fp8.emulate(build("gpt2", n_embd=32, n_layer=1, n_head=2), "fp8_per_channel")
    with pytest.raises(
        NotImplementedError, match=r"layers.0.mlp.input_linear \(JetMoeParallelExperts\)"
    ):
        fp8.emulate(build("jetmoe", kv_channels=8), "fp8_per_channel")
    with pytest.raises(ValueError, match="embed_tokens.weight is torch.float64"):
        fp8.emulate(build().double(), "fp8_per_channel")
    sharded = build()
    sharded.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="layers.0.mlp.experts is sharded"):
        fp8.emulate(sharded, "fp8_per_channel")
    assert all(not type(m).__name__.startswith("FP8") for m in sharded.modules()), (
        "a refused model stays as it was"
    )
    skipped = fp8.targets(build(), skip=r"layers\.0\.")[0]
    assert skipped and not any("layers.0." in n for n in skipped)


def test_training_through_an_emulated_model_reaches_every_weight():
    model = fp8.emulate(build(), "fp8_per_channel")
    tokens = torch.randint(1, 48, (4, 9))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


REFUSED = {
    "dbrx": "ffn.experts.mlp .DbrxExpertGLU",
    "inkling": "InklingSharedExperts",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
}


@pytest.mark.parametrize("family", moe_families.discover())
def test_every_moe_family_of_transformers_is_emulated_or_refused_by_name(family):
    model = moe_families.build(moe_families.discover()[family])
    if family in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[family]):
            fp8.emulate(model, "fp8_per_channel")
        return
    try:
        routers = routing.routers(model)
    except TypeError:
        routers = {}  # doge cannot be replayed
    blocks = {n for n, m in model.named_modules() if fp8.is_experts(m)}

    def inside(name, router):
        of_block = any(b.startswith(router + ".") for b in blocks)
        return name == router or (name.startswith(router + ".") and not of_block)

    assert not [n for n in fp8.targets(model)[0] if any(inside(n, r) for r in routers)], (
        "a router must not be rounded"
    )
    tokens = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(tokens).logits
        noisy = fp8.emulate(model, "fp8_per_channel")(tokens).logits
    assert noisy.isfinite().all() and not torch.equal(noisy, plain)
