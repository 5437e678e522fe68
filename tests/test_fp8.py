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

from minirl_nb import formats, fp8, routing
from minirl_nb.policy import token_logprobs
from minirl_nb.weights import ratio_stats

E4M3 = torch.float8_e4m3fn
KINDS = ["tensor", "channel", "block"]


# ------------------------------------------------------------------------------------------- models
GROUPED = dict(  # DeepSeek's kind of mixture
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=0,
)
FAMILIES = small_models.FAMILIES | {
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "flex_olmo": dict(num_experts=4, num_experts_per_tok=2),
    "glm4_moe": GROUPED,
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
    rounded = rounded if fp8.SCHEMES[spec].weight else set()
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


@pytest.mark.parametrize("spec", ["fp8_per_channel", "fp8_e5m2", "mxfp8", "mxfp4", "nvfp4"])
def test_linears_and_experts_compute_what_the_scheme_says(spec):
    model = fp8.emulate(build(hidden_act="silu"), spec)
    plain = build(hidden_act="silu")
    layer, theirs = model.model.layers[0], plain.model.layers[0]
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 32, generator=g)

    def rounded(rows):
        if spec != "fp8_per_channel":  # the formats' own tests have their definitions
            return formats.round_activation(rows, spec.removeprefix("fp8_"))
        scales = [(row.abs().max() / 448).clamp(min=1 / (448 * 512)) for row in rows]
        return torch.stack([by_cast(row / s) * s for row, s in zip(rows, scales)])

    def rounded_weight(w):
        if spec == "fp8_per_channel":
            return reference(w, "channel")
        return formats.round_weight_(w.clone(), spec.removeprefix("fp8_"))

    weight = rounded_weight(theirs.self_attn.o_proj.weight.detach())
    with torch.no_grad():
        assert torch.equal(layer.self_attn.o_proj(x), F.linear(rounded(x), weight))
        _, gates, index = theirs.mlp.gate(x)
        out, expected = layer.mlp.experts(x, index, gates), torch.zeros_like(x)
        up, down = (
            rounded_weight(getattr(theirs.mlp.experts, k).detach())
            for k in ("gate_up_proj", "down_proj")
        )
        for t in range(7):
            for j in range(2):
                e = int(index[t, j])
                a, b = (up[e] @ rounded(x)[t]).chunk(2)
                expected[t] += gates[t, j] * (down[e] @ rounded((F.silu(a) * b)[None])[0])
    # sums in another order differ by 1e-7, which may move an intermediate across a rounding
    # threshold: 2^-4 of it at most with three bits of mantissa, 2^-3 with two, 2^-2 with one
    step = {"fp8_e5m2": 2**-3, "mxfp4": 2**-2, "nvfp4": 2**-2}.get(spec, 2**-4)
    off = (out - expected).abs()
    assert off.median() < 1e-7 and off.max() < step * expected.abs().max()


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
        ValueError, match="unknown low-precision scheme 'fp4'; use none or one of fp8_per_tensor"
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


# ------------------------------------------------------------------------------- formats and caches
def test_schemes_say_their_bits_and_refuse_unknown_kinds():
    bits = {name: s.bits for name, s in fp8.SCHEMES.items()}
    assert bits["fp8_per_channel"] == bits["fp8_e5m2"] == 8 and bits["mxfp8"] == 8.25
    assert bits["nvfp4"] == bits["nvfp4_weights"] == 4.5 and bits["mxfp4"] == 4.25
    assert bits["fp8_cache"] is None
    assert len(set(fp8.SCHEMES.values())) == len(fp8.SCHEMES), "a scheme has one name"
    with pytest.raises(ValueError, match="weight 'int4' must be None or one of tensor, .*nvfp4"):
        fp8.Scheme("int4")
    with pytest.raises(ValueError, match="activation 'block' must be None or one of token"):
        fp8.Scheme("channel", "block")
    with pytest.raises(ValueError, match="activation 'token' needs rounded weights"):
        fp8.Scheme(None)


def test_weights_alone_leave_activations_as_they_are():
    model = fp8.emulate(build(), "nvfp4_weights")
    same = build()
    fp8.load_(same, model.named_parameters())
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_formats_of_blocks_round_fused_matrices_as_an_engine_holds_them(kind):
    "One scale for q, k and v under NVFP4; rows apart under MXFP4, where it makes no difference."
    model, plain = fp8.emulate(build("llama"), kind), build("llama")
    for layer, ref in zip(model.model.layers, plain.model.layers):
        for block, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            ws = [getattr(getattr(ref, block), f"{n}_proj").weight.detach() for n in names]
            fused = formats.round_weight_(torch.cat(ws), kind).split([len(w) for w in ws])
            for n, w in zip(names, fused):
                assert torch.equal(getattr(getattr(layer, block), f"{n}_proj").weight, w)
    gpt, ref = fp8.emulate(build("gpt_oss"), kind), build("gpt_oss")
    w, r = (m.model.layers[0].mlp.experts.gate_up_proj.detach() for m in (gpt, ref))
    expected = formats.round_weight_(r.mT.contiguous(), kind)  # stored [input, output]
    assert torch.equal(w.mT.contiguous(), expected)


