"""Numbers in a few bits and scales of blocks, against other libraries and the definition."""

import base64
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_e4m3 import same_bits

from minirl_nb import bits, e4m3, formats

THEIRS = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
}
TORCHS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
NUMBERS = pytest.mark.parametrize("number", bits.NUMBERS.values(), ids=bits.NUMBERS)
KINDS = pytest.mark.parametrize("kind", formats.FORMATS)


def cast(x, number):
    "float32 through ml_dtypes' type and back, saturating first."
    limit = float(ml_dtypes.finfo(THEIRS[number.name]).max)
    return torch.from_numpy(
        np.clip(x.numpy(), -limit, limit).astype(THEIRS[number.name]).astype(np.float32)
    )


# ------------------------------------------------------------------------------------------ numbers
@NUMBERS
def test_every_code_means_what_ml_dtypes_says(number):
    codes = np.arange(2**number.bits, dtype=np.uint8).view(THEIRS[number.name])
    theirs = torch.from_numpy(codes.astype(np.float32))
    ours = number.values()
    assert same_bits(ours, theirs)
    numbers = ~theirs.isnan()
    assert torch.equal(ours[numbers].signbit(), theirs[numbers].signbit())
    if number.name in TORCHS:
        codes = torch.arange(256, dtype=torch.uint8).view(TORCHS[number.name])
        assert same_bits(ours, codes.float())
    info = ml_dtypes.finfo(THEIRS[number.name])
    assert number.bits == info.bits and number.greatest == float(info.max)
    assert number.least_normal == float(info.smallest_normal)
    assert number.least == float(info.smallest_subnormal)


@NUMBERS
def test_every_tie_and_its_neighbours(number):
    grid = number.values()
    grid = grid[grid.isfinite()].double().unique()
    middle = ((grid[1:] + grid[:-1]) / 2).float()  # exact: one bit more than the format's
    away = [torch.nextafter(middle, torch.tensor(s * torch.inf)) for s in (1, -1)]
    x = torch.cat([middle, *away, grid.float()])
    assert same_bits(bits.round_to(x, number), cast(x, number))
    last = (bits.round_to(middle, number).abs()[:, None] == number.values()).int().argmax(1)
    assert (last % 2 == 0).all(), "a tie goes to the code whose last bit is zero"


@NUMBERS
def test_every_exponent_sign_and_leading_mantissa(number):
    top = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (top[:, None] | low).flatten().to(torch.int32).view(torch.float32)
    ours = bits.round_to(x, number)
    numbers = ~x.isnan()  # the narrow formats have no NaN: theirs becomes a number, ours stays
    assert same_bits(ours[numbers], cast(x[numbers], number)) and ours[~numbers].isnan().all()


@NUMBERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_go_through_float32(number, dtype):
    if dtype == torch.float64:
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(4000) * 5)
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[~x.isnan()]
    assert same_bits(bits.round_to(x, number), cast(x.float(), number).to(dtype))


# ------------------------------------------------------------------------------------------- scales
def test_powers_of_two_are_e8m0_numbers():
    "All magnitudes with each exponent, at and beside the places where a rule turns."
    exponent = torch.arange(1, 255, dtype=torch.int64) << 23
    mantissa = torch.tensor([0, 1, 0x1FFFFF, 0x200000, 0x3FFFFF, 0x400000, 0x600000, 0x7FFFFF])
    amax = (exponent[:, None] | mantissa).flatten().to(torch.int32).view(torch.float32)
    amax = amax[amax < 1.4 * 2.0**127]  # beyond, a magnitude may round to 2^128
    exact = amax.double()
    for number in bits.NUMBERS.values():
        found = {r: formats.power_of_two(amax, number, r) for r in ("floor", "even", "ceil")}
        for scale in found.values():
            assert same_bits(
                scale,
                torch.from_numpy(scale.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)),
            )
        floor = 2.0 ** (exact.log2() + 1e-12).floor() / 2**number.top
        assert torch.equal(found["floor"].double(), floor.clamp(min=2.0**-127))
        # of the mantissa rounded half up, to the format's bits
        step = 2.0 ** (exact.log2() + 1e-12).floor() / 2**number.mantissa
        rounded = ((exact / step + 0.5).floor() * step).log2()
        even = 2.0 ** (rounded + 1e-12).floor() / 2**number.top
        assert torch.equal(found["even"].double(), even.clamp(min=2.0**-127))
        quotient = (amax / number.greatest).double()
        enough = found["ceil"].double() >= quotient
        least = (found["ceil"].double() / 2 < quotient) | (found["ceil"] <= 2.0**-126)
        assert enough.all() and least.all()


