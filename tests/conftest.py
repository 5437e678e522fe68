"""Shared fixtures: a tiny Qwen3-MoE with random weights, and the built-in task's tokenizer beside it."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def tiny_qwen3_moe(seed=0, **changes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = dict(vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                  num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, tie_word_embeddings=False,
                  max_position_embeddings=64, pad_token_id=0, eos_token_id=15, bos_token_id=None, initializer_range=0.2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(config | changes))).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.fixture
def moe():
    return tiny_qwen3_moe()


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory):
    "The tiny model on disk, with the arithmetic task's tokenizer. Random weights: about 1 response in 200 is right."
    from minirl_nb import tasks

    folder = tmp_path_factory.mktemp("model")
    tiny_qwen3_moe().save_pretrained(folder)
    tasks.arithmetic_tokenizer().save_pretrained(folder)
    return folder
