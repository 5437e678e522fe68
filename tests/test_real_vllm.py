"""vLLM with the real mixture of 30 layers: heads of 64, a tied output head, a real vocabulary."""

from importlib.util import find_spec

import psutil
import pytest
import real_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirl_nb.policy import token_logprobs
from minirl_nb.rollout import Sampling, parity
from minirl_nb.routing import compare, record
from minirl_nb.tasks import encode_prompt
from minirl_nb.upcycle import UpcycleConfig, upcycle

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]
ROUNDING = 1e-4  # float32, 30 layers: `parity` allows the same


def test_generates_returns_routes_loads_and_agrees_with_the_trainer():
    from minirl_nb.vllm.engine import VLLMEngine

    folder = real_model.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = UpcycleConfig(experts=8, top_k=4, slices=4, routers="paired")
    model = upcycle(dense, config)
    del dense
    prompts = [encode_prompt(tokenizer, q) for q in ("What is 3 + 5?", "Name a colour.")]
    engine = VLLMEngine(
        model,
        tokenizer,
        routes=True,
        max_batch=4,
        max_model_len=512,
        kv_cache_memory_bytes=256 * 2**20,
    )
    try:
        r = engine.generate(prompts, Sampling(n=2, max_new_tokens=6))
        with torch.no_grad(), record(model) as recorder:
            logp, _ = token_logprobs(model, r.tokens, r.response_mask, entropy=False)
        own = recorder.pop(len(r))
        assert r.routes.shape[2:] == (30, 4)
        gap = (logp - r.logp_mu).abs()[r.response_mask]
        assert gap.max() < ROUNDING
        assert compare(own, r.routes, r.routes_valid).stats()["flip"] < 2e-3  # near ties only
        with torch.no_grad():  # new weights, in place
            for layer in model.model.layers:
                layer.mlp.experts.down_proj.mul_(1.01)
        engine.load(model.named_parameters(), 1)
        assert parity(engine, model, prompts[:1], Sampling(n=1, max_new_tokens=4)).q90 < ROUNDING
        # trainer, engine, and what vLLM itself needs
        resident = sum(
            p.memory_info().rss for p in (psutil.Process(), *psutil.Process().children(True))
        )
        assert resident < 8 * 2**30
        print(f"resident: {resident / 2**30:.1f} GiB")
    finally:
        engine.close()
