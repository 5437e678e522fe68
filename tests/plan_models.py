"""Small models, and what the plan's tests plan with them."""

from dataclasses import replace

from transformers import Qwen3Config, Qwen3MoeConfig

from minirl_nb.config import load_config
from minirl_nb.plan.case import Case, shape
from minirl_nb.plan.cluster import Assumptions, Cluster

SMALL = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=512,
    intermediate_size=128,
    tie_word_embeddings=False,
)
MIXTURE = Qwen3MoeConfig(
    num_hidden_layers=9,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    **SMALL,
)
THIN = Qwen3MoeConfig(**MIXTURE.to_dict() | {"num_hidden_layers": 3})  # run whole: quick to plan
DENSE = Qwen3Config(num_hidden_layers=4, **SMALL)
TIED = Qwen3Config(num_hidden_layers=2, **SMALL | {"tie_word_embeddings": True})
CPU = replace(Cluster.with_gpus("h100", 1), gpu="cpu")


def case_of(hf_config, settings=None, cluster=CPU, **assumptions):
    "A case of a model that has a config and no folder."
    config = load_config(None, settings or {})
    return Case(config, cluster, Assumptions(**assumptions), hf_config, shape(hf_config))


def small(path, **other):
    "A config whose vLLM samples beside the trainer."
    settings = {
        "model.path": path,
        "model.compute": "bfloat16",
        "model.gradient_checkpointing": True,
        "rollout.engine": "vllm",
        "rollout.max_new_tokens": 256,
        "batch.tokens": 2048,
        "steps": 8,
    }
    return load_config(None, settings | other)
