"""The sections of `acceptance.py`. Each is a function of the place where it runs and of `note`,
which takes a check: name, value, unit, goal, and whether the goal is met."""

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.bench import bench_limits as bench

Note = Callable[..., None]
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Place:
    "Where a section runs: on a card, or on the processor at small sizes."

    device: torch.device
    card: bool

    @classmethod
    def here(cls) -> "Place":
        card = torch.cuda.is_available()
        if not card:
            torch.set_num_threads(1)
        return cls(torch.device("cuda" if card else "cpu"), card)

    @property
    def dtype(self) -> torch.dtype:
        "What matrices are multiplied in where speed is measured."
        return torch.bfloat16 if self.card else torch.float32


# ---------------------------------------------------------------------- FP8 against torch's own
def _all_numbers(device: torch.device) -> dict[str, Tensor]:
    "Every bfloat16 and float16 number but NaN, and random float32 bits with them."
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    random = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    found = {
        "bfloat16": bits.view(torch.bfloat16),
        "float16": bits.view(torch.float16),
        "float32": random.to(torch.int32).view(torch.float32),
    }
    return {name: x[~x.isnan()].to(device) for name, x in found.items()}


def _product_gap(place: Place, rows: int, columns: int, inner: int) -> tuple[float, float]:
    """torch._scaled_mm on codes and scales of ours, against the emulated matrices multiplied in
    float64: the largest gap beyond the rounding of the result to bfloat16 (2^-9 of it), as a share
    of the sum of absolute products; and the same against activations that were not rounded."""
    from minirl_nb import fp8

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator).to(place.device)
    w = torch.randn(columns, inner, generator=generator).to(place.device)
    codes, scale = fp8.quantize(w, "channel")
    of_rows = fp8.token_scale(x)
    rounded = (x / of_rows).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = {"scale_a": of_rows, "scale_b": scale.T.contiguous()}
    if place.card:
        product = torch._scaled_mm(rounded, codes.T, **scales, out_dtype=torch.bfloat16)
    else:  # on a processor torch 2.11 has one scale for a matrix
        one = dict.fromkeys(scales, torch.ones(()))
        product = torch._scaled_mm(rounded, codes.T, **one, out_dtype=torch.float32)
        product = (product * of_rows * scale.T).to(torch.bfloat16)
    product = product.double()
    w = fp8.dequantize(codes, scale, "channel").double()

    def gap(activation: Tensor) -> float:
        exact, size = activation @ w.T, activation.abs() @ w.abs().T
        beyond = (product - exact).abs() - 2.0**-9 * exact.abs()
        return float((beyond / size).max().clamp(min=0))

    return gap(fp8.round_activation(x).double()), gap(x.double())


def fp8(place: Place, note: Note) -> None:
    "Emulated FP8 is, bit for bit, what torch's casts make; and what the card multiplies."
    from minirl_nb import fp8
    from minirl_nb.bits import E4M3, E5M2, round_to

    formats = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
    for kind, x in _all_numbers(place.device).items():
        for dtype, number in formats.items():
            theirs = x.clamp(-number.greatest, number.greatest).to(dtype).to(x.dtype)
            off = int((round_to(x, number) != theirs).sum())
            name = f"{kind} numbers that differ from the cast to {str(dtype)[6:]}"
            note(name, off, f"of {len(x):,}", "0", off == 0)
    w = torch.randn(3, 300, 260, generator=torch.Generator().manual_seed(1)).to(place.device)
    for kind in fp8.WeightKind.__args__:
        own = fp8.round_weight_(w.clone(), kind)
        off = int((own != fp8.dequantize(*fp8.quantize(w, kind), kind)).sum())
        note(f"weights, scales by {kind}: numbers that differ", off, "", "0", off == 0)
    n = 1024 if place.card else 64
    gap, unrounded = _product_gap(place, n, n, 2 * n)
    # Hopper adds products in 14 bits between promotions to float32: 2^-10 has room for some of them
    note("product of emulated matrices against _scaled_mm", gap, "", "<= 2^-10", gap <= 2**-10)
    seen = unrounded > 2**-10
    note("the same, activations not rounded: is it seen?", unrounded, "", "> 2^-10", seen)


