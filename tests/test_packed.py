"""Rows one behind the other: log-probabilities, gradients and routes against rows with padding."""

import json

import moe_families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minirl_nb import packed as packing
from minirl_nb import policy
from minirl_nb.batch import Ragged, Rollout
from minirl_nb.packed import pack_attention
from minirl_nb.policy import BOUNDS, token_logprobs
from minirl_nb.routing import compare, record, replay

VOCAB = 48


def rows(B=5, T=12, seed=0, vocab=VOCAB):
    g = torch.Generator().manual_seed(seed)
    tokens, length = (
        torch.randint(1, vocab, (B, T), generator=g),
        torch.randint(4, T + 1, (B,), generator=g),
    )
    at = torch.arange(T)
    return tokens, length, (at >= 3) & (at < length[:, None])


def small(dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **dict(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=32,
                moe_intermediate_size=16,
                num_hidden_layers=3,
                mlp_only_layers=[1],
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                num_experts=8,
                num_experts_per_tok=2,
                initializer_range=0.2,
            )
            | more
        )
    )
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def both(model, tokens, length, mask, weight, **more):
    "[padded, packed] of (logp, entropy, gradients)."
    out = []
    for packed in (False, True):
        model.zero_grad()
        logp, ent = token_logprobs(
            model, tokens, mask, length=length, packed=packed, entropy_grad=True, **more
        )
        (logp * weight + ent).sum().backward()
        out.append(
            (
                logp.detach(),
                ent.detach(),
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    return out


def agree(a, b, atol, rtol):
    torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=atol)
    assert a[2].keys() == b[2].keys() and a[2]
    for n in a[2]:
        assert (a[2][n] - b[2][n]).norm() <= rtol * a[2][n].norm() + 1e-12, n


# ----------------------------------------------------------------------------------------- families
# Measured at most 5e-15 for log-probabilities and 5e-14 for gradients, on two processors: some
# hundred roundings of 2^-53. A float32 product, or a token that another row changes, is off by 1e-8
# and more.
ROUNDING = 1e-12
# layers that carry a state along the row, compress or index the keys of the whole row, or mask in a
# way of their own
ROW_STATE = {
    "bailing_hybrid",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_next",
    "zaya",
}
ANOTHER_MASK = {"axk2", "deepseek_v32", "doge", "dots3_note", "glm_moe_dsa", "inkling", "qwen4_exp"}
EAGER = {"deepseek_v4", "flint", "gpt_oss", "granitemoe_swa", "hy_v4", "inkling2", "mimo_v2_flash"}
WINDOW_NOT_PASSED = {"phimoe"}


@pytest.mark.parametrize("family", moe_families.discover())
def test_every_moe_family_packs_or_is_refused(family):
    model = moe_families.build(moe_families.discover()[family], dtype=torch.float64)
    model.set_experts_implementation("eager")
    how = model.config._attn_implementation
    words = next(
        (
            w
            for names, w in (
                (EAGER, "eager attention"),
                (ROW_STATE, "with the row before it"),
                (ANOTHER_MASK, "cannot run rows"),
                (WINDOW_NOT_PASSED, "against the same row alone"),
            )
            if family in names
        ),
        None,
    )
    if words:
        with pytest.raises(NotImplementedError, match=f"{type(model).__name__} .*{words}"):
            pack_attention(model)
        assert model.config._attn_implementation == how and model not in policy.BOUNDS_OF
        return
    pack_attention(model)
    tokens, length, mask = rows()
    weight = torch.linspace(-1, 2, mask.numel(), dtype=torch.float64).view(mask.shape)
    with moe_families.Double():
        padded, packed = both(model, tokens, length, mask, weight)
    agree(padded, packed, ROUNDING, ROUNDING)


@pytest.mark.parametrize("family", ["falcon_h1", "mamba", "recurrent_gemma"])
def test_a_weak_state_is_noticed_too(family):
    """At its random start a tiny state-space layer passes next to nothing on:

    1e-5 nats. A leak is measured against the same shapes with another first row, where even
    roundings agree, so it shows.
    """
    sizes = SMALL | dict(
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        state_size=4,
        lru_width=32,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    with pytest.raises(NotImplementedError, match=type(model).__name__):
        pack_attention(model)


# ------------------------------------------------------------------------------------ the attention
@given(
    st.lists(st.integers(1, 17), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3, 5, 16]),
    st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_attention_in_bounds_is_attention_under_the_whole_mask(lengths, window, kv):
    g, n = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    q, k, v = (
        torch.randn(1, h, n, 8, dtype=torch.float64, generator=g).requires_grad_()
        for h in (4, kv, kv)
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // kv, True
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)[None, None, None]
    options = dict(scaling=0.3, sliding_window=window)
    out = packing._attend_within_bounds(module, q, k, v, bounds, **options)[0]
    row, at = (
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        torch.arange(n),
    )
    mask = (row == row[:, None]) & (at <= at[:, None])
    if window:
        mask &= at > at[:, None] - window

    def for_all_heads(x):
        return x.repeat_interleave(4 // kv, 1)

    scores = (q @ for_all_heads(k).mT * 0.3).masked_fill(~mask, -torch.inf)
    want = (scores.softmax(-1) @ for_all_heads(v)).transpose(1, 2)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    w = torch.randn(out.shape, dtype=torch.float64, generator=g)
    for a, b in zip(
        torch.autograd.grad((out * w).sum(), (q, k, v)),
        torch.autograd.grad((want * w).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_attention_that_torch_does_not_have_is_refused():
    bounds = torch.tensor([0, 2], dtype=torch.int32)[None, None, None]
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        packing._attend_within_bounds(torch.nn.Module(), x, x, x, bounds, softcap=30.0)


def test_padded_forwards_are_as_before_and_the_name_is_not_saved(tmp_path):
    model, (tokens, length, mask) = small(torch.float32), rows()
    with torch.no_grad():
        before = token_logprobs(model, tokens, mask, length=length)
    pack_attention(model)
    assert model.config._attn_implementation == BOUNDS
    with torch.no_grad():
        after = token_logprobs(model, tokens, mask, length=length)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    model.save_pretrained(tmp_path)
    assert BOUNDS not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_what_is_missing_is_named():
    model, (tokens, length, mask) = small(), rows()
    with pytest.raises(ValueError, match="call pack_attention"):
        token_logprobs(model, tokens, mask, length=length, packed=True)
    pack_attention(model)
    with pytest.raises(ValueError, match="needs the rows' `length`"):
        token_logprobs(model, tokens, mask, packed=True)
    eager = small(attn_implementation="eager")
    with pytest.raises(NotImplementedError, match="eager"):
        pack_attention(eager)


# ----------------------------------------------------------------------------------- shapes of rows
@given(
    st.lists(st.integers(2, 20), min_size=1, max_size=7), st.integers(0, 3), st.integers(0, 2**20)
)
@settings(max_examples=40, deadline=None)
def test_any_rows(lengths, wider, seed):
    model, B, T = MODEL, len(lengths), max(lengths) + wider
    g, length = torch.Generator().manual_seed(seed), torch.tensor(lengths)
    tokens = torch.randint(0, VOCAB, (B, T), generator=g)
    mask = (
        (torch.rand(B, T, generator=g) < 0.7)
        & (torch.arange(T) >= 1)
        & (torch.arange(T) < length[:, None])
    )
    agree(
        *both(
            model,
            tokens,
            length,
            mask,
            torch.randn(B, T, generator=g, dtype=torch.float64),
            temperature=0.7,
        ),
        1e-12,
        1e-10,
    )


MODEL = small()
pack_attention(MODEL)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, (tokens, length, mask) = small(), rows()
    pack_attention(model)
    weight = torch.randn(mask.shape, dtype=torch.float64)
    want = both(model, tokens, length, mask, weight)[0]
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    agree(want, both(model, tokens, length, mask, weight)[1], 1e-12, 1e-10)


def test_float32_and_bfloat16():
    for dtype, atol, rtol in (
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 0.1, 0.1),
    ):  # twenty roundings; eight bits in ten places
        model, (tokens, length, mask) = small(dtype), rows()
        pack_attention(model)
        agree(*both(model, tokens, length, mask, torch.ones(mask.shape)), atol, rtol)


# ------------------------------------------------------------------------------------------- routes
def routed(model, B=5, T=12, seed=3):
    "Any routes for B rows, padded and ragged."
    tokens, length, mask = rows(B, T)
    drawn = (
        torch.rand(B, T, 2, 8, generator=torch.Generator().manual_seed(seed))
        .topk(2, -1)
        .indices.to(torch.uint8)
    )
    valid = torch.arange(T) < length[:, None] - 1
    return tokens, length, mask, drawn, valid, Ragged.pack(drawn, length)


def test_recorded_routes_do_not_depend_on_the_form_of_the_forward():
    tokens, length, mask = rows()
    found = []
    for packed in (False, True):
        with torch.no_grad(), record(MODEL) as routes:
            token_logprobs(MODEL, tokens, mask, length=length, packed=packed)
        found.append(routes.pop(length=length))
    with torch.no_grad(), record(MODEL) as routes:
        token_logprobs(MODEL, tokens, mask, length=length)
    plain = routes.pop(len(tokens))
    a, b = found
    assert (
        isinstance(a, Ragged)
        and a.dtype == torch.uint8
        and torch.equal(a.values, b.values)
        and torch.equal(a.length, length)
    )
    for i, n in enumerate(length):
        assert torch.equal(a[i], plain[i, :n])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replay_does_not_depend_on_the_form_of_routes_or_forward(checkpointing):
    model = small()
    pack_attention(model)
    tokens, length, mask, padded, valid, ragged = routed(model)
    with torch.no_grad():
        live = token_logprobs(model, tokens, mask)[0]
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    out = {}
    for name, routes, packed in (
        ("padded", padded, False),
        ("ragged, padded", ragged, False),
        ("ragged, packed", ragged, True),
    ):
        model.zero_grad()
        with replay(model, routes, valid), record(model) as used:
            logp, ent = token_logprobs(
                model, tokens, mask, length=length, packed=packed, entropy_grad=True
            )
            (logp.sum() + ent.sum()).backward()
        out[name] = (
            logp.detach(),
            ent.detach(),
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        )
        where = Ragged.pack(valid, length).values
        assert torch.equal(
            used.pop(length=length).values[where].sort(-1).values,
            ragged.values[where].sort(-1).values,
        )
    assert not torch.allclose(out["padded"][0], live, atol=1e-3), (
        "the routes are others than the live ones"
    )
    for name in ("ragged, padded", "ragged, packed"):
        agree(out["padded"], out[name], 1e-12, 1e-10)


def test_rows_that_are_all_of_one_length_are_packed_and_padded_at_once():
    tokens, _, mask = rows(3, 8)
    length = torch.tensor([8, 8, 8])
    drawn = torch.rand(3, 8, 2, 8).topk(2, -1).indices.to(torch.uint8)
    valid = torch.arange(8) < length[:, None] - 1
    for packed in (False, True):
        with torch.no_grad(), replay(MODEL, Ragged.pack(drawn, length), valid):
            out = token_logprobs(MODEL, tokens, mask, length=length, packed=packed)[0]
        with torch.no_grad(), replay(MODEL, drawn, valid):
            torch.testing.assert_close(out, token_logprobs(MODEL, tokens, mask)[0])


def test_ragged_routes_are_checked_like_others():
    tokens, length, mask, padded, valid, ragged = routed(MODEL)
    bad = Ragged(ragged.values.clone(), length)
    bad.values[2, 1] = 7
    with pytest.raises(ValueError, match=r"layers.2.mlp.gate \(layer 1\).*one expert twice"):
        replay(MODEL, bad, valid)
    with pytest.raises(ValueError, match=r"this forward has 36 tokens"):
        with torch.no_grad(), replay(MODEL, ragged, valid):
            token_logprobs(MODEL, tokens[:3], mask[:3])
    with torch.no_grad(), replay(MODEL, ragged.select([4, 1]), valid[[4, 1]]):
        token_logprobs(MODEL, tokens[[4, 1]], mask[[4, 1]], length=length[[4, 1]], packed=True)


def test_compare_of_ragged_routes():
    tokens, length, mask, padded, valid, ragged = routed(MODEL)
    other = routed(MODEL, seed=4)[3]
    a, b = compare(padded, other, valid), compare(ragged, Ragged.pack(other, length), valid)
    for x in ("per_layer", "jaccard", "per_token"):
        torch.testing.assert_close(getattr(a, x), getattr(b, x))  # sums in another order
    assert (
        a.stats() == pytest.approx(b.stats()) and b.stats() == compare(ragged, other, valid).stats()
    )


def test_a_rollouts_routes_go_through_a_run_without_padding():
    """What a trainer does: record while recomputing in packed micro-batches, keep the routes
    ragged, replay the slices.
    """
    from minirl_nb.batch import microbatches

    tokens, length, mask = rows(9, 14, seed=5)
    r = Rollout(
        tokens=tokens,
        prompt_length=torch.full((9,), 3),
        length=length,
        logp_mu=torch.zeros(9, 14),
        group=torch.arange(9),
    )
    r.routes, old = (
        Ragged.zeros(length, (2, 2), torch.uint8),
        torch.zeros(9, 14, dtype=torch.float64),
    )
    parts = microbatches(length, 30, packed=True)
    assert len(parts) > 2

    def run(part):
        options = dict(length=part.length, packed=True)
        return token_logprobs(MODEL, part.tokens, part.response_mask, **options)[0]

    with torch.no_grad():
        for at in parts:
            part = r.select(at)
            with record(MODEL) as routes:
                old[at, : part.tokens.shape[1]] = run(part)
            r.routes.put_(at, routes.pop(length=part.length))
        with record(MODEL) as routes:
            want = token_logprobs(MODEL, tokens, mask, length=length)[0]
        assert torch.equal(routes.pop(length=length).values, r.routes.values)
        torch.testing.assert_close(old, want, rtol=0, atol=1e-12)
        r.routes_valid = r.token_mask
        for at in parts:
            part = r.select(at)
            with replay(MODEL, part.routes, part.routes_valid):
                torch.testing.assert_close(run(part), old[at, : part.tokens.shape[1]])
