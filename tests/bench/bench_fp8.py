"""What FP8 emulation costs on a CPU: a decoding step against the plain model, loading weights, one
rounding, and the experts' products.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_fp8

Processor time of this process; sides take turns and the best round counts, so that a neighbour on
the machine does not decide. The model is the demo's size (0.34 million parameters), random weights.
A whole `TorchEngine` is measured by `make bench ARGS=engine`."""

import copy
import time

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from minirl_nb import fp8


def model(**changes):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    m = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | changes)).eval()
    m.set_experts_implementation("grouped_mm")
    return m


def best(sides, rounds=12):
    "Least processor seconds of each side, taking turns after a warm-up."
    least = dict.fromkeys(sides, float("inf"))
    for r in range(rounds + 1):
        for name, f in sides.items():
            t = time.process_time()
            f()
            if r:
                least[name] = min(least[name], time.process_time() - t)
    return least


@torch.no_grad()
def decode(rows=256, steps=10):
    """A decoding step of `rows` sequences, one token each through all layers; the context is that
    token: attention adds nothing to either."""
    plain = model()
    sides = {"plain": plain} | {s: fp8.emulate(copy.deepcopy(plain), s) for s in fp8.SCHEMES}
    tokens = torch.randint(0, 16, (rows, 1))

    def run(m):
        for _ in range(steps):
            m(tokens, use_cache=False)

    s = best({k: (lambda m=m: run(m)) for k, m in sides.items()})
    return [
        (f"decoding step of {rows} rows, {k}", 1e3 * v / steps, "ms", "") for k, v in s.items()
    ] + [
        (f"  {k} / plain", s[k] / s["plain"], "x", "<= 1.5" if k in fp8.VLLM_SCHEMES else "<= 2")
        for k in fp8.SCHEMES
    ]


@torch.no_grad()
def load():
    rows = []
    for sizes in (
        {},
        dict(hidden_size=512, moe_intermediate_size=256, head_dim=64, num_hidden_layers=4),
    ):
        trainer = model(**sizes)
        n = sum(p.numel() for p in trainer.parameters())
        engines = {
            s or "plain copy": fp8.emulate(copy.deepcopy(trainer), s)
            for s in (None, *(k for k in fp8.SCHEMES if k != "fp8_cache"))
        }
        named = dict(trainer.named_parameters())
        for k, v in best(
            {k: (lambda e=e, named=named: fp8.load_(e, named)) for k, e in engines.items()}, 5
        ).items():
            rows.append((f"load_ of {n / 1e6:.2f}M parameters, {k}", 1e3 * v, "ms", ""))
    return rows


@torch.no_grad()
def rounding():
    rows, repeated = [], lambda f: lambda: [f() for _ in range(20)]
    for shape in ((256, 64), (512, 32), (4096, 64)):
        x = torch.randn(shape)

        def cast(x=x):
            s = fp8.token_scale(x)
            return (x / s).to(torch.float8_e4m3fn).float() * s

        sides = {
            "round_activation": lambda x=x: fp8.round_activation(x),
            "round_activation to mxfp4": lambda x=x: fp8.round_activation(x, "mxfp4"),
            "round_activation to nvfp4": lambda x=x: fp8.round_activation(x, "nvfp4"),
            "with torch's 8-bit casts": cast,
            "copy": x.clone,
        }
        s = best({k: repeated(f) for k, f in sides.items()})
        rows += [
            (f"{shape[0]} x {shape[1]} activations, {k}", 1e6 * v / 20, "us", "")
            for k, v in s.items()
        ]
    return rows


def experts():
    layer = model().model.layers[0].mlp.experts
    eager = type(layer).forward
    layer.config._experts_implementation = "eager"
    ways = {
        "eager": lambda *a: eager(layer, *a),
        "grouped_mm": lambda *a: grouped_mm_experts_forward(layer, *a),
        "batched_mm": lambda *a: batched_mm_experts_forward(layer, *a),
    }
    rows = []
    for n in (16, 256, 4096):
        gates, index = torch.randn(n, 16).softmax(-1).topk(2)
        args = torch.randn(n, 64), index, gates
        used = {
            k: f for k, f in ways.items() if n < 4096 or k != "batched_mm"
        }  # gathers a matrix for every token
        with torch.no_grad():
            s = best(
                {k: (lambda f=f, args=args: [f(*args) for _ in range(5)]) for k, f in used.items()}
            )
        rows += [
            (f"experts, {n} tokens, forward, {k}", 1e6 * v / 5, "us", "") for k, v in s.items()
        ]
    args[0].requires_grad_()
    s = best({k: (lambda f=f: f(*args).sum().backward()) for k, f in used.items()})
    return rows + [
        (f"experts, {n} tokens, forward and backward, {k}", 1e6 * v, "us", "") for k, v in s.items()
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for section in (decode, load, rounding, experts):
        for label, value, unit, goal in section():
            print(f"{label:64s} {value:10.3f} {unit:3s} {goal}", flush=True)