# ---------------------------------------------------------------------- memory of the policy
def memory(place: Place, note: Note) -> None:
    "Log-probabilities over 151,936 words keep no tensor of tokens times words."
    from minirl_nb.policy import LiveBytes
    from tests.bench import bench_policy as policy

    tokens, width = (16_384, 2_048) if place.card else (policy.T, policy.H)
    # on a processor nothing is computed: "meta" counts tensors at full size
    args = policy.inputs("cuda" if place.card else "meta", tokens, policy.V, width)
    if place.card:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        policy.gradients(policy.chunked, *args)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            policy.gradients(policy.chunked, *args)
        peak = live.peak
    logits = 4 * tokens * policy.V
    # the gradients of states and matrix are asked for, so they are allowed
    wanted = sum(4 * x.numel() for x in args[:2])
    note(f"logits of {tokens:,} tokens in float32", logits / 2**20, "MiB")
    note("states' and head's gradients, which are asked for", wanted / 2**20, "MiB")
    note("peak of a forward and backward above its inputs", peak / 2**20, "MiB")
    share = 100 * (peak - wanted) / logits
    note("that without the gradients, as a share of the logits", share, "%", "<= 10", share <= 10)


# ---------------------------------------------------------------------- record and replay
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3")
WAYS = ("eager", "grouped_mm", "batched_mm")


def _family(name: str, place: Place) -> nn.Module:
    "A model of two layers in bfloat16, with random weights and a router that tells experts apart."
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.small_models import FAMILIES as NEEDS
    from tests.small_models import MOE, SMALL

    needs = NEEDS | {
        "deepseek_v3": MOE
        | dict(n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=2)
        | dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
        | dict(v_head_dim=8, first_k_dense_replace=0, num_key_value_heads=4)
    }
    sizes = SMALL | needs[name] | {"eos_token_id": 2, "bos_token_id": 1}
    if place.card:
        larger = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128)
        sizes |= {k: v for k, v in larger.items() if k in sizes}
        sizes |= dict(vocab_size=1024, max_position_embeddings=512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=1.1 * model.config.hidden_size**-0.5)
    return model.to(place.device, torch.bfloat16).eval()


def _gradients(model: nn.Module, tokens: Tensor, forward: nn.Module | None = None) -> dict:
    "Logits and gradients of one forward and backward, by name."
    model.zero_grad(set_to_none=True)
    logits = (model if forward is None else forward)(tokens, use_cache=False).logits
    weight = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    (logits.float() * weight).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach().clone()}


def _gap(a: dict, b: dict) -> float:
    "The largest relative distance of two sets of tensors; inf where names or numbers are missing."
    if a.keys() != b.keys():
        return float("inf")
    gaps = [
        float((a[k].float() - b[k].float()).norm() / b[k].float().norm().clamp(min=1e-20))
        for k in a
    ]
    return max(gaps) if all(g == g for g in gaps) else float("inf")


def _forced(model: nn.Module, B: int, T: int) -> tuple[Tensor, Tensor]:
    "Random routes uint8 [B, T, L, K], valid but for the last token of each row."
    from minirl_nb.routing import routers

    found = list(routers(model).values())
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(B, T, len(found), found[0].experts, generator=generator)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[:, -1] = False
    return scores.argsort(-1)[..., : found[0].top_k].to(torch.uint8), valid


def _replayed(model, tokens, routes, valid, forward=None) -> tuple[dict, Tensor]:
    "Logits and gradients with routes replayed, and the routes that were used."
    from minirl_nb.routing import record, replay

    with record(model) as recorder, replay(model, routes, valid):
        found = _gradients(model, tokens, forward)
        return found, recorder.pop(len(tokens)).cpu()


