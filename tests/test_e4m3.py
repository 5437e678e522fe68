"""Every bit of the rounding and the scales, against torch's casts and vLLM's functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb import e4m3

E4M3 = torch.float8_e4m3fn
KINDS = ["tensor", "channel", "block"]


def same_bits(a, b):
    "Equal in every bit, NaN equal to NaN, and +0 equal to -0."
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) and a.dtype == b.dtype


def by_cast(x):
    return x.float().clamp(-448, 448).to(E4M3).to(x.dtype)


def test_every_exponent_sign_and_leading_mantissa_with_ties_and_their_neighbours():
    top = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (top[:, None] | low).flatten().to(torch.int32).view(torch.float32)
    assert same_bits(e4m3.round_e4m3(x), by_cast(x))


def test_midpoints_of_all_neighbouring_numbers_round_to_even():
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 .. 448
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat(
        [s * m for s in (1, -1) for m in (middle, middle * (1 + 2**-23), middle * (1 - 2**-24))]
    ).float()
    assert same_bits(e4m3.round_e4m3(x), by_cast(x))
    even = e4m3.round_e4m3(middle.float()).to(E4M3).view(torch.uint8)
    assert (even % 2 == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same_bits(e4m3.round_e4m3(x), by_cast(x))


def test_saturation_infinities_nan_and_double():
    inf, nan = float("inf"), float("nan")
    out = e4m3.round_e4m3(
        torch.tensor([448.0, 449, 464, 465, 1e30, inf, -inf, nan, 0.0, 2.0**-10, 2.0**-10 * 1.0001])
    )
    assert (
        out[:7].tolist() == [448.0] * 6 + [-448.0]
        and out[7].isnan()
        and out[8:].tolist() == [0.0, 0.0, 2.0**-9]
    )
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    assert same_bits(e4m3.round_e4m3(x), x.to(E4M3).double())
    y = torch.randn(8)
    kept = y.clone()
    e4m3.round_e4m3(y)
    assert torch.equal(y, kept), "the argument must not change"


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
    q, scale = e4m3.quantize(w, kind)
    assert q.dtype == E4M3 and scale.dtype == torch.float32
    assert same_bits(e4m3.dequantize(q, scale, kind, dtype), expected)
    assert same_bits(e4m3.round_weight_(w.clone(), kind), expected)
    shapes = {"tensor": (1, 1), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}
    assert scale.shape == (*experts, *shapes[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(700, 600), (40, 64, 64), (2, 600, 300)])
def test_large_weights_are_rounded_in_pieces_without_a_seam(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert w.numel() > e4m3.PIECE
    assert same_bits(e4m3.round_weight_(w.clone(), kind), reference(w, kind))
    t = w.mT.contiguous()
    e4m3.round_weight_(t.mT, kind)  # a view that is not contiguous is rounded in place
    assert same_bits(t.mT.contiguous(), reference(w, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_tiny_rows_follow_the_least_scale(kind):
    w = torch.randn(130, 140, generator=torch.Generator().manual_seed(2))
    w[3] = 0
    assert e4m3.round_weight_(w, kind)[3].eq(0).all() and w.isfinite().all()
    assert e4m3.round_weight_(torch.zeros(4, 4), kind).eq(0).all()
    assert e4m3.weight_scale(torch.zeros(1, 4), "channel").item() == pytest.approx(
        1 / (448 * 512), rel=1e-7
    )
    assert e4m3.weight_scale(torch.zeros(1, 4), "block").item() == pytest.approx(
        1e-4 / 448, rel=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, bad):
    w = torch.randn(200, 150)
    w[199, 149] = bad
    with pytest.raises(ValueError, match="not finite"):
        e4m3.round_weight_(w, kind)
    with pytest.raises(ValueError, match="must be one of tensor, channel, block"):
        e4m3.weight_scale(w, "row")


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
    out, expected = e4m3.round_activation(x, kind), torch.empty(2, rows, h)
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
    out = e4m3.round_activation(x)
    assert out[[1, 3]].isnan().all() and out[[0, 2, 4]].isfinite().all()
    assert e4m3.round_activation(torch.zeros(3, 8)).eq(0).all()
    y = torch.randn(5, 8, requires_grad=True)
    w = torch.randn(5, 8)
    (e4m3.round_activation(y) * w).sum().backward()
    assert torch.equal(y.grad, w) and torch.equal(
        e4m3.round_activation(y).detach(), e4m3.round_activation(y.detach())
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_is_rounding_once(kind, dtype):
    w = (
        torch.randn(3, 500, 200, generator=torch.Generator().manual_seed(7)) * torch.rand(3, 500, 1)
    ).to(dtype)
    once = e4m3.round_weight_(w.clone(), kind)
    assert torch.equal(e4m3.round_weight_(once.clone(), kind), once)


@pytest.mark.vllm
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_vllms_own_functions(dtype, size, vllm_functions):
    from vllm.model_executor.layers.quantization.online import fp8 as online
    from vllm.model_executor.layers.quantization.utils.quant_utils import weight_amax
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    # as written: compiled, as vLLM has it, each new shape and dtype costs the compiler minutes
    by_blocks = per_block_cast_to_fp8.__wrapped__
    for shape in ((64, 64), (300, 200), (128, 256), (2, 5), (129, 257)):
        g = torch.Generator().manual_seed(shape[0])
        w = (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g) * size).to(
            dtype
        )
        w[0] = 0
        codes, scale = e4m3.quantize(w, "block")
        theirs, their_scale = by_blocks(w, block_size=[128, 128], use_ue8m0=False)
        assert torch.equal(scale, their_scale) and torch.equal(codes.float(), theirs.float())
        codes, scale = e4m3.quantize(w, "channel")
        their_scale = online._fp8_channel_scale(weight_amax(w, dim=-1, keepdim=True))
        assert torch.equal(scale, their_scale) and torch.equal(
            codes.float(), online._fp8_quant_per_channel(w, their_scale).float()
        )
        assert torch.equal(
            e4m3.weight_scale(w, "tensor").reshape(1), online._fp8_scale(weight_amax(w).reshape(1))
        )