def scaled_attention(model, factor=40.0):
    "The model with large keys and values: E4M3 holds none of them exactly."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                p.mul_(factor)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama", "glm4_moe"])
def test_a_rounded_cache_is_rounded_once_with_a_cache_and_without(family, monkeypatch):
    "Keys and values of each token, after the rotation, and nothing else."
    plain = scaled_attention(build(family))
    model = fp8.emulate(copy.deepcopy(plain), "fp8_cache")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    seen = []
    real = fp8.round_cache
    monkeypatch.setattr(fp8, "round_cache", lambda x: seen.append(x.shape[-2]) or real(x))
    tokens = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        assert seen == [9] * 2 * 2, "keys and values of two layers"
        seen.clear()
        start = model(tokens[:, :5], use_cache=True)
        out, kept = [start.logits], start.past_key_values
        for t in range(5, 9):
            out.append(model(tokens[:, t : t + 1], past_key_values=kept, use_cache=True).logits)
    assert seen == [5] * 4 + [1] * 4 * 4
    for layer in kept.layers:
        for states in (layer.keys, layer.values):
            assert torch.equal(states, by_cast(states)), "the cache holds E4M3 numbers"
    # sums in another order may move a number across a threshold: the median says what was computed
    assert (torch.cat(out, 1) - whole).abs().median() < 1e-5
    with torch.no_grad():
        assert (whole - plain(tokens).logits).abs().median() > 1e-4
        assert torch.equal(fp8.restore(model)(tokens).logits, plain(tokens).logits)


def test_attention_over_a_rounded_cache_is_that_of_rounded_keys_and_values():
    "Against attention written out for one layer: weights, rotation and sums by hand."
    model = scaled_attention(build("llama", num_hidden_layers=1))
    tokens = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(2))
    layer, hidden = model.model.layers[0], model.model.embed_tokens(tokens)
    x = layer.input_layernorm(hidden)
    a = layer.self_attn
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
    cos, sin = model.model.rotary_emb(x, torch.arange(7)[None])

    def rotate(y):
        half = torch.cat([-y[..., 4:], y[..., :4]], -1)
        return y * cos[:, None] + half * sin[:, None]

    q, k, v = rotate(q), by_cast(rotate(k)), by_cast(v)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    mixed = (scores @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    expected = a.o_proj(mixed)
    with fp8.emulated(model, "fp8_cache"):
        out = a(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    assert torch.allclose(out, expected, atol=1e-5 * float(expected.detach().abs().max()))
    assert not torch.allclose(a(x, position_embeddings=(cos, sin), attention_mask=None)[0], out)


def test_a_cache_that_cannot_be_rounded_is_refused():
    with pytest.raises(NotImplementedError, match="layers.0.self_attn keeps a latent in its cache"):
        fp8.emulate(
            build(
                "deepseek_v3",
                **GROUPED,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                num_key_value_heads=4,
            ),
            "fp8_per_block_cache",
        )


# ---------------------------------------------------------------------------------------- settings
def test_settings_know_every_scheme_by_name():
    from minirl_nb.config import LowPrecision, RolloutConfig

    assert LowPrecision.__args__ == ("none", *fp8.SCHEMES)
    assert RolloutConfig.__annotations__["fp8"] == LowPrecision


@pytest.mark.parametrize("name", fp8.SCHEMES)
def test_vllm_takes_what_it_can_compute_and_refuses_the_rest_in_a_sentence(name):
    from minirl_nb.vllm.requests import engine_arguments

    config, s = build("qwen3_moe").config, fp8.SCHEMES[name]
    for cpu, able in ((True, not s.cache), (False, name in fp8.VLLM_SCHEMES)):
        if able:
            found = engine_arguments(config, torch.float32, s, cpu=cpu)["quantization"]
            assert found == ("minirl_" if cpu else "") + name
            continue
        where = "a CPU" if cpu else "an accelerator"
        said = f"vLLM on {where} cannot round as {name}; it knows .*torch engine emulates every"
        with pytest.raises(ValueError, match=said) as error:
            engine_arguments(config, torch.float32, s, cpu=cpu)
        assert "\n" not in str(error.value)
    mine = fp8.Scheme("mxfp4", "token")  # a scheme without a name
    with pytest.raises(ValueError, match=r"cannot round as Scheme\(weight='mxfp4'"):
        engine_arguments(config, torch.float32, mine, cpu=True)