def _check_way(model: nn.Module, tokens: Tensor, name: str, note: Note) -> dict:
    "Record and replay with one implementation of the experts; gradients under forced routes."
    from minirl_nb.routing import record

    with record(model) as recorder:
        live = _gradients(model, tokens)
        own = recorder.pop(len(tokens)).cpu()
    # kernels that do not repeat their own bits set what can be asked for
    noise = _gap(_gradients(model, tokens), live)
    everywhere = torch.ones(own.shape[:2], dtype=torch.bool)
    again, _ = _replayed(model, tokens, own, everywhere)
    gap, goal = _gap(again, live), "0" if not noise else f"<= 3 x {noise:.1e}"
    note(f"{name}: own routes replayed, largest change", gap, "", goal, gap <= 3 * noise)
    routes, valid = _forced(model, *own.shape[:2])
    forced, used = _replayed(model, tokens, routes, valid)
    off = int((used != routes)[valid].any(-1).sum())
    note(f"{name}: forced routes that were not taken", off, "", "0", off == 0)
    moved = _gap(forced, live)
    note(f"{name}: what forced routes change", moved, "", ">= 0.01", moved >= 0.01)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    kept, _ = _replayed(model, tokens, routes, valid)
    model.gradient_checkpointing_disable()
    model.eval()
    gap = _gap(kept, forced)
    note(f"{name}: with checkpointing, largest change", gap, "", goal, gap <= 3 * noise)
    return forced


def _check_compiled(place: Place, model, tokens, forced: dict, name: str, note: Note) -> None:
    "Forced routes under torch.compile: the same experts, and gradients within bfloat16's rounding."
    import torch._dynamo

    torch._dynamo.reset()
    # without a card only the tracing is tried: no compiler of C++ is needed
    compiled = torch.compile(model, backend="inductor" if place.card else "eager")
    routes, valid = _forced(model, *tokens.shape)
    found, used = _replayed(model, tokens, routes, valid, compiled)
    off = int((used != routes)[valid].any(-1).sum())
    note(f"{name}, compiled: forced routes that were not taken", off, "", "0", off == 0)
    # Fused kernels round at other places: some roundings of 2^-9 in each of two layers. A tensor
    # in which much cancels shows more of them, so all gradients are taken as one
    logits = _gap({"": found.pop("logits")}, {"": forced["logits"]})
    off = sum(float((g.float() - forced[k].float()).square().sum()) for k, g in found.items())
    size = sum(float(forced[k].float().square().sum()) for k in found)
    note(f"{name}, compiled: change of logits", logits, "", "<= 0.05", logits <= 0.05)
    gap = (off / size) ** 0.5
    note(f"{name}, compiled: change of the gradient", gap, "", "<= 0.05", gap <= 0.05)


def families(place: Place, note: Note) -> None:
    "Six families in bfloat16, three implementations of experts, checkpointing and torch.compile."
    torch.use_deterministic_algorithms(True, warn_only=True)
    for family in FAMILIES:
        model = _family(family, place)
        tokens = bench.tokens_of(model, 2, 128 if place.card else 12)
        for way in WAYS:
            model.set_experts_implementation(way)
            forced = _check_way(model, tokens, f"{family}, {way}", note)
            if way == "grouped_mm" and (place.card or family == FAMILIES[0]):
                _check_compiled(place, model, tokens, forced, f"{family}, {way}", note)


