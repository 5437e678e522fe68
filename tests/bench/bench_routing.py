"""What recording and replaying cost: seconds of forward + backward at 8k tokens, bytes, and
recording while decoding.

    OMP_NUM_THREADS=1 python tests/bench/bench_routing.py

Processor time of this process, live and replayed in turns; the ratio is the median over rounds of
the ratio within a round, with the range of its middle half, so that a neighbour on the machine does
not decide. Bytes: a count of the live storages at their peak."""

import argparse
import statistics
import time
import weakref

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from minirl_nb.routing import record, replay, routers

MODELS = {
    "1.8M: 4 layers, hidden 128, 16 experts, 2 a token": dict(
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_experts=16,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
    "15M: 4 layers, hidden 192, 64 experts, 8 a token": dict(
        hidden_size=192,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_experts=64,
        num_experts_per_tok=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
    ),
}


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.see(t.untyped_storage())
        return out

    def see(self, storage):
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, size)

    def gone(self, size):
        self.now -= size


def model_of(sizes):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        intermediate_size=64,
        norm_topk_prob=True,
        use_cache=False,
        max_position_embeddings=4096,
        **sizes,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def drawn(model, B, T):
    r = list(routers(model).values())
    rows = torch.rand(B * T * len(r), r[0].experts).argsort(-1)[:, : r[0].top_k]
    return rows.view(B, T, len(r), -1).to(torch.uint8)


def step(model, x, routes=None, valid=None):
    model.zero_grad(set_to_none=True)
    if routes is None:
        model(x, labels=x).loss.backward()
    else:
        with replay(model, routes, valid):
            model(x, labels=x).loss.backward()


def seconds(f, *args):
    t = time.process_time()
    f(*args)
    return time.process_time() - t


def peak(f, *args):
    with Peak() as p:
        f(*args)
    return p.peak


def routers_alone(model, routes, valid, rounds):
    """Seconds that replay adds inside the routers of one step: with the rest of the model away, the
    neighbours matter less."""
    gates = [r.module for r in routers(model).values()]
    x = torch.randn(valid.numel(), model.config.hidden_size, requires_grad=True)

    def go():
        t = time.process_time()
        for gate in gates:
            gate(x)[1].sum().backward()
        return time.process_time() - t

    live, again = [], []
    for _ in range(rounds):
        live.append(go())
        with replay(model, routes, valid):
            again.append(go())
    return min(again) - min(live)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    B, T = 32, 256
    print(f"{B} x {T} = {B * T} tokens, forward + backward, {rounds} rounds, 1 thread")
    for name, sizes in MODELS.items():
        model = model_of(sizes)
        x = torch.randint(3, 64, (B, T))
        with torch.no_grad(), record(model) as r:
            model(x)
        own = r.pop(B)
        valid = torch.ones(B, T, dtype=torch.bool)
        gaps = valid.clone()
        gaps[:, -1] = False
        cases = {
            "own routes": (own, valid),
            "last token live": (own, gaps),
            "random routes": (drawn(model, B, T), valid),
        }
        times = {k: [] for k in ("live", *cases)}
        for _ in range(rounds):
            times["live"].append(seconds(step, model, x))
            for k, case in cases.items():
                times[k].append(seconds(step, model, x, *case))
        live = statistics.median(times["live"])
        print(
            f"\n{name} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters)\n"
            f"  live            {live:.3f} s"
        )
        for k in cases:
            ratios = sorted(a / b - 1 for a, b in zip(times[k], times["live"]))
            n = len(ratios)
            print(
                f"  {k:15s} {100 * statistics.median(ratios):+.1f}% "
                f"({100 * ratios[n // 4]:+.1f} to {100 * ratios[n - 1 - n // 4]:+.1f})"
            )
        alone = routers_alone(model, own, valid, rounds * 4)
        print(
            f"  routers alone   {100 * alone / live:+.2f}% "
            "(their forward and backward, replayed less live, least of many)"
        )
        checks = statistics.median(seconds(replay, model, own, valid) for _ in range(5))
        print(f"  of which checks {100 * checks / live:+.2f}%")
        extra = peak(step, model, x, own, valid) - peak(step, model, x)
        rows = B * T * own.shape[-1] * 8
        print(
            f"  peak bytes      {extra:+d} over live; packed routes are {own.numel()}, one layer's rows as int64 {rows}"
        )
    sizes = next(iter(MODELS.values()))
    model = model_of(sizes).eval()
    x = torch.randint(3, 64, (64, 1))

    def decode(r=None):
        cache = None
        for _ in range(24):
            out = model(x, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if r:
                r.pop()

    plain, recorded = [], []
    with torch.no_grad():
        decode()
        for _ in range(rounds):
            plain.append(seconds(decode))
            with record(model) as r:
                recorded.append(seconds(decode, r))
    print(
        f"\ndecoding 24 tokens of 64 sequences: {statistics.median(plain):.3f} s, recording "
        f"{100 * statistics.median(a / b - 1 for a, b in zip(recorded, plain)):+.1f}%"
    )


if __name__ == "__main__":
    main()
