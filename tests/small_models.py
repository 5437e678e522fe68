"""Sizes of the random-weight models that tests of several families share."""

SMALL = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    max_position_embeddings=64,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {  # what a family needs beside SMALL
    "qwen3_moe": MOE,
    "qwen2_moe": MOE | dict(shared_expert_intermediate_size=32),
    "mixtral": dict(num_local_experts=4),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2),
}
