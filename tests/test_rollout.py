import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_qwen3_moe
from end_tokens import ends_rightly
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_forcing import PROMPTS, ROUNDING, SHORT, check_teacher_forced

from minirl_nb import fp8
from minirl_nb.batch import validate
from minirl_nb.policy import token_logprobs
from minirl_nb.rollout import Sampling, TorchEngine, compare_weights

SIZES = dict(
    vocab_size=16,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=15,
    bos_token_id=None,
)


def tiny_dense(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 8} | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.eval()


@given(st.integers(1, 9), st.sampled_from([3, 16, 100]), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_batching_refilling_and_prefill_size_change_nothing(max_batch, prefill, seed):
    model = tiny_qwen3_moe()
    s = Sampling(n=3, max_new_tokens=20, seed=seed)
    one = TorchEngine(model, routes=True).generate(PROMPTS, s)
    other = TorchEngine(model, routes=True, max_batch=max_batch, prefill_tokens=prefill).generate(
        PROMPTS, s
    )
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.finished, other.finished)
    assert torch.equal(one.routes[one.routes_valid], other.routes[other.routes_valid])
    assert (one.logp_mu - other.logp_mu).abs().max() < ROUNDING


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_other_families_and_temperatures_agree_with_the_trainer(family, temperature):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | {"initializer_range": 0.2}
    if family != "llama":
        sizes |= {
            "num_experts": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    r = TorchEngine(model, routes=family != "llama").generate(
        PROMPTS, Sampling(n=4, temperature=temperature, max_new_tokens=20)
    )
    check_teacher_forced(model, r, temperature)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation, moe):
    moe.set_attn_implementation(implementation)
    check_teacher_forced(moe, TorchEngine(moe).generate(PROMPTS, Sampling(n=4, max_new_tokens=20)))


def test_routes_are_those_of_a_forward_of_the_engine_itself(moe):
    from minirl_nb.routing import record

    engine = TorchEngine(moe, fp8="fp8_per_channel", routes=True)
    r = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=20))
    with torch.no_grad(), record(engine.model) as recorder:
        engine.model(r.tokens)
    again = recorder.pop(len(r))
    same = (again.sort(-1).values == r.routes.sort(-1).values).all(-1)[r.routes_valid]
    assert (
        same.float().mean() > 0.98
    )  # a value on the edge of two E4M3 codes may fall either way; ten seeds, two CPUs: none did
    assert r.routes_valid.sum() == (r.length - 1).sum()


def test_a_rollout_can_be_trained_on_as_it_is(moe):
    r = TorchEngine(moe, routes=True).generate(PROMPTS, Sampling(n=2, max_new_tokens=8))
    token_logprobs(moe, r.tokens, r.response_mask)[0].sum().backward()
    assert all(
        not getattr(r, n).is_inference()
        for n in ("tokens", "logp_mu", "routes", "length", "group", "finished", "prompt_length")
    )


def test_end_token_is_in_the_response_and_cut_responses_are_not_finished(moe):
    r = validate(TorchEngine(moe).generate(PROMPTS, Sampling(n=16, max_new_tokens=12)))
    last = r.tokens[torch.arange(len(r)), r.length - 1]
    assert torch.equal(r.finished, last == 15)
    assert (
        (r.response_length[~r.finished] == 12).all() and r.finished.any() and not r.finished.all()
    )
    inside = r.response_mask & (torch.arange(r.tokens.shape[1]) < r.length[:, None] - 1)
    assert not (r.tokens[inside] == 15).any()


def test_greedy_is_the_argmax(moe):
    r = TorchEngine(moe).generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=10))
    with torch.no_grad():
        best = moe(r.tokens).logits.argmax(-1)
    assert torch.equal(
        best[:, :-1][r.response_mask[:, 1:]], r.tokens[:, 1:][r.response_mask[:, 1:]]
    )


def test_one_seed_one_result_and_streams_differ(moe):
    e = TorchEngine(moe)
    a, b, c = (
        e.generate([[5, 6]] * 2, Sampling(n=8, max_new_tokens=12, seed=s)) for s in (3, 3, 4)
    )
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(
        a.tokens, c.tokens[:, : a.tokens.shape[1]]
    )
    assert len({tuple(a.response(i).tolist()) for i in range(16)}) > 8


@pytest.mark.parametrize(
    "prompts, sampling, words",
    [
        ([[1], []], Sampling(), "prompt 1 is empty"),
        ([[1] * 50], Sampling(max_new_tokens=20), "64 positions"),
    ],
)
def test_bad_requests(prompts, sampling, words, moe):
    with pytest.raises(ValueError, match=words):
        TorchEngine(moe).generate(prompts, sampling)


