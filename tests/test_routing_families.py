"""Record and replay in every family of transformers with routed experts.

This file measures `data/routing_conformance.md`:

    pytest tests/test_routing_families.py            # measure, and require the stored table
    python tests/test_routing_families.py            # measure, and write it
"""

import functools
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from moe_families import Double, build, discover
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from minirl_nb import routing

TABLE = Path(__file__).resolve().parent.parent / "data" / "routing_conformance.md"
FAMILIES = discover()
B, T = 2, 10
CHECKS = {
    "a": "recording changes no bit of the logits",
    "b": "replaying the model's own routes changes no bit of the logits, nor of any gradient",
    "c": "forced random routes are honoured: the input of the experts shows them, and rows that "
    "are not valid route live",
    "d": "the router's gradient is not zero, and is the slope of the loss with the choice held "
    "fixed, by central differences in float64 "
    "to 1e-8",
    "e": "after the `with`, and after an exception inside it, the model is what it was",
    "f": "with activation checkpointing every gradient is the same to the bit",
}


def batch(model):
    g = torch.Generator().manual_seed(1)
    return torch.randint(3, 64, (B, T), generator=g)


def random_routes(found, seed=2):
    g = torch.Generator().manual_seed(seed)
    rows = [
        torch.stack([torch.randperm(r.experts, generator=g)[: r.top_k] for _ in range(B * T)])
        for r in found.values()
    ]
    return torch.stack(rows, 1).view(B, T, len(rows), -1).to(torch.uint8)


def loss_of(model, tokens):
    logits = model(tokens, use_cache=False).logits
    g = torch.Generator().manual_seed(3)
    return (logits * torch.randn(logits.shape, generator=g).to(logits.dtype)).sum()


def gradients(model, tokens, forward=loss_of):
    model.zero_grad(set_to_none=True)
    forward(model, tokens).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def state(model):
    """Everything that a careless patch could leave behind."""
    parts = {}
    for name, m in model.named_modules():
        parts[name] = (
            type(m),
            sorted(m.__dict__),
            sorted(m._forward_hooks),
            sorted(m._forward_pre_hooks),
            m.training,
            getattr(m.forward, "__func__", m.forward),
        )
    return (
        parts,
        {k: v.clone() for k, v in model.state_dict().items()},
        len(_get_current_function_mode_stack()),
    )


def unchanged(before, model):
    after = state(model)
    return before[0] == after[0] and before[2] == after[2] and same(before[1], after[1])


