"""Log-probabilities against log_softmax: values, gradients, alignment, padding, memory."""

import copy

import moe_families
import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from minirl_nb.policy import CHUNK, Head, LiveBytes, head, head_logprobs, token_logprobs


def plain(hidden, weight, labels, bias=None, temperature=1.0, scale=1.0, cap=None):
    "log p(label) and entropy by log_softmax over the whole vocabulary."
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    logq = torch.log_softmax(z / temperature, -1)
    return logq.gather(1, labels[:, None])[:, 0], -(logq.exp() * logq).sum(-1)


def case(n, v, h, seed=0, dtype=torch.float64, bias=True):
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return make(n, h), make(v, h), make(v) if bias else None, torch.randint(0, v, (n,), generator=g)


# ----------------------------------------------------------------------------------------- the head
@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 12),
    v=st.integers(1, 40),
    h=st.integers(1, 6),
    chunk=st.sampled_from([None, 1, 2, 5, 12]),
    bias=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    scale=st.sampled_from([1.0, 0.25]),
    cap=st.sampled_from([None, 3.0]),
    entropy_grad=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_values_and_gradients_are_those_of_log_softmax(
    n, v, h, chunk, bias, temperature, scale, cap, entropy_grad, seed
):
    hidden, weight, b, labels = case(n, v, h, seed, bias=bias)
    leaves = [t for t in (hidden, weight, b) if t is not None]
    w1, w2 = (
        torch.linspace(-1, 2, n, dtype=torch.float64),
        torch.linspace(1, 3, n, dtype=torch.float64) * entropy_grad,
    )
    logp, ent = head_logprobs(
        hidden,
        Head(weight, b, scale, cap),
        labels,
        temperature=temperature,
        chunk=chunk,
        entropy_grad=entropy_grad,
    )
    assert ent.requires_grad == entropy_grad
    ours = torch.autograd.grad((logp * w1 + ent * w2).sum(), leaves)
    logp2, ent2 = plain(hidden, weight, labels, b, temperature, scale, cap)
    theirs = torch.autograd.grad((logp2 * w1 + ent2 * w2).sum(), leaves)
    close = dict(rtol=1e-10, atol=1e-10)  # float64 sums of at most 40 terms of size 1 to 10
    torch.testing.assert_close(logp, logp2, **close)
    torch.testing.assert_close(ent, ent2, **close)
    torch.testing.assert_close(ours, theirs, **close)


def test_gradcheck():
    hidden, weight, bias, labels = case(5, 7, 3)

    def f(h, w, b):
        options = dict(temperature=0.7, chunk=2, entropy_grad=True)
        return head_logprobs(h, Head(w, b, 0.5, 4.0), labels, **options)

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    hidden, weight, bias, labels = case(6, 9, 4)
    for i in frozen:
        (hidden, weight, bias)[i].requires_grad_(False)
    head_logprobs(hidden, Head(weight, bias), labels, chunk=4)[0].sum().backward()
    mine = [t.grad for t in (hidden, weight, bias)]
    for t in (hidden, weight, bias):
        t.grad = None
    plain(hidden, weight, labels, bias)[0].sum().backward()
    for i, (a, t) in enumerate(zip(mine, (hidden, weight, bias))):
        assert (a is None) == (i in frozen)
        if a is not None:
            torch.testing.assert_close(a, t.grad, rtol=1e-10, atol=1e-10)