def test_no_prompts_give_no_rows_of_the_right_shape(moe):
    r = TorchEngine(moe, routes=True).generate([], Sampling(n=4))
    some = TorchEngine(moe, routes=True).generate([[1, 2]], Sampling(n=2, max_new_tokens=3))
    assert (
        len(r) == 0
        and r.routes.shape[2:] == some.routes.shape[2:]
        and r.routes.dtype == some.routes.dtype
    )
    validate(r)


def test_a_call_may_start_at_any_request(moe):
    """Two calls for halves of the prompts, the second told where it starts, sample what one call
    samples."""
    engine, prompts = TorchEngine(moe), [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    whole = engine.generate(prompts, Sampling(n=2, max_new_tokens=12, seed=5))
    for a, b in ((0, 1), (1, 3)):
        part = engine.generate(prompts[a:b], Sampling(n=2, max_new_tokens=12, seed=5, first=2 * a))
        for row in range(len(part)):
            assert part.response(row).tolist() == whole.response(2 * a + row).tolist()


def test_engines_refuse_what_they_cannot_do(moe):
    moe.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end token"):
        TorchEngine(moe)
    from transformers import AutoConfig, AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(TypeError, match="router"):
        TorchEngine(dense, routes=True, eos_token_id=1)
    linear = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_next",
            vocab_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        )
    )
    with pytest.raises(ValueError, match="linear_attention"):
        TorchEngine(linear, eos_token_id=1)


def test_weights_that_are_not_finite_are_named(moe):
    e = TorchEngine(moe)
    with torch.no_grad():
        e.model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="log-probability"):
        e.generate(PROMPTS, Sampling(max_new_tokens=4))


@pytest.mark.parametrize("scheme", [None, *fp8.SCHEMES])
def test_identical_weights_reloaded_change_nothing(scheme, moe):
    e = TorchEngine(moe, fp8=scheme)
    before = e.generate(PROMPTS, Sampling(n=4, max_new_tokens=16))
    e.load(moe.named_parameters(), version=5)
    after = e.generate(PROMPTS, Sampling(n=4, max_new_tokens=16))
    assert torch.equal(before.logp_mu, after.logp_mu) and after.policy_version == 5
    compare_weights(e, moe)


def test_the_engine_is_a_copy(moe):
    kept = copy.deepcopy(moe.state_dict())
    e = TorchEngine(moe, fp8="fp8_per_tensor")
    e.generate(PROMPTS, Sampling(max_new_tokens=4))
    assert all(torch.equal(v, kept[k]) for k, v in moe.state_dict().items())
    assert moe.config._attn_implementation == "sdpa" and all(
        p.requires_grad for p in moe.parameters()
    )


def test_a_dense_family_with_a_cap_agrees():
    model = tiny_dense("gemma2", final_logit_softcapping=5.0, sliding_window=64)
    assert model.config.final_logit_softcapping == 5.0
    check_teacher_forced(model, TorchEngine(model).generate(PROMPTS, SHORT))


def test_a_head_that_reads_something_else_than_the_base_models_states_is_refused(moe):
    class Between(type(moe)):
        def forward(self, input_ids, **kwargs):
            states = self.model(input_ids)[0]
            return type("Output", (), {"logits": self.lm_head(2 * states)})()

    moe.__class__ = Between
    with pytest.raises(NotImplementedError, match="does not read its base model's last hidden"):
        TorchEngine(moe)


# ---------------------------------------------------------------- end tokens
def test_a_response_ends_at_any_end_token_of_model_or_tokenizer(moe):
    moe.generation_config.eos_token_id = [15, 14]
    tokenizer = SimpleNamespace(eos_token_id=13, pad_token_id=0)
    s = Sampling(n=32, max_new_tokens=24)
    for options, end in (
        (dict(tokenizer=tokenizer), [15, 14, 13]),
        (dict(), [15, 14]),
        (dict(tokenizer=tokenizer, eos_token_id=[14]), [14]),  # fewer, by name
        (dict(tokenizer=tokenizer, eos_token_id=[15, 14, 13, 12]), [15, 14, 13, 12]),  # more
    ):
        seen = ends_rightly(TorchEngine(moe, **options).generate(PROMPTS, s), end)
        assert all(seen.values()), seen  # each of them ended some
    assert TorchEngine(moe, eos_token_id=7).eos.tolist() == [7]
