"""How near this library comes to what the machine can do, on a mixture of the pretrained mixture's
shape (SmolLM2-135M cut into eight experts, four a token) with random weights.

    make bench ARGS="limits"                 # 30 layers; a machine that does nothing else
    make bench ARGS="limits --layers 2"      # smaller

The limits are measured in the same run, with the same number of threads: the rate of a large matrix
product, and the rate at which memory is copied. Work is counted by formula: a token costs two
operations for each weight that it passes in a forward, four more in a backward, and attention
2 T^2 times the width of its heads for a row of T tokens (causal; three times that with the
backward). Without a token the share of a limit says what a neighbour on the machine took as well.

What `minirl_nb` is not asked to do is left out: the optimiser's step is part of a training step."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# the model of `make smollm2_moe`: eight experts, of which a token uses four
MIXTURE = dict(
    model_type="mixtral",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=384,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    num_local_experts=8,
    num_experts_per_tok=4,
    tie_word_embeddings=True,
)
DENSE = MIXTURE | dict(model_type="llama", intermediate_size=1536)


# ---------------------------------------------------------------------- clocks and limits
def seconds_of(f: Callable, device: torch.device) -> float:
    "Seconds of one call, its work on the device included."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(sides: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list]:
    "Seconds of each side in each round; the sides take turns, and a round before is not counted."
    found = {name: [] for name in sides}
    for r in range(rounds + 1):
        for name, f in sides.items():
            seconds = seconds_of(f, device)
            if r:
                found[name].append(seconds)
    return found


def added(seconds: dict[str, list], side: str, base: str) -> float:
    "Per cent that a side takes more than the base: the median over rounds of their ratio."
    ratios = [a / b for a, b in zip(seconds[side], seconds[base])]
    return 100 * (statistics.median(ratios) - 1)


def matrix_peak(device: torch.device, dtype: torch.dtype, n: int, rounds: int = 8) -> float:
    "Operations a second of the best of some products of two n x n matrices."
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(in_turns({"mm": lambda: a @ b}, rounds, device)["mm"])


def bandwidth(device: torch.device, size: int, rounds: int = 8) -> float:
    "Bytes a second, read and written, of the best of some copies of `size` bytes."
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    return 2 * size / min(in_turns({"copy": lambda: b.copy_(a)}, rounds, device)["copy"])


# ---------------------------------------------------------------------- the model and its work
def random_model(
    sizes: dict, layers: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    "A causal language model with random weights, made on its device."
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"max_position_embeddings": 8192, "eos_token_id": 0, "pad_token_id": 0} | sizes
    config = AutoConfig.for_model(num_hidden_layers=layers, **sizes)
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if sizes["model_type"] != "llama":
        model.set_experts_implementation("grouped_mm")
    return model


@dataclass(frozen=True)
class Work:
    "What a model has to compute and to read, from its config."

    active: int  # weights of matrices that a token passes, the output head included
    experts: int  # of these models' weights, those of experts
    E: int
    K: int
    attention: int  # layers times the width of all heads
    cache: int  # numbers that a token leaves in the cache

    @classmethod
    def from_model(cls, model: nn.Module) -> "Work":
        from minirl_nb.plan.case import shape

        c, found = model.config, shape(model.config)
        return cls(
            active=found.active,
            experts=found.experts,
            E=found.E,
            K=found.K,
            attention=found.layers * c.num_attention_heads * c.head_dim,
            cache=found.kv_bytes // 2,
        )

    def forward(self, rows: int, width: int) -> float:
        "Operations of a forward with all log-probabilities; training takes three times that."
        return 2.0 * self.active * rows * width + 2.0 * self.attention * rows * width**2

    def prefill(self, rows: int, width: int, head: int) -> float:
        "Operations of a forward whose head, of so many weights, sees the last token of a row."
        return self.forward(rows, width) - 2.0 * head * rows * (width - 1)

    def decoding(self, rows: int, context: float, size: int) -> tuple[float, float]:
        "Operations and bytes of one token for each row: experts that no row chose are not read."
        without_experts = self.active - (self.experts * self.K // self.E if self.E else 0)
        used = 1 - (1 - self.K / self.E) ** rows if self.E else 0.0
        operations = 2.0 * self.active * rows + 4.0 * self.attention * rows * context
        return operations, size * (
            without_experts + used * self.experts + self.cache * rows * context
        )


def tokens_of(model: nn.Module, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(1, model.config.vocab_size, (rows, width), generator=generator)
    return drawn.to(model.device)


def objective_step(
    model: nn.Module,
    tokens: Tensor,
    micro: int = 1,
    routes: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Log-probabilities, MiniRL's loss and its gradients in `micro` micro-batches of equal rows,
    with `routes` [B, T, L, K] replayed; `chunk` rows of logits at once."""
    from minirl_nb.objective import MINIRL
    from minirl_nb.policy import token_logprobs
    from minirl_nb.routing import replay

    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    advantage = 1.0 - 2.0 * (torch.arange(len(tokens), device=tokens.device) % 2)
    for rows in torch.arange(len(tokens)).chunk(micro):
        context = contextlib.nullcontext()
        if routes is not None:
            valid = torch.ones(len(rows), tokens.shape[1], dtype=torch.bool)
            context = replay(model, routes[rows], valid)
        with context:
            logp, _ = token_logprobs(model, tokens[rows], mask[rows], entropy=False, chunk=chunk)
            loss = MINIRL.loss(
                logp=logp,
                logp_old=logp.detach(),
                logp_mu=logp.detach(),
                advantage=advantage[rows],
                response_mask=mask[rows],
                count=len(tokens),
            )
            loss.backward()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    "AdamW that moves weights by too little to matter."
    return torch.optim.AdamW(model.parameters(), lr=1e-9)