# ---------------------------------------------------------------------- speed of a training step
# 2.06 billion weights, 0.84 of them for a token: AdamW's states and a step of 8,192 tokens
# fit on a card of 80 GB
LARGE = dict(
    model_type="qwen3_moe",
    vocab_size=151_936,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=1024,
    intermediate_size=1024,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
LITTLE = dict(
    vocab_size=512,
    hidden_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    moe_intermediate_size=64,
)


def _mixture(place: Place, dtype: torch.dtype, layers: int = 12) -> nn.Module:
    sizes = LARGE if place.card else LARGE | LITTLE
    return bench.random_model(sizes, layers if place.card else 2, place.device, dtype)


def training(place: Place, note: Note) -> None:
    "A gradient step of a mixture: its share of the card's matrix peak, and what replay adds."
    rounds = 7 if place.card else 3
    model = _mixture(place, place.dtype)
    weights = sum(p.numel() for p in model.parameters())
    tokens = bench.tokens_of(model, 4 if place.card else 2, 2048 if place.card else 64)
    peak = bench.matrix_peak(place.device, place.dtype, 8192 if place.card else 256)
    routes = bench.own_routes(model, tokens)
    whole = model, bench.optimizer_of(model), tokens
    sides = {
        "live": bench.training(*whole),
        "replayed": bench.training(*whole, routes=routes),
        # by default 64 MB of logits, what a processor's caches like: 110 rows of this vocabulary
        "more logits": bench.training(*whole, chunk=2048),
    }
    seconds = bench.in_turns(sides, rounds, place.device)
    step, more_logits = (statistics.median(seconds[name]) for name in ("live", "more logits"))
    work = 3 * bench.Work.from_model(model).forward(*tokens.shape)
    note("weights of the mixture", weights / 1e6, "million")
    note(f"matrix peak, {str(place.dtype)[6:]}", peak / 1e12, "TFLOP/s")
    note("gradient step: forward, loss, backward, AdamW", step, "s")
    note("tokens a second", tokens.numel() / step, "tokens/s")
    note("share of the matrix peak", 100 * work / step / peak, "%")
    note("the same, 2,048 rows of logits at once", 100 * work / more_logits / peak, "%")
    more = bench.added(seconds, "replayed", "live")
    note("replay adds", more, "%", "<= 3", more <= 3 if place.card else None)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    note("weights are finite after these steps", float(finite), "", "1", finite)


# ---------------------------------------------------------------------- FSDP2 on one card
def fsdp(place: Place, note: Note) -> None:
    "A sharded model on one process: NCCL's collectives, three steps, gathering, a checkpoint."
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from minirl_nb.parallel import Processes, gradient_norm
    from tests.small_runs import free_port, small

    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    folder = Path(tempfile.mkdtemp())
    config = small(folder / "run", ROOT / "data/coldstart", **{"model.device": str(place.device)})
    with Processes(config) as world:
        x = torch.ones(8, device=place.device)
        dist.all_reduce(x)
        dist.all_to_all_single(torch.empty_like(x), x)
        wanted = "cuda:nccl" if place.card else "cpu:gloo"
        found = wanted in dist.get_backend_config(dist.group.WORLD)
        note(f"collectives run through {wanted}", float(found), "", "1", found)
        mesh = init_device_mesh(place.device.type, (1,))
        models = [_family("qwen3_moe", place).float() for _ in range(2)]
        for layer in models[1].model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(models[1], mesh=mesh)
        world.sharded = True  # over a mesh of one card
        tokens = bench.tokens_of(models[0], 4, 32)
        routes = bench.own_routes(models[0], tokens)
        optimizers = [world.optimizer(m, config.optimizer) for m in models]
        norms: list[float] = []  # of the third gradients
        for model, optimizer in zip(models, optimizers):
            for _ in range(3):
                bench.objective_step(model, tokens, routes=routes)
                norm = float(gradient_norm(model, world.messages))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            norms.append(norm)
        gap = abs(norms[1] / norms[0] - 1)
        note("norm of the third gradient, sharded against not", gap, "", "<= 1e-3", gap <= 1e-3)
        whole, own = (dict(world.weights(m)) for m in models)
        # three steps of AdamW in float32: its division by small moments enlarges roundings
        gap = _gap(own, whole)
        note("weights after three steps, sharded against not", gap, "", "<= 1e-3", gap <= 1e-3)
        world.save(models[1], optimizers[1], folder)(True)
        before = {k: v.clone() for k, v in own.items()}
        with torch.no_grad():
            for p in models[1].parameters():
                p.zero_()
        world.restore(models[1], optimizers[1], folder)
        gap = _gap(dict(world.weights(models[1])), before)
        note("weights read from a sharded checkpoint, change", gap, "", "0", gap == 0)


# ---------------------------------------------------------------------- a run
def demo(place: Place, note: Note) -> None:
    "The recipe of the demo for some steps, then on from its checkpoint."
    import importlib.util

    from minirl_nb import train
    from tests.small_runs import metrics, small

    if importlib.util.find_spec("seaborn") is None:
        train.plot_run = lambda rows, path: None  # a run needs no drawing to be a run
    folder = Path(tempfile.mkdtemp()) / "run"
    path = str(ROOT / "data" / "coldstart")
    changes = {"output.folder": str(folder), "output.progress": False, "output.samples_every": 0}
    changes |= {"model.path": path, "evaluation.samples": 4, "output.checkpoint_every": 16}
    if place.card:
        config = train.load_config("demo", changes | {"steps": 32})
        goes_on = train.load_config("demo", changes | {"steps": 48, "resume": True})
    else:
        few = {"evaluation.every": 0, "steps": 2, "rollout.max_new_tokens": 12}
        config = small(folder, path, **few)
        goes_on = small(folder, path, **few | {"steps": 4, "resume": True})
    found = [train.train(config), train.train(goes_on)]
    rows = [r for r in metrics(folder) if r["kind"] == "step"]
    last = found[1].steps()[-1]
    note("gradient steps in metrics.jsonl", len(rows), "", str(goes_on.steps))
    done = len(rows) == goes_on.steps and rows[-1]["step"] == goes_on.steps
    note("the run went on from its checkpoint to its last step", float(done), "", "1", done)
    k3 = max(r["k3"] for r in rows)
    note("largest KL (k3) of engine and trainer", k3, "nats", "in (0, 0.05]", 0 < k3 <= 0.05)
    note("reward of the first rollout step", rows[0]["reward"])
    note("reward of the last rollout step", rows[-1]["reward"])
    for phase in ("generate", "recompute", "update", "transfer", "parity"):
        note(f"seconds of a rollout step, {phase}", last[f"seconds/{phase}"], "s")
    note("peak memory", last["peak_memory"] / 2**20, "MiB")


# ---------------------------------------------------------------------- the plan
def _clock_of_pass(place: Place, note: Note, settings: dict) -> None:
    "Planned seconds of an update with one micro-batch, against the clock."
    from minirl_nb.config import load_config
    from minirl_nb.plan.case import Case, shape
    from minirl_nb.plan.cluster import Assumptions, Cluster
    from minirl_nb.plan.step import MicroBatch, measure
    from minirl_nb.plan.time import Load, update_seconds

    model = _mixture(place, torch.bfloat16)
    assume = Assumptions(prompt_tokens=64 if place.card else 12)
    config = load_config("demo", settings | {"batch.updates": 1, "rollout.fp8": "none"})
    cluster = Cluster.here(1)
    hf_config = model.config
    case = Case(config, cluster, assume.on(cluster), hf_config, shape(hf_config))
    micro = MicroBatch.largest(case)
    load = Load(micro.tokens, micro.rows * micro.width**2)
    measured = measure(case, micro, True, False)
    planned = sum(update_seconds(case, measured, micro, [[load]]).values())
    tokens = bench.tokens_of(model, micro.rows, micro.width)
    step = bench.training(model, bench.optimizer_of(model), tokens)
    seconds = statistics.median(bench.in_turns({"": step}, 5, place.device)[""])
    ratio = planned / seconds
    note("an update of one micro-batch, planned", planned, "s")
    note("an update of one micro-batch, by the clock", seconds, "s")
    met = 0.5 <= ratio <= 2 if place.card else None
    note("planned over measured", ratio, "", "0.5 to 2", met)


def _memory_of_update(place: Place, note: Note, settings: dict) -> None:
    "Planned memory of an update, against what torch's allocator gave out in a run's own update."
    from minirl_nb.config import load_config
    from minirl_nb.plan import Assumptions, Cluster, plan
    from minirl_nb.plan.rehearsal import rehearse

    assume = Assumptions(prompt_tokens=64 if place.card else 12)
    config = load_config("demo", settings | {"rollout.fp8": "none"})
    cluster = Cluster.here(1)
    phase = plan(config, cluster, assume, search=False).phase("update")
    reserves = sum(phase.memory.get(k, 0.0) for k in ("context", "fragmentation"))
    planned = phase.total - reserves
    found = rehearse(config, assume, timeout=100)["allocator"]
    gap = 100 * (planned / found - 1)
    note("memory of an update, planned", planned / 2**20, "MiB")
    note("memory of an update, from the allocator", found / 2**20, "MiB")
    note("planned over allocated", gap, "%", "within 5", abs(gap) <= 5)


def plan(place: Place, note: Note) -> None:
    "The plan's time against the clock, and its memory against the allocator."
    if not place.card:
        settings = {"model.path": str(ROOT / "data" / "coldstart"), "model.dtype": "bfloat16"}
        settings |= {"rollout.max_new_tokens": 52, "batch.tokens": 512}
        _memory_of_update(place, note, settings)
        _clock_of_pass(place, note, settings)
        return
    settings = {"rollout.max_new_tokens": 1984, "batch.tokens": 8192, "model.dtype": "bfloat16"}
    _clock_of_pass(place, note, settings)
    with tempfile.TemporaryDirectory() as folder:
        _mixture(place, torch.bfloat16, 4).save_pretrained(folder)
        # the vocabulary of the mixture has room for the tokenizer of the sums
        _memory_of_update(place, note, settings | {"model.path": folder})