def test_e8m0_holds_where_float32_ends():
    for rule in ("floor", "even", "ceil"):
        scale = formats.power_of_two(
            torch.tensor([0.0, 1e-45, 2.5e38, torch.inf, torch.nan]), bits.E4M3, rule
        )
        assert scale[:2].tolist() == [2.0**-127] * 2 and scale[2].isfinite()
        assert scale[3:].isinf().all()


# ----------------------------------------------------------------------------- published libraries
PUBLISHED = json.loads(Path(__file__).with_name("microscaling.json").read_text())


def numbers(text):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy()).view(-1, 32)


@pytest.mark.parametrize(
    "library, kind", [(n, k) for n in ("microxcaling", "torchao") for k in PUBLISHED[n]]
)
def test_blocks_round_as_in_published_libraries(library, kind):
    "What microxcaling and torchao gave, kept by record_microscaling.py."
    x, theirs = numbers(PUBLISHED["input"]), numbers(PUBLISHED[library][kind])
    assert same_bits(formats.round_activation(x, kind), theirs)
    assert same_bits(formats.round_weight_(x.clone(), kind), theirs)


@pytest.mark.vllm
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_and_mxfp8_are_those_of_vllm(dtype, size, vllm_functions):
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils, nvfp4_emulation_utils

    for n, k in ((1, 16), (5, 48), (64, 256)):
        x = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * size
        x[0, :16] = 0
        x[-1] *= 1e-4  # its blocks' scales are E4M3 numbers below the normal ones
        x = x.to(dtype)
        whole = formats.whole_scale(x.abs().max().float(), bits.E2M1)
        codes, scale = nvfp4_emulation_utils.ref_nvfp4_quant(x, whole, 16)
        ours, over = formats.quantize_blocks(
            e4m3.grouped(x.float(), 16), formats.FORMATS["nvfp4"], whole
        )
        assert same_bits(ours.flatten(1), codes) and same_bits(over[..., 0], scale / whole)
        theirs = nvfp4_emulation_utils.ref_nvfp4_quant_dequant(x, whole, 16)
        assert same_bits(formats.round_weight_(x.clone(), "nvfp4"), theirs)
        if k % 32 == 0:
            codes, scale = mxfp8_utils._mxfp8_e4m3_quantize_torch(x)
            theirs = codes.float().unflatten(1, (-1, 32)) * 2.0 ** (scale[..., None].float() - 127)
            assert same_bits(formats.round_activation(x, "mxfp8_ceil"), theirs.flatten(1).to(dtype))


# --------------------------------------------------------------------------------- the whole tensor
def reference(x, kind):
    "One row of float64 numbers at a time, by the table of the page, with ml_dtypes' types alone."
    form = formats.FORMATS[kind]
    theirs, m = THEIRS[form.number.name], float(ml_dtypes.finfo(THEIRS[form.number.name]).max)
    out = np.empty(x.shape, np.float32)
    A = np.float32(max(np.abs(x).max(), np.float32(1e-8)))
    for i in range(len(x)):
        for a in range(0, x.shape[1], form.block or x.shape[1]):
            part = x[i, a : a + (form.block or x.shape[1])]
            largest = np.abs(part).max()
            if kind == "nvfp4":
                g = (1 / A) * np.float32(448 * m)  # torch divides a number by a tensor so
                inner = np.minimum(largest * np.float32(1 / m) * g, np.float32(448))
                inner = np.float32(inner.astype(ml_dtypes.float8_e4m3fn))
                scale = inner / g
                times = 1 / (inner * (1 / g)) if inner else np.float32(0)
                y = part * times
            else:
                if kind == "e5m2":
                    scale = np.maximum(largest / np.float32(m), np.float32(2.0**-126))
                else:
                    exponent = np.frexp(largest)[1] - 1 - form.number.top if largest else -127
                    scale = np.float32(2.0 ** max(exponent, -127))
                y = part / scale
            rounded = np.clip(y, -m, m).astype(np.float32).astype(theirs).astype(np.float32)
            out[i, a : a + len(part)] = rounded * scale
    return torch.from_numpy(out)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([k for k in formats.FORMATS if not k.endswith(("ceil", "even"))]),
    n=st.integers(1, 12),
    k=st.integers(1, 100),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_and_matrices_round_by_the_definition(kind, n, k, size, seed, dtype):
    random = np.random.default_rng(seed)
    w = torch.from_numpy(random.standard_t(3, (n, k)) * size).to(dtype)
    expected = reference(w.float().numpy(), kind).to(dtype)
    assert same_bits(formats.round_weight_(w.clone(), kind), expected)
    rows = torch.stack([reference(r[None].float().numpy(), kind)[0] for r in w]).to(dtype)
    assert same_bits(formats.round_activation(w, kind), rows)
    assert same_bits(formats.round_activation(w[None], kind)[0], rows)