def training(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, **options
) -> Callable:
    "A function that does one gradient step: forward, loss, backward, AdamW."

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective_step(model, tokens, **options)
        optimizer.step()

    return step


@torch.no_grad()
def own_routes(model: nn.Module, tokens: Tensor) -> Tensor:
    "The experts [B, T, L, K] that the model chooses by itself, on the CPU."
    from minirl_nb.routing import record

    with record(model) as recorder:
        model.base_model(tokens, use_cache=False)
    return recorder.pop(len(tokens)).cpu()


# ---------------------------------------------------------------------- what is measured
def _train_rows(models: dict, tokens: Tensor, peak: float, rounds: int) -> list[tuple]:
    "Training, recomputation and what replay adds, as shares of the matrix peak."
    from minirl_nb.policy import token_logprobs

    device, rows = tokens.device, []
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    for name, model in models.items():
        work = Work.from_model(model).forward(*tokens.shape)
        optimizer = optimizer_of(model)
        sides = {"training step": training(model, optimizer, tokens)}
        if name == "mixture":
            routes = own_routes(model, tokens)
            sides["replayed"] = training(model, optimizer, tokens, routes=routes)
        with_no_grad = torch.no_grad()(token_logprobs)
        sides["recompute"] = lambda f=with_no_grad, m=model: f(m, tokens, mask)
        sides["AdamW"] = optimizer.step  # once more, with the gradients of the training step
        seconds = in_turns(sides, rounds, device)
        for side, times, goal in (("training step", 3, ">= 80"), ("recompute", 1, "")):
            share = 100 * times * work / statistics.median(seconds[side]) / peak
            rows.append((f"{name}, {side}, share of the matrix peak", share, "%", goal))
        share = 100 * statistics.median(
            a / b for a, b in zip(seconds["AdamW"], seconds["training step"])
        )
        label = f"{name}, AdamW's share of a training step of {tokens.numel():,} tokens"
        rows.append((label, share, "%", ""))
        if "replayed" in seconds:
            more = added(seconds, "replayed", "training step")
            rows.append((f"{name}, replay adds to a training step", more, "%", "<= 3"))
        model.zero_grad(set_to_none=True)
    return rows


def _decoding_seconds(engine, rows: int, prompt: int, new: int, rounds: int) -> float:
    "Seconds of one decoding step of `rows` responses: what twice as many steps take longer."
    from minirl_nb.rollout import Sampling

    prompts = [list(range(1, prompt + 1))]
    sides = {
        str(n): lambda n=n: engine.generate(prompts, Sampling(n=rows, max_new_tokens=n))
        for n in (new, 2 * new)
    }
    seconds = in_turns(sides, rounds, engine.model.device)
    more = [long - short for short, long in zip(*seconds.values())]
    return statistics.median(more) / new


