"""Engineering tests of fp8:

every bit of the rounding, the scales of each scheme, and emulated Hugging Face models.
"""

import copy

import moe_families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from minirl_nb import e4m3, fp8, routing
from minirl_nb.policy import token_logprobs
from minirl_nb.weights import ratio_stats

E4M3 = torch.float8_e4m3fn
KINDS = ["tensor", "channel", "block"]


# ------------------------------------------------------------------------------------------ numbers
def same_bits(a, b):
    "Equal in every bit, NaN equal to NaN, and +0 equal to -0."
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype


def by_cast(x):
    return x.float().clamp(-448, 448).to(E4M3).to(x.dtype)


def test_every_exponent_sign_and_leading_mantissa_with_ties_and_their_neighbours():
    top = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (top[:, None] | low).flatten().to(torch.int32).view(torch.float32)
    assert same_bits(fp8.round_e4m3(x), by_cast(x))


def test_midpoints_of_all_neighbouring_numbers_round_to_even():
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 .. 448
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat(
        [s * m for s in (1, -1) for m in (middle, middle * (1 + 2**-23), middle * (1 - 2**-24))]
    ).float()
    assert same_bits(fp8.round_e4m3(x), by_cast(x))
    even = fp8.round_e4m3(middle.float()).to(E4M3).view(torch.uint8)
    assert (even % 2 == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same_bits(fp8.round_e4m3(x), by_cast(x))


def test_saturation_infinities_nan_and_double():
    inf, nan = float("inf"), float("nan")
    out = fp8.round_e4m3(
        torch.tensor([448.0, 449, 464, 465, 1e30, inf, -inf, nan, 0.0, 2.0**-10, 2.0**-10 * 1.0001])
    )
    assert (
        out[:7].tolist() == [448.0] * 6 + [-448.0]
        and out[7].isnan()
        and out[8:].tolist() == [0.0, 0.0, 2.0**-9]
    )
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    assert same_bits(fp8.round_e4m3(x), x.to(E4M3).double())
    y = torch.randn(8)
    kept = y.clone()
    fp8.round_e4m3(y)
    assert torch.equal(y, kept), "the argument must not change"


# ------------------------------------------------------------------------------------------- scales
def reference(w, kind):
    "Quantise and dequantise with torch's casts alone, one matrix, row or block at a time."
    if w.ndim > 2:
        return torch.stack([reference(m, kind) for m in w])
    w, out = w.float(), torch.empty(w.shape)
    n, k = w.shape
    step_n, step_k = {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}[kind]
    for i in range(0, n, step_n):
        for j in range(0, k, step_k):
            part = w[i : i + step_n, j : j + step_k]
            amax = part.abs().max()
            if kind == "channel":
                scale = torch.clamp(amax / torch.tensor(448.0), min=1 / (448 * 512))
                q = part / scale
            else:
                scale = (amax.clamp(min=1e-4) if kind == "block" else amax) / torch.tensor(448.0)
                q = part * (1 / scale) if scale > 0 else torch.zeros_like(part)
            out[i : i + step_n, j : j + step_k] = q.clamp(-448, 448).to(E4M3).float() * scale
    return out


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    experts=st.sampled_from([(), (1,), (3,)]),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_weights_round_like_the_casts(kind, experts, n, k, size, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    w = (
        torch.randn(*experts, n, k, generator=g) * size * torch.rand(*experts, n, 1, generator=g)
    ).to(dtype)
    expected = reference(w, kind).to(dtype)
    q, scale = fp8.quantize(w, kind)
    assert q.dtype == E4M3 and scale.dtype == torch.float32
    assert same_bits(fp8.dequantize(q, scale, kind, dtype), expected)
    assert same_bits(fp8.round_weight_(w.clone(), kind), expected)
    shapes = {"tensor": (1, 1), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}
    assert scale.shape == (*experts, *shapes[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(700, 600), (40, 64, 64), (2, 600, 300)])
def test_large_weights_are_rounded_in_pieces_without_a_seam(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert w.numel() > e4m3.PIECE
    assert same_bits(fp8.round_weight_(w.clone(), kind), reference(w, kind))
    t = w.mT.contiguous()
    fp8.round_weight_(t.mT, kind)  # a view that is not contiguous is rounded in place
    assert same_bits(t.mT.contiguous(), reference(w, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_tiny_rows_follow_the_least_scale(kind):
    w = torch.randn(130, 140, generator=torch.Generator().manual_seed(2))
    w[3] = 0
    assert fp8.round_weight_(w, kind)[3].eq(0).all() and w.isfinite().all()
    assert fp8.round_weight_(torch.zeros(4, 4), kind).eq(0).all()
    assert fp8.weight_scale(torch.zeros(1, 4), "channel").item() == pytest.approx(
        1 / (448 * 512), rel=1e-7
    )
    assert fp8.weight_scale(torch.zeros(1, 4), "block").item() == pytest.approx(
        1e-4 / 448, rel=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, bad):
    w = torch.randn(200, 150)
    w[199, 149] = bad
    with pytest.raises(ValueError, match="not finite"):
        fp8.round_weight_(w, kind)
    with pytest.raises(ValueError, match="must be one of tensor, channel, block"):
        fp8.weight_scale(w, "row")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["token", "group"]),
    rows=st.integers(0, 9),
    h=st.integers(1, 300),
    seed=st.integers(0, 2**30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_activations_round_like_the_casts(kind, rows, h, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, rows, h, generator=g) * torch.randn(2, rows, 1, generator=g).exp()).to(
        dtype
    )
    out, expected = fp8.round_activation(x, kind), torch.empty(2, rows, h)
    for a in range(0, h, 128 if kind == "group" else h):
        part = x[..., a : a + (128 if kind == "group" else h)].float()
        scale = (part.abs().amax(-1, keepdim=True) / torch.tensor(448.0)).clamp(min=1 / (448 * 512))
        expected[..., a : a + part.shape[-1]] = (part / scale).clamp(-448, 448).to(
            E4M3
        ).float() * scale
    assert same_bits(out, expected.to(dtype))


def test_a_bad_activation_spoils_its_row_alone_and_a_gradient_passes_straight_through():
    x = torch.randn(5, 8)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    out = fp8.round_activation(x)
    assert out[[1, 3]].isnan().all() and out[[0, 2, 4]].isfinite().all()
    assert fp8.round_activation(torch.zeros(3, 8)).eq(0).all()
    y = torch.randn(5, 8, requires_grad=True)
    w = torch.randn(5, 8)
    (fp8.round_activation(y) * w).sum().backward()
    assert torch.equal(y.grad, w) and torch.equal(
        fp8.round_activation(y).detach(), fp8.round_activation(y.detach())
    )


# ------------------------------------------------------------------------------------------- models
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    "qwen3_moe": MOE,
    "qwen2_moe": MOE | dict(shared_expert_intermediate_size=32),
    "mixtral": dict(num_local_experts=4),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2),
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
SMALL = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    max_position_embeddings=64,
)


def build(family="qwen3_moe", seed=0, **overrides):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES.get(family, {}) | overrides)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_is_rounding_once(kind, dtype):
    w = (
        torch.randn(3, 500, 200, generator=torch.Generator().manual_seed(7)) * torch.rand(3, 500, 1)
    ).to(dtype)
    once = fp8.round_weight_(w.clone(), kind)
    assert torch.equal(fp8.round_weight_(once.clone(), kind), once)


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


@pytest.mark.vllm
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_vllms_own_functions(dtype, size):
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.online import fp8 as online
    from vllm.model_executor.layers.quantization.utils.quant_utils import weight_amax
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    for shape in ((64, 64), (300, 200), (128, 256), (2, 5), (129, 257)):
        g = torch.Generator().manual_seed(shape[0])
        w = (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g) * size).to(
            dtype
        )
        w[0] = 0
        codes, scale = fp8.quantize(w, "block")
        theirs, their_scale = per_block_cast_to_fp8(w, block_size=[128, 128], use_ue8m0=False)
        assert torch.equal(scale, their_scale) and torch.equal(codes.float(), theirs.float())
        codes, scale = fp8.quantize(w, "channel")
        their_scale = online._fp8_channel_scale(weight_amax(w, dim=-1, keepdim=True))
        assert torch.equal(scale, their_scale) and torch.equal(
            codes.float(), online._fp8_quant_per_channel(w, their_scale).float()
        )
        assert torch.equal(
            fp8.weight_scale(w, "tensor").reshape(1), online._fp8_scale(weight_amax(w).reshape(1))
        )