@KINDS
@pytest.mark.parametrize("shape", [(700, 600), (40, 64, 64), (2, 600, 300)])
def test_large_weights_have_no_seam_and_experts_no_neighbours(kind, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert w.numel() > e4m3.PIECE
    rounded = formats.round_weight_(w.clone(), kind)
    for whole, one in zip(rounded.view(-1, *shape[-2:]), w.view(-1, *shape[-2:])):
        by_rows = torch.cat([formats.round_weight_(r[None].clone(), kind) for r in one[:40]])
        assert kind == "nvfp4" or same_bits(whole[:40], by_rows)
        assert same_bits(whole, formats.round_weight_(one.clone(), kind))
    t = w.mT.contiguous()
    formats.round_weight_(t.mT, kind)  # a view that is not contiguous is rounded in place
    assert same_bits(t.mT.contiguous(), rounded)


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(kind, bad):
    w = torch.randn(70, 150)
    w[69, 149] = bad
    with pytest.raises(ValueError, match="not finite"):
        formats.round_weight_(w.clone(), kind)
    out = formats.round_activation(w, kind)
    assert out[:69].isfinite().all() and out[69, -1].isnan()
    form = formats.FORMATS[kind]
    spoilt = form.block if form.block and kind != "nvfp4" else 150
    assert out[69, 150 - 150 % spoilt if spoilt < 150 else 0 :].isnan().all()
    assert formats.round_activation(torch.zeros(3, 40), kind).eq(0).all()
    assert formats.round_weight_(torch.zeros(3, 40), kind).eq(0).all()
    assert formats.round_activation(torch.zeros(0, 40), kind).shape == (0, 40)


@KINDS
def test_a_gradient_passes_straight_through_and_the_argument_stays(kind):
    x, w = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    before = x.detach().clone()
    (formats.round_activation(x, kind) * w).sum().backward()
    assert torch.equal(x.grad, w) and torch.equal(x.detach(), before)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_is_rounding_once(kind, dtype):
    w = torch.randn(3, 100, 160, generator=torch.Generator().manual_seed(7)).to(dtype)
    w = w * torch.rand(3, 100, 1, generator=torch.Generator().manual_seed(8)).to(dtype)
    once = formats.round_weight_(w.clone(), kind)
    twice = formats.round_weight_(once.clone(), kind)
    # the float32 scale of NVFP4 is a quotient, computed anew: the last bits of float32 may move
    rounding = 2.0**-22 if kind == "nvfp4" and dtype == torch.float32 else 0
    assert torch.allclose(twice, once, rtol=rounding, atol=0)


@pytest.mark.parametrize("kind", e4m3.WeightKind.__args__)
def test_e4m3_keeps_its_own_rounding(kind):
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(2))
    codes = e4m3.dequantize(*e4m3.quantize(w, kind), kind)
    assert torch.equal(formats.round_weight_(w.clone(), kind), codes)
    for name in ("token", "group"):
        assert torch.equal(formats.round_activation(w, name), e4m3.round_activation(w, name))
    assert formats.round_activation(w, None) is w


def test_bits_and_names():
    found = {k: formats.weight_bits(k) for k in ("channel", "e5m2", "mxfp8", "mxfp4", "nvfp4")}
    assert found == {"channel": 8, "e5m2": 8, "mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5}
    assert formats.weight_bits("mxfp6_e2m3") == formats.weight_bits("mxfp6_e3m2") == 6.25
    assert formats.weight_bits("block") == 8 + 32 / 128**2
    for round_ in (formats.round_activation, formats.round_weight_):
        with pytest.raises(ValueError, match="format 'mxfp5' must be one of t.*, mxfp4, .*nvfp4"):
            round_(torch.ones(2, 2), "mxfp5")


# -------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_e4m3_numbers_times_its_scale(dtype):
    states = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(3)) * 200).to(dtype)
    clipped = states.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(formats.round_cache(states), clipped) and (states.abs() > 448).any()
    for scale in (2.5, torch.tensor(2.5)):
        apart = (states.float() / 2.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 2.5
        assert torch.equal(formats.round_cache(states, scale), apart.to(dtype))