def _decode_rows(
    model: nn.Module, peak: float, stream: float, rounds: int, batches: tuple[int, ...], new: int
) -> list[tuple]:
    "Decoding against the roofline over batch sizes; prefill; what emulated FP8 adds."
    from minirl_nb.rollout import Sampling, TorchEngine

    work, size, prompt = Work.from_model(model), model.dtype.itemsize, 16
    never = model.config.vocab_size  # no token has this number: a response never ends
    options = {"eos_token_id": never, "pad_token_id": 0, "max_batch": max(batches)}
    engines = {k: TorchEngine(model, k, **options) for k in (None, "fp8_per_channel")}
    rows, seconds = [], {}
    for batch in batches:
        few = max(4, min(new, 16 * new // batch))  # a step of many rows is long enough to time
        for name, engine in engines.items():
            seconds[name] = _decoding_seconds(engine, batch, prompt, few, rounds)
        operations, moved = work.decoding(batch, prompt + 1.5 * few, size)
        least = max(operations / peak, moved / stream)
        bound = "matrices" if operations / peak > moved / stream else "memory"
        label = f"decoding, {batch} rows, share of the roofline ({bound})"
        rows.append((label, 100 * least / seconds[None], "%", ">= 50"))
        rows.append((f"decoding, {batch} rows", batch / seconds[None], "tokens/s", ""))
    more = 100 * (seconds["fp8_per_channel"] / seconds[None] - 1)
    rows.append((f"FP8 emulation adds to decoding, {batches[-1]} rows", more, "%", "<= 50"))
    prompts = tokens_of(model, 4, 16 * new).tolist()
    once = lambda: engines[None].generate(prompts, Sampling(max_new_tokens=1))  # noqa: E731
    spent = statistics.median(in_turns({"": once}, rounds, model.device)[""])
    head = model.get_output_embeddings().weight.numel()
    share = 100 * work.prefill(4, 16 * new, head) / spent / peak
    return [*rows, (f"prefill of 4 x {16 * new} tokens, share of the matrix peak", share, "%", "")]


def _growth_rows(model: nn.Module, rows: int, width: int, rounds: int) -> list[tuple]:
    "The exponent of time over tokens, and memory over micro-batches."
    from minirl_nb.policy import LiveBytes

    tokens = tokens_of(model, 16 * rows, width)
    counts = [rows, 4 * rows, 16 * rows]
    sides = {
        str(n): lambda n=n: objective_step(model, tokens[:n], max(1, n // rows)) for n in counts
    }
    seconds = [statistics.median(s) for s in in_turns(sides, rounds, model.device).values()]
    exponent = np.polyfit(np.log(counts), np.log(seconds), 1)[0]
    peaks = []
    for n in (2, 8):  # from the second micro-batch on, gradients are there
        model.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            objective_step(model, tokens[: n * rows], n)
        peaks.append(live.peak)
    model.zero_grad(set_to_none=True)
    return [
        ("time over 16 times the tokens, exponent", float(exponent), "", "<= 1.05"),
        ("memory of 8 micro-batches over that of 2", peaks[1] / peaks[0], "x", "<= 1.01"),
    ]


def limits(
    rounds: int = 5,
    layers: int = 30,
    rows: int = 2,
    width: int = 512,
    batches: tuple[int, ...] = (1, 4, 16, 64, 256),
    new: int = 16,
    changes: dict | None = None,  # of the model's sizes, for a test
    device: str = "cpu",
) -> Iterator[tuple]:
    "Rows (label, value, unit, goal) of the benchmark's table, as they are measured."
    place, dtype = torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16
    n, size = (1024, 2**27) if device == "cpu" else (8192, 2**31)
    peak, stream = matrix_peak(place, dtype, n), bandwidth(place, size)
    changes = changes or {}
    mixture = random_model(MIXTURE | changes, layers, place, dtype)
    tokens = tokens_of(mixture, rows, width)
    models = {"mixture": mixture, "dense": random_model(DENSE | changes, layers, place, dtype)}
    yield "limit: matrix products", peak / 1e9, "GFLOP/s", ""
    yield "limit: memory", stream / 1e9, "GB/s", ""
    yield from _train_rows(models, tokens, peak, rounds)
    yield from _decode_rows(mixture, peak, stream, rounds, batches, new)
    yield from _growth_rows(mixture, 1, width // 2, rounds)
