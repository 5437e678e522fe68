"""The plan's memory against a real update, seen by the allocator and by the system.

The page has the cold start and a model without activation checkpointing; here it is with."""

import pytest
from plan_models import CPU
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from minirl_nb.config import load_config
from minirl_nb.plan import plan
from minirl_nb.plan.cluster import Assumptions
from minirl_nb.plan.rehearsal import rehearse

# The allocator rounds a tensor up to 64 bytes; resident size counts pages, and kernels' scratch
BOUND = {"allocator": 0.01, "resident": 0.1}


@pytest.mark.slow
def test_rehearsal_of_a_hundred_million_parameters(tmp_path):
    hf_config = Qwen3MoeConfig(
        num_hidden_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        vocab_size=16384,
        max_position_embeddings=2048,
        eos_token_id=15,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(hf_config)
    assert 90e6 < model.num_parameters() < 110e6
    model.save_pretrained(tmp_path / "model")
    settings = {
        "model.path": str(tmp_path / "model"),
        "rollout.max_new_tokens": 244,
        "batch.tokens": 512,
        "rollout.fp8": "none",
        "model.gradient_checkpointing": True,
    }
    config, assume = load_config("demo", settings), Assumptions(prompt_tokens=12)
    planned = plan(config, CPU, assume, search=False).phase("update").total
    for measure, size in rehearse(config, assume).items():
        assert planned == pytest.approx(size, rel=BOUND[measure]), measure


def test_a_rehearsal_that_fails_says_why(tmp_path):
    settings = {"rollout.max_new_tokens": 52, "rollout.fp8": "none", "output.folder": str(tmp_path)}
    config = load_config("demo", settings | {"objective.replay": "none", "model.device": "nothing"})
    with pytest.raises(RuntimeError, match="the rehearsal ended with status 1: .*nothing"):
        rehearse(config)