# ----------------------------------------------------------------------------- what the experts saw
def experts_inputs(model, found, forward):
    """For each router the sets of experts that worked on each token, read from what its experts
    module was called with: a list of frozensets over tokens, or (where experts get rows sorted
    by expert) a function that says whether given routes explain the call.
    """
    seen, hooks, hidden = {}, [], {}
    modules = dict(model.named_modules())
    for name, r in found.items():

        def keep_input(m, args, kwargs, name=name):
            x = args[0] if args else kwargs["hidden_states"]
            hidden[name] = x.detach().reshape(-1, x.shape[-1])

        hooks.append(r.module.register_forward_pre_hook(keep_input, with_kwargs=True))
        block = name if hasattr(r.module, "experts") else name.rpartition(".")[0]
        own = [
            (n, m)
            for n, m in modules.items()
            if n.startswith(block + ".") and type(m).__name__.endswith("Experts")
        ]
        first = own[0][1]  # the others, if any, are later linear maps of the same experts

        def keep(m, args, kwargs, name=name, r=r):
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            index = next((a for a in tensors if not a.is_floating_point()), None)
            if index is not None:
                seen[name] = [frozenset(row) for row in index.reshape(-1, r.top_k).tolist()]
            elif len(args) == 2 and isinstance(args[1], list):
                seen[name] = [x.detach() for x in args[0].split(args[1])]
            else:  # a copy of all tokens for each expert, scaled by the gate: 0 where not chosen
                used = args[0].detach().reshape(r.experts, B * T, -1).abs().sum(-1) > 0
                seen[name] = [
                    frozenset(used[:, t].nonzero().flatten().tolist()) for t in range(B * T)
                ]

        hooks.append(first.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        forward()
    finally:
        for h in hooks:
            h.remove()
    return seen, hidden


def explains(rows, seen, hidden, router):
    """Do routes [tokens, K] of one layer explain what its experts were called with?"""
    if isinstance(seen[0], frozenset):
        want = [frozenset(r) for r in rows.tolist()]
        if (
            router.experts > 8 and type(router.module).__name__ == "ZayaRouter"
        ):  # the class that skips the layer is sent to expert 0
            want = [frozenset(0 if e == router.experts - 1 else e for e in w) for w in want]
        return want == seen
    for e, x in enumerate(seen):
        want = hidden[(rows == e).any(-1)]
        if want.shape != x.shape or not torch.equal(
            want.flatten().sort().values, x.flatten().sort().values
        ):
            return False
    return True


# --------------------------------------------------------------------------------------- the checks
def prepare(family, **more):
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    return build(FAMILIES[family], **more)


def check_a(family):
    model = prepare(family)
    tokens = batch(model)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        with routing.record(model) as routes:
            again = model(tokens, use_cache=False).logits
        own = routes.pop(B)
        with routing.record(model) as routes:
            model(tokens, use_cache=False)
            third = model(tokens, use_cache=False).logits  # a second forward takes the short way
    return (
        torch.equal(plain, again) and torch.equal(plain, third) and torch.equal(own, routes.pop(B))
    )


def check_b(family):
    model = prepare(family)
    tokens = batch(model)
    with routing.record(model) as routes:
        live = gradients(model, tokens)
    own, valid = routes.pop(B), torch.ones(B, T, dtype=torch.bool)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
    with routing.replay(model, own, valid):
        with torch.no_grad():
            again = model(tokens, use_cache=False).logits
        replayed = gradients(model, tokens)
    return torch.equal(plain, again) and same(live, replayed)


def check_c(family):
    model = prepare(family)
    tokens, found = batch(model), routing.routers(model)
    forced, valid = random_routes(found), torch.arange(B * T).view(B, T) % 4 != 1
    with torch.no_grad(), routing.record(model) as routes:
        model(tokens, use_cache=False)
    own = routes.pop(B)
    with (
        torch.no_grad(),
        routing.replay(model, forced, torch.ones_like(valid)),
        routing.record(model) as routes,
    ):
        seen, hidden = experts_inputs(model, found, lambda: model(tokens, use_cache=False))
    ok = torch.equal(routes.pop(B), forced)
    ok &= all(
        explains(forced[:, :, i].flatten(0, 1), seen[n], hidden[n], r)
        for i, (n, r) in enumerate(found.items())
    )
    ok &= not torch.equal(own, forced)
    with torch.no_grad(), routing.record(model) as routes, routing.replay(model, forced, valid):
        model(tokens, use_cache=False)
    mixed = routes.pop(B)
    ok &= torch.equal(mixed[valid], forced[valid])
    first = min(
        range(len(found)),
        key=lambda i: list(model.state_dict()).index(
            next(k for k in model.state_dict() if k.startswith(list(found)[i] + "."))
        ),
    )  # the first router of the model sees inputs that no forced route has touched yet
    return bool(ok and torch.equal(mixed[~valid][:, first], own[~valid][:, first]))


def check_d(family):
    model = prepare(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    tokens, found = batch(model), routing.routers(model)
    forced, valid = random_routes(found), torch.ones(B, T, dtype=torch.bool)
    parameters = [
        p
        for r in found.values()
        for p in (r.module.router if hasattr(r.module, "router") else r.module).parameters()
        if p.requires_grad
    ]
    g = torch.Generator().manual_seed(4)
    directions = [
        torch.randn(p.shape, generator=g, dtype=torch.float64) / p.numel() ** 0.5
        for p in parameters
    ]
    with Double(), routing.replay(model, forced, valid):
        model.zero_grad(set_to_none=True)
        loss_of(model, tokens).backward()
        slope = sum(
            float((p.grad * d).sum()) for p, d in zip(parameters, directions) if p.grad is not None
        )

        def at(h):
            with torch.no_grad():
                for p, d in zip(parameters, directions):
                    p.add_(d, alpha=h)
                value = float(loss_of(model, tokens))
                for p, d in zip(parameters, directions):
                    p.sub_(d, alpha=h)
            return value

        h = 1e-3  # errors: h^4 = 1e-12 of the fifth derivative, and rounding, 1e-16 |loss| / h
        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    every = all(
        any(p.grad is not None and bool(p.grad.any()) for p in r.module.parameters())
        for r in found.values()
    )
    return (
        every and abs(slope) > 1e-3 and abs(difference - slope) <= 1e-8 * abs(slope),
        slope,
        difference,
    )


class Stop(Exception):
    pass


def check_e(family):
    model = prepare(family)
    tokens, found = batch(model), routing.routers(model)
    forced, valid = random_routes(found), torch.ones(B, T, dtype=torch.bool)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
    before = state(model)
    with torch.no_grad(), routing.record(model), routing.replay(model, forced, valid):
        changed = model(tokens, use_cache=False).logits
    ok = unchanged(before, model) and not torch.equal(changed, plain)

    def stop(*_):
        raise Stop

    hook = list(found.values())[-1].module.register_forward_pre_hook(stop)  # between two routers
    try:
        with torch.no_grad(), routing.record(model), routing.replay(model, forced, valid):
            model(tokens, use_cache=False)
        ok = False
    except Stop:
        pass
    hook.remove()
    ok &= unchanged(before, model)
    try:  # and inside one: the routes are for another number of tokens
        with torch.no_grad(), routing.record(model), routing.replay(model, forced, valid):
            model(tokens[:, :-1], use_cache=False)
        ok = False
    except ValueError:
        pass
    with torch.no_grad():
        return (
            ok
            and unchanged(before, model)
            and torch.equal(model(tokens, use_cache=False).logits, plain)
        )


def check_f(family):
    model = prepare(family)
    if not model.supports_gradient_checkpointing:
        return None
    tokens, found = batch(model), routing.routers(model)
    forced, valid = random_routes(found), torch.arange(B * T).view(B, T) % 4 != 1

    def trained():
        model.train()
        for r in found.values():
            if r.call == "max":
                r.module.eval()  # sparsemixer samples in training mode
        with routing.replay(model, forced, valid):
            return gradients(model, tokens)

    plain = trained()
    model.activation_checkpointing_enable() if hasattr(
        model, "activation_checkpointing_enable"
    ) else model.gradient_checkpointing_enable()
    return same(plain, trained())


@functools.cache
def conformance(family):
    """The row of a family: (router class, L, E, K, {check: passed or None}, remark)."""
    try:
        model = prepare(family)
    except Exception as e:
        return ("", 0, 0, 0, {}, f"not built: {type(e).__name__}: {e}")
    try:
        found = routing.routers(model)
    except TypeError as e:
        return ("", 0, 0, 0, {}, f"refused: {str(e).split(': ', 1)[-1]}")
    r = next(iter(found.values()))
    passed = {}
    for name in CHECKS:
        result = globals()[f"check_{name}"](family)
        passed[name] = result[0] if isinstance(result, tuple) else result
    remarks = []
    if "DeepseekV4HashRouter" in {type(m).__name__ for m in model.modules()}:
        remarks.append("hash-routed layers have no choice to replay")
    if r.call == "max":
        remarks.append(
            "sparsemixer asks for one expert at a time; in training mode its routers must be in "
            "eval mode"
        )
    if r.rank == 3:
        remarks.append("one class more than experts: the token skips the layer")
    if type(r.module).__name__ == "JetMoeTopKGating":
        remarks.append("attention heads are routed too: two routers a layer")
    if passed["f"] is None:
        remarks.append("the family has no activation checkpointing")
    return (type(r.module).__name__, len(found), r.experts, r.top_k, passed, "; ".join(remarks))


def table():
    rows = {f: conformance(f) for f in FAMILIES}
    good = [f for f, row in rows.items() if row[4] and all(v is not False for v in row[4].values())]
    lines = [
        "# Routing replay, family by family",
        "",
        "Measured by `tests/test_routing_families.py` with transformers "
        f"{transformers.__version__} on tiny models with random weights, one for each family that "
        "has a causal language model with routed experts: "
        f"{len(rows)} found, {len(good)} pass, {len(rows) - len(good)} refused or failing. "
        "L: routers of the tiny model; E: experts; K: experts per token.",
        "",
    ]
    lines += [f"- ({name}) {text}" for name, text in CHECKS.items()]
    lines += [
        "",
        "| family | router | L | E | K | " + " | ".join(CHECKS) + " | remark |",
        "|" + "---|" * (6 + len(CHECKS)),
    ]
    mark = {True: "yes", False: "NO", None: "-"}
    for f, (router, L, E, K, passed, remark) in rows.items():
        cells = [
            f,
            router or "-",
            *(str(n) if n else "-" for n in (L, E, K)),
            *(mark[passed.get(c)] for c in CHECKS),
            remark,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    row = conformance(family)
    if row[5].startswith("refused"):  # never a silent no-op
        with pytest.raises(TypeError, match="cannot be replayed: .{20}"):
            routing.record(prepare(family))
        return
    assert row[4], row[5]
    failed = [CHECKS[c] for c, ok in row[4].items() if ok is False]
    assert not failed, f"{family}: not so: {'; '.join(failed)}"


def test_enough_families():
    assert sum(bool(conformance(f)[4]) for f in FAMILIES) >= 30


def test_why_doge_is_refused():
    """A later token changes what is predicted from the first one:

    there is no choice of experts that belongs to a prefix.
    """
    model, tokens = (
        prepare("doge"),
        torch.randint(3, 64, (1, T), generator=torch.Generator().manual_seed(0)),
    )
    other = tokens.clone()
    other[0, T // 2] = (other[0, T // 2] - 3 + 1) % 61 + 3
    with torch.no_grad():
        a, b = (model(x, use_cache=False).logits[0, 0] for x in (tokens, other))
    assert not torch.equal(a, b)


def test_table_is_current():
    if TABLE.exists() and f"transformers {transformers.__version__} " not in TABLE.read_text(
        encoding="utf-8"
    ):
        pytest.skip(
            f"the table was measured with another transformers than {transformers.__version__}"
        )
    assert TABLE.exists() and TABLE.read_text(encoding="utf-8") == table(), (
        "run `python tests/test_routing_families.py` and read the diff"
    )


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