def test_forbidden_words_and_extreme_logits_stay_finite():
    hidden, weight, _, labels = case(4, 10, 3, dtype=torch.float32, bias=False)
    bias = torch.zeros(10)
    bias[7:] = -torch.inf
    logp, ent = head_logprobs(hidden, Head(weight, bias), labels % 7, entropy_grad=True)
    assert logp.isfinite().all() and ent.isfinite().all()
    ref = plain(hidden, weight[:7], labels % 7)
    torch.testing.assert_close((logp, ent), ref, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((logp + ent).sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in grads)
    sure, certain = head_logprobs(
        hidden.detach() * 1e4, Head(weight.detach()), (hidden @ weight.T).argmax(1)
    )
    assert torch.equal(sure, torch.zeros(4)) and torch.equal(certain, torch.zeros(4))
    with pytest.raises(ValueError, match="temperature = 0 must be positive"):
        head_logprobs(hidden, Head(weight), labels, temperature=0)


def test_backward_may_run_twice_on_one_graph():
    hidden, weight, bias, labels = case(6, 9, 4)
    for chunk in (3, 6):
        out = head_logprobs(hidden, Head(weight, bias), labels, chunk=chunk, entropy_grad=True)
        total = (out[0] + 2 * out[1]).sum()
        first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(total, (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


# ------------------------------------------------------------------------------------------- memory
def step(f, device, n, v=151_936, h=256):
    """Peak bytes above the inputs of a forward and backward, with the gradients of hidden states
    and weights in them.
    """
    hidden = torch.randn(n, h, device=device, requires_grad=True)
    weight = (torch.randn(v, h, device=device) * 0.1).requires_grad_()
    labels, g = torch.randint(0, v, (n,), device=device), torch.randn(n, device=device)
    with LiveBytes() as live:
        (f(hidden, weight, labels)[0] * g).sum().backward()
    return live.peak, hidden.grad, weight.grad


def ours(hidden, weight, labels):
    return head_logprobs(hidden, Head(weight), labels)


def usual(hidden, weight, labels):
    return (torch.log_softmax(hidden @ weight.T, -1).gather(1, labels[:, None])[:, 0],)


def test_peak_memory_is_a_tenth_of_log_softmax_at_a_real_vocabulary():
    chunked, plain = (
        step(ours, "meta", 4096)[0],
        step(usual, "meta", 4096)[0],
    )  # with entropy, and without
    assert plain > 3 * 4096 * 151_936 * 4 * 0.99, "logits, their log-softmax and its gradient"
    assert chunked <= plain / 10
    assert chunked <= 151_936 * 256 * 4 + 4096 * 256 * 4 + 3.5 * CHUNK * 4, (
        "the two gradients and three chunks"
    )


def test_meta_memory_is_real_memory():
    for f in (ours, usual):
        assert step(f, "meta", 24, v=20_000)[0] == step(f, "cpu", 24, v=20_000)[0]
    with LiveBytes() as live:
        a = torch.zeros(100)
        b = a.view(10, 10)
        del a
        c = b + 1
        del b, c
    assert live.history == [0, 400, 400, 800] and live.peak == 800


def test_gradients_at_a_real_vocabulary():
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(160, 256, requires_grad=True),
        (torch.randn(151_936, 256) * 0.1).requires_grad_(),
    )
    labels, g = torch.randint(0, 151_936, (160,)), torch.randn(160)
    assert 160 > CHUNK // 151_936, "more than one chunk"
    grads = []
    for f in (ours, plain):
        grads.append(
            torch.autograd.grad((f(hidden, weight, labels)[0] * g).sum(), (hidden, weight))
        )
    for a, b in zip(*grads):
        assert (a - b).norm() <= 1e-5 * b.norm()


# ------------------------------------------------------------------------------------------- models
FAMILIES = small_models.FAMILIES | {
    "llama": {},
    "gemma2": dict(final_logit_softcapping=0.5),
    "granite": dict(logits_scaling=3.0),
    "cohere": {},
    "phi": {},
    "falcon_h1": dict(
        lm_head_multiplier=3.0,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
}


def build(family="qwen3_moe", **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **small_models.SMALL | FAMILIES.get(family, {}) | overrides)
    ).eval()
    if "moe" in family:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def batch(b=5, t=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens, length = (
        torch.randint(1, 48, (b, t), generator=g),
        torch.randint(4, t + 1, (b,), generator=g),
    )
    at = torch.arange(t)
    return tokens, length, (at >= 3) & (at < length[:, None])


def of_model(model, tokens, mask, temperature=1.0):
    "[B, T] log-probabilities and entropies from the model's own logits."
    logq = torch.log_softmax(model(tokens).logits / temperature, -1)
    logp, ent = (
        torch.zeros(tokens.shape, dtype=logq.dtype),
        torch.zeros(tokens.shape, dtype=logq.dtype),
    )
    logp[:, 1:] = logq[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    ent[:, 1:] = -(logq.exp() * logq).sum(-1)[:, :-1]
    return logp * mask, ent * mask


@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_their_own_logits(family):
    model, (tokens, length, mask) = build(family), batch()
    logp, ent = token_logprobs(model, tokens, mask, length=length, temperature=0.6)
    logp2, ent2 = of_model(model, tokens, mask, 0.6)
    # sixty-four float32 operations deep, log-probabilities of size 4: 1e-5 is twenty roundings
    torch.testing.assert_close(
        (logp.detach(), ent), (logp2.detach(), ent2.detach()), rtol=0, atol=1e-5
    )
    assert (
        logp.dtype == ent.dtype == torch.float32
        and (logp[~mask] == 0).all()
        and (ent[~mask] == 0).all()
    )


def test_a_token_is_scored_by_what_stands_before_it():
    model, (tokens, length, mask) = build().double(), batch()
    logp, ent = token_logprobs(model, tokens, mask, length=length)
    assert logp.dtype == torch.float64
    for b, t in mask.nonzero().tolist():
        with torch.no_grad():
            logq = torch.log_softmax(model(tokens[b : b + 1, :t]).logits[0, -1], -1)
        assert float(logp[b, t].detach()) == pytest.approx(float(logq[tokens[b, t]]), abs=1e-9)
        assert float(ent[b, t]) == pytest.approx(float(-(logq.exp() * logq).sum()), abs=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_whole_model(tied, chunk, checkpointing):
    model, (tokens, length, mask) = build(tie_word_embeddings=tied).double(), batch()
    w = torch.randn(tokens.shape, dtype=torch.float64)
    logp, ent = of_model(model, tokens, mask)
    (logp * w - ent).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.train().activation_checkpointing_enable()
    logp, ent = token_logprobs(model, tokens, mask, length=length, chunk=chunk, entropy_grad=True)
    (logp * w - ent).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-8, atol=1e-9, msg=n)


def test_padding_and_its_mask_change_nothing():
    model, (tokens, length, mask) = build(), batch()
    attention = torch.arange(12) < length[:, None]
    with torch.no_grad():
        a = token_logprobs(model, tokens, mask, length=length)[0]
        b = token_logprobs(model, tokens, mask, attention_mask=attention.long())[0]
        c = token_logprobs(model, torch.where(attention, tokens, 0), mask, length=length)[0]
        d = token_logprobs(model, tokens, mask)[0]
        alone = torch.zeros(5, 12)
        for i, n in enumerate(length):
            alone[i, :n] = token_logprobs(model, tokens[i : i + 1, :n], mask[i : i + 1, :n])[0]
    assert torch.equal(a, b) and torch.equal(a, c)
    for other in (d, alone):
        torch.testing.assert_close(a, other, rtol=0, atol=1e-5)


def test_bfloat16_autocast_uses_the_products_of_autocast():
    model, (tokens, _, mask) = build(), batch()
    grads = []
    for f in (
        lambda: token_logprobs(model, tokens, mask)[0],
        lambda: of_model(model, tokens, mask)[0],
    ):
        with torch.autocast("cpu", torch.bfloat16):
            logp = f()
        model.zero_grad()
        logp.float().sum().backward()
        grads.append(
            (
                logp.detach().float(),
                model.lm_head.weight.grad.clone(),
                model.model.norm.weight.grad.clone(),
            )
        )
    for a, b in zip(*grads):
        assert (a - b).norm() <= 0.02 * b.norm()  # bfloat16 has eight bits: 2^-8 a rounding
    with torch.no_grad():
        full = token_logprobs(model, tokens, mask)[0]
    assert not torch.equal(full, grads[0][0]) and grads[0][1].dtype == torch.float32
    low = copy.deepcopy(model).bfloat16()
    logp = token_logprobs(low, tokens, mask)[0]
    logp.sum().backward()
    assert logp.dtype == torch.float32 and low.lm_head.weight.grad.dtype == torch.bfloat16
    assert (low.lm_head.weight.grad.float() - grads[1][1]).norm() <= 0.05 * grads[1][1].norm()


def test_only_the_mask_passes_through_the_head(monkeypatch):
    import minirl_nb.policy as policy

    seen = []
    real = policy.head_logprobs
    monkeypatch.setattr(
        policy, "head_logprobs", lambda h, *a, **k: seen.append(len(h)) or real(h, *a, **k)
    )
    model, (tokens, _, mask) = build(), batch()
    token_logprobs(model, tokens, mask)
    assert seen == [int(mask.sum())]
    logp, ent = token_logprobs(model, tokens, torch.zeros_like(mask))
    logp.sum().backward()
    assert torch.equal(logp, torch.zeros(5, 12)) and torch.equal(ent, torch.zeros(5, 12))


def test_the_routers_auxiliary_loss_is_not_computed(monkeypatch):
    import transformers.models.qwen3_moe.modeling_qwen3_moe as modeling

    model, (tokens, _, mask) = build(output_router_logits=True), batch()
    expected = token_logprobs(model, tokens, mask)[0]
    monkeypatch.setattr(
        modeling, "load_balancing_loss_func", lambda *a, **k: pytest.fail("auxiliary loss")
    )
    assert torch.equal(token_logprobs(model, tokens, mask)[0], expected)


def test_entropy_has_a_gradient_only_on_request():
    model, (tokens, _, mask) = build(), batch()
    assert not token_logprobs(model, tokens, mask)[1].requires_grad
    assert token_logprobs(model, tokens, mask, entropy_grad=True)[1].requires_grad
    logp, ent = token_logprobs(model, tokens, mask, entropy=False)
    assert (ent == 0).all() and torch.equal(logp, token_logprobs(model, tokens, mask)[0])


def test_wrong_input_is_named():
    model, (tokens, length, mask) = build(), batch()
    first = mask.clone()
    first[2, 0] = True
    with pytest.raises(ValueError, match="token 0"):
        token_logprobs(model, tokens, first)
    with pytest.raises(ValueError, match=r"must have one shape \[B, T\]"):
        token_logprobs(model, tokens, mask[:, :5])
    left = torch.ones(5, 12)
    left[1, :2] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        token_logprobs(model, tokens, mask, attention_mask=left)
    late = torch.ones_like(mask)
    late[:, 0] = False
    with pytest.raises(ValueError, match=r"response_mask\[\d, \d+\] is true on padding \(row"):
        token_logprobs(model, tokens, late, length=length)


# ---------------------------------------------------------------- heads that are not what they seem
def test_an_unknown_head_is_refused_not_silently_wrong():
    class Doubling(type(build())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model, (tokens, _, mask) = build(), batch()
    model.__class__ = Doubling
    for _ in range(
        2
    ):  # the second time is no different: a refused model is not taken for a checked one
        with pytest.raises(NotImplementedError, match="logits of Doubling .* off by 50.0%"):
            token_logprobs(model, tokens, mask)
        assert "forward" not in model.lm_head.__dict__ and not model.lm_head._forward_hooks
    odd = build()
    odd.set_output_embeddings(nn.Sequential(odd.lm_head))
    with pytest.raises(
        NotImplementedError, match="output head of Qwen3MoeForCausalLM is Sequential"
    ):
        head(odd)


@pytest.mark.parametrize(
    "family,key,value",
    [("gemma2", "cap", 0.5), ("granite", "scale", 1 / 3), ("cohere", "scale", 0.0625)],
)
def test_the_check_would_notice_a_forgotten_detail(family, key, value, monkeypatch):
    import minirl_nb.policy as policy

    model, (tokens, _, mask) = build(family), batch()
    assert getattr(head(model), key) == pytest.approx(value)
    monkeypatch.setattr(policy, "head", lambda m: Head(head(m).weight))
    with pytest.raises(NotImplementedError, match="off by"):
        token_logprobs(model, tokens, mask)


def test_the_check_draws_nothing_from_the_global_stream_and_runs_no_forward_of_its_own():
    model, (tokens, _, mask), seen = build(), batch(), []
    model.model.register_forward_hook(lambda *a: seen.append(1))
    torch.manual_seed(1)
    a = torch.rand(1)
    torch.manual_seed(1)
    token_logprobs(model, tokens, mask)
    assert torch.equal(torch.rand(1), a) and len(seen) == 1


def test_an_error_inside_leaves_the_head_as_it_was():
    model, (tokens, _, mask) = build(), batch()

    def mine(x):  # somebody's wrapper
        return nn.functional.linear(x, model.lm_head.weight)

    model.lm_head.forward = mine
    with pytest.raises(IndexError):
        token_logprobs(model, torch.full_like(tokens, 99), mask)
    assert model.lm_head.forward is mine and not model.lm_head._forward_hooks
    token_logprobs(model, tokens, mask)
    assert model.lm_head.forward is mine and model(tokens).logits.shape == (5, 12, 48)


def test_a_model_that_calls_its_head_never_or_twice_is_refused():
    class Twice(type(build())):
        def forward(self, *args, **kwargs):
            self.lm_head(self.model(*args[:1], **kwargs)[0])
            return super().forward(*args, **kwargs)

    class Never(type(build())):
        def forward(self, input_ids, **kwargs):
            return type(
                "Output",
                (),
                {"logits": nn.functional.linear(self.model(input_ids)[0], self.lm_head.weight)},
            )()

    tokens, _, mask = batch()
    for cls, words in ((Twice, "more than once"), (Never, "does not call its output head")):
        model = build()
        model.__class__ = cls
        with pytest.raises(NotImplementedError, match=words):
            token_logprobs(model, tokens, mask)


@pytest.mark.parametrize("family", moe_families.discover())
def test_every_moe_family_of_transformers_agrees_with_its_logits(family):
    model = moe_families.build(moe_families.discover()[family])
    tokens, _, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(model, tokens, mask), of_model(model, tokens, mask), rtol=0, atol=2e-5
        )
