"""Every family of transformers that has a causal language model with routed experts, as a tiny
model with random weights.

The families are discovered: a modeling module whose ForCausalLM class stands next to modules
that declare router logits or are named ...Experts. What is written down here is only how to make
each configuration small.
"""

import importlib
import inspect

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LIMIT = 400_000  # parameters of a tiny model

# used where a configuration knows the name
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    ffn_hidden_size=32,
    expert_ffn_hidden_size=16,
    shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    shared_intermediate_size=16,
    shared_experts_intermediate_size=16,
    d_model=32,
    num_hidden_layers=3,
    n_layers=3,
    num_layers=2,
    num_attention_heads=4,
    n_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    n_routed_experts=8,
    num_local_experts=8,
    moe_num_experts=8,
    num_shared_experts=1,
    n_shared_experts=1,
    zero_expert_num=2,
    num_experts_per_tok=3,
    num_experts_per_token=3,
    top_k_experts=3,
    moe_topk=3,
    n_group=4,
    num_expert_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_head_dim=8,
    index_n_heads=2,
    index_topk=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_heads=4,
    linear_head_dim=8,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    mamba_dt_rank=4,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    sliding_window=8,
    sliding_window_size=8,
    d_rel=4,
    rel_extent=8,
    max_position_embeddings=64,
    max_seq_len=64,
    model_max_length=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_nextn_predict_layers=0,
    router_hidden_size=16,
    use_mamba_kernels=False,
)
# and what one family needs beyond that
FAMILY = {
    "afmoe": dict(num_dense_layers=1),
    "bailing_hybrid": dict(
        layer_types=["linear_attention", "full_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "beam": dict(mlp_layer_types=["dense", "sparse", "sparse"]),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, hidden_size=32, moe_num_experts=8, moe_top_k=3),
    ),
    "deepseek_v2": dict(topk_method="group_limited_greedy"),
    "deepseek_v4": dict(
        mlp_layer_types=["hash_moe", "moe", "moe"],
        num_key_value_heads=1,
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
        layer_types=["sliding_attention", "sliding_attention", "compressed_sparse_attention"],
    ),
    "doge": dict(is_moe=True, num_experts=16),
    "dots1": dict(n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3),
    "dots3_note": dict(
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
        head_dim=16,
    ),
    "gemma4": dict(
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=3,
        moe_intermediate_size=16,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
    ),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention", "full_attention"]),
    "inkling": dict(mlp_layer_types=["dense", "sparse", "sparse"]),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0
    ),
    "kimi_linear": dict(
        layer_types=["linear_attention", "full_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "lfm2_moe": dict(num_dense_layers=1, layer_types=["conv", "full_attention", "full_attention"]),
    "llama4": dict(num_experts_per_tok=2, interleave_moe_layer_step=1, intermediate_size_mlp=32),
    "longcat_flash": dict(num_layers=2),
    "nemotron_h": dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"], n_group=4
    ),
    "phimoe": dict(num_experts_per_tok=2),
    "qwen3_5_moe": dict(layer_types=["linear_attention", "full_attention", "full_attention"]),
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention", "full_attention"]),
    "qwen4_exp": dict(
        layer_types=["linear_attention", "indexed_attention", "indexed_attention"],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        ple_embed_dim=8,
        ngram_vocab_size_base=64,
        make_ngram_vocab_size_divisible_by=2,
        split_ngram_parts=1,
        hc_lowrank=8,
        heads_per_ngram=2,
    ),
    "zaya": dict(num_experts_per_tok=1),
}
LATENT = ("kv_lora_rank",)  # attention with a latent cache has as many key heads as query heads


def discover():
    """{family: class of its causal language model}."""
    found = {}
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        for name in (names,) if isinstance(names, str) else names:
            cls = getattr(transformers, name)
            module = importlib.import_module(cls.__module__)
            family = cls.__module__.split(".")[-2]
            own = [
                c
                for c in vars(module).values()
                if inspect.isclass(c)
                and issubclass(c, nn.Module)
                and c.__module__ == module.__name__
            ]
            routed = any(
                (getattr(c, "_can_record_outputs", None) or {}).get("router_logits")
                or c.__name__.endswith("Experts")
                for c in own
            )
            if routed and name.endswith("ForCausalLM"):
                found.setdefault(family, cls)
    return dict(sorted(found.items()))


def config(cls, **more):
    """A tiny configuration of the model class `cls`."""
    family, kind = cls.__module__.split(".")[-2], cls.config_class
    known = set(inspect.signature(kind.__init__).parameters)
    wanted = {
        k: v for k, v in SMALL.items() if k in known or k in getattr(kind, "attribute_map", {})
    }
    if any(k in known for k in LATENT):
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]
    return kind(**(wanted | FAMILY.get(family, {}) | more))


def build(cls, seed=0, dtype=torch.float32, **more):
    """A tiny model of the class `cls` with random weights; every parameter is drawn, also those
    that a family starts at zero.
    """
    c = config(cls, **more)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(c).parameters())
    if size > LIMIT:
        raise ValueError(f"{cls.__name__} would have {size} parameters")
    torch.manual_seed(seed)
    model = cls(c).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 or not p.any():
                p.normal_(std=0.2 if p.ndim > 1 else 0.02)
    return model


class Double(TorchFunctionMode):
    """Makes a float64 model float64 throughout.

    Families cast to float32 in norms, routers and rotary tables, whatever the type of the model.
    Products of float32 numbers then depend on the number of rows and on the processor, by 1e-7,
    which would hide a mistake of that size.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        widened = {torch.float32: torch.float64}
        args = tuple(widened.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {
            k: widened.get(v, v) if isinstance(v, torch.dtype) else v
            for k, v in (kwargs or {}).items()
        }
        return func(*args, **kwargs)
