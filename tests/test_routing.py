"""Record and replay under checkpointing, autocast, compilation, sharding, nesting and faults."""

import copy
import gc
import weakref

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from bench.bench_routing import Peak
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_families import build
from small_runs import free_port
from torch.overrides import _get_current_function_mode_stack

from minirl_nb import routing
from minirl_nb.routing import compare, record, replay, routers

B, T, L, K, E = 2, 9, 3, 3, 8
QWEN = transformers.Qwen3MoeForCausalLM
VALID = torch.ones(B, T, dtype=torch.bool)


def qwen(**more):
    return build(QWEN, use_cache=False, **more)


def tokens(seed=0, shape=(B, T)):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def drawn(seed=1, shape=(B, T), layers=L, k=K, experts=E, dtype=torch.uint8):
    n = shape[0] * shape[1] * layers
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, experts, generator=g).argsort(-1)[:, :k].view(*shape, layers, k).to(dtype)


def gradients(model, x=None, **inputs):
    model.zero_grad(set_to_none=True)
    logits = model(tokens() if x is None else x, **inputs).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------- the routers of a model


# ------------------------------------------------------------------------------------------- record
def test_record_needs_a_forward_before_each_pop():
    model = qwen()
    with record(model) as routes:
        with pytest.raises(
            RuntimeError, match="nothing was recorded at 3 of 3 routers .*model.layers.0.mlp.gate"
        ):
            routes.pop()
        with torch.no_grad():
            model(tokens())
        assert routes.pop().shape == (B * T, L, K)
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            routes.pop()


def test_record_while_decoding_gives_the_routes_of_the_whole():
    """In float64, where the cached and the full forward differ by too little to flip a choice."""
    model, x = build(QWEN, dtype=torch.float64), tokens()
    model.set_experts_implementation("eager")
    with torch.no_grad(), record(model) as routes:
        model(x, use_cache=False)
        whole = routes.pop(B)
        out = model(x[:, :4], use_cache=True)
        parts = [routes.pop(B)]
        for t in range(4, T):
            out = model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(routes.pop(B))
    assert torch.equal(torch.cat(parts, 1), whole)


def test_wide_routes_are_uint16():
    model = qwen(num_experts=300, moe_intermediate_size=4, num_hidden_layers=1)
    with torch.no_grad(), record(model) as routes:
        plain = model(tokens()).logits
    own = routes.pop(B)
    assert own.dtype == torch.uint16 and int(own.int().max()) > 255
    with torch.no_grad(), replay(model, own, VALID):
        assert torch.equal(model(tokens()).logits, plain)
    with pytest.raises(
        ValueError, match="routes are torch.uint8, but model.layers.0.mlp.gate has 300 experts"
    ):
        replay(model, drawn(layers=1), VALID)


def test_recomputation_is_not_recorded():
    model = qwen().train()
    model.activation_checkpointing_enable()
    with record(model) as routes:
        loss = model(tokens()).logits.sum()
        own = routes.pop(B)
        loss.backward()
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            routes.pop()
    assert own.shape == (B, T, L, K)


# ------------------------------------------------------------------------------------------- faults
def spoiled(kind, routes, valid, layer, b, t):
    """(routes, valid, what the message must say)"""
    name = f"model.layers.{layer}.mlp.gate"
    row = routes[b, t, layer]
    if kind == "dtype":
        return routes.long(), valid, "routes are torch.int64"
    if kind == "rank":
        return routes.flatten(0, 1), valid, "must be .B, T, L, K."
    if kind == "layers":
        return routes[:, :, :-1], valid, "L = 3 routers"
    if kind == "k":
        return routes[..., :-1], valid, "K = 3 experts per token"
    if kind == "valid shape":
        return routes, valid[:, :-1], r"valid is torch.bool \[2, 8\]"
    if kind == "valid dtype":
        return routes, valid.long(), "valid is torch.int64"
    if kind == "range":
        row[1] = E
        return (
            routes,
            valid,
            rf"{name} \(layer {layer}\): routes\[{b}, {t}\] = .*, {E}, .*outside 0..7",
        )
    if kind == "twice":
        row[1] = row[2]
        return routes, valid, rf"{name} \(layer {layer}\): routes\[{b}, {t}\] = .* one expert twice"
    if kind == "zero":
        routes[:, :, layer] = 0
        return routes, valid, rf"{name} \(layer {layer}\): all 18 valid rows are zero"
    raise AssertionError(kind)


MODEL = qwen()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["dtype", "rank", "layers", "k", "valid shape", "valid dtype", "range", "twice", "zero"]
    ),
    st.integers(0, L - 1),
    st.integers(0, B - 1),
    st.integers(0, T - 1),
    st.integers(0, 1000),
)
def test_wrong_routes_are_refused_by_layer_and_value(kind, layer, b, t, seed):
    routes, valid, message = spoiled(kind, drawn(seed), VALID.clone(), layer, b, t)
    with pytest.raises(ValueError, match=message):
        replay(MODEL, routes, valid)
    assert "forward" not in MODEL.model.layers[0].mlp.gate.__dict__


@settings(max_examples=30, deadline=None)
@given(st.integers(0, L - 1), st.integers(0, B - 1), st.integers(0, T - 1), st.integers(0, 255))
def test_what_stands_in_a_row_that_is_not_valid_is_never_looked_at(layer, b, t, rubbish):
    routes, valid = drawn(), VALID.clone()
    routes[b, t], valid[b, t] = rubbish, False
    with torch.no_grad(), replay(MODEL, routes, valid), record(MODEL) as used:
        a = MODEL(tokens()).logits
    other = routes.clone()
    other[b, t] = (rubbish + 1) % 256
    with torch.no_grad(), replay(MODEL, other, valid):
        assert torch.equal(MODEL(tokens()).logits, a)
    assert torch.equal(used.pop(B)[valid], routes[valid])


def test_one_expert_a_token_may_be_expert_zero():
    model = qwen(num_experts_per_tok=1)
    zeros = torch.zeros(B, T, L, 1, dtype=torch.uint8)
    with torch.no_grad(), replay(model, zeros, VALID):
        model(tokens())  # 18 tokens: it can happen
    with pytest.raises(ValueError, match="all 48 valid rows are zero"):
        replay(
            model, torch.zeros(1, 48, L, 1, dtype=torch.uint8), torch.ones(1, 48, dtype=torch.bool)
        )


def test_nan_scores_name_the_layer():
    model = qwen()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2, 0] = float("nan")
    with pytest.raises(
        ValueError,
        match="model.layers.1.mlp.gate: the scores of 2 of 3 routers, this one first, hold NaN",
    ):
        with torch.no_grad(), replay(model, drawn(), VALID):
            model(tokens())
    with torch.no_grad(), replay(model, drawn(), torch.zeros_like(VALID)):
        model(tokens())  # nothing is replayed, nothing is said


def test_another_number_of_tokens_is_refused_and_leaves_no_mode_behind():
    model = qwen()
    with pytest.raises(
        ValueError,
        match=r"layers.0.mlp.gate: this forward has 16 tokens, routes \[2, 9, 3, 3\] are for 2 x",
    ):
        with torch.no_grad(), replay(model, drawn(), VALID):
            model(tokens()[:, 1:])
    assert (
        not _get_current_function_mode_stack()
        and "forward" not in model.model.layers[0].mlp.gate.__dict__
    )


def test_a_replay_that_reaches_no_router_is_an_error():
    model = qwen()
    with pytest.raises(RuntimeError, match="replay reached 0 of 3 routers"):
        with replay(model, drawn(), VALID):
            pass
    with pytest.raises(
        RuntimeError, match="replay reached 1 of 3 routers, not model.layers.1.mlp.gate"
    ):
        with torch.no_grad(), replay(model, drawn(), VALID):
            model.model.layers[0].mlp(torch.randn(B, T, 32))


def test_a_router_that_asks_differently_is_an_error():
    model = qwen()
    gate = model.model.layers[1].mlp.gate
    gate.top_k = 2  # the layer now asks for two experts, its neighbours for three
    with pytest.raises(TypeError, match=r"different numbers of experts per token \[2, 3\]"):
        record(model)
    gate.top_k, ask = K, gate.forward
    gate.forward = lambda x: (
        ask(x)[:2] + (torch.sort(ask(x)[0], descending=True).indices[:, :K],)
    )  # asks twice
    with pytest.raises(
        RuntimeError,
        match="1.mlp.gate: 6 experts per token were chosen out of 8 in one forward instead of 3",
    ):
        with record(model), torch.no_grad():
            model(tokens())
    assert (
        gate.forward is not ask and "forward" in gate.__dict__
    )  # somebody else's wrapper is still there


# ------------------------------------------------------------------------------------------ nesting
def test_record_sees_what_was_used_whichever_way_they_nest():
    model, forced = qwen(), drawn()
    with (
        torch.no_grad(),
        record(model) as outer,
        replay(model, forced, VALID),
        record(model) as inner,
    ):
        model(tokens())
    assert torch.equal(outer.pop(B), forced) and torch.equal(inner.pop(B), forced)


def test_the_inner_replay_wins_and_the_outer_comes_back():
    model, a, b = qwen(), drawn(1), drawn(2)
    with torch.no_grad(), record(model) as routes, replay(model, a, VALID):
        model(tokens())
        assert torch.equal(routes.pop(B), a)
        with replay(model, b, VALID):
            model(tokens())
        assert torch.equal(routes.pop(B), b)
        model(tokens())
        assert torch.equal(routes.pop(B), a)


def test_contexts_may_be_left_in_any_order_and_entered_again():
    model, first, second = qwen(), None, None
    first, second = record(model), record(model)
    first.__enter__(), second.__enter__()
    with pytest.raises(RuntimeError, match="already entered"):
        first.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(tokens())
    second.pop()
    second.__exit__(None, None, None)
    assert "forward" not in model.model.layers[0].mlp.gate.__dict__
    with first, torch.no_grad():
        model(tokens())
    assert first.pop(B).shape == (B, T, L, K)


def test_two_models_do_not_see_each_other():
    a, b = qwen(), qwen(seed=1)
    with torch.no_grad():
        plain = b(tokens()).logits
        with replay(a, drawn(), VALID), record(b) as of_b, record(a) as of_a:
            a(tokens())
            assert torch.equal(b(tokens()).logits, plain)
    assert torch.equal(of_a.pop(B), drawn()) and not torch.equal(of_b.pop(B), drawn())


def test_a_copy_made_inside_does_not_replay():
    model = qwen()
    with torch.no_grad():
        plain = model(tokens()).logits
        with replay(model, drawn(), VALID):
            model(tokens())
            twin = copy.deepcopy(model)
            assert torch.equal(twin(tokens()).logits, plain)
            assert not torch.equal(model(tokens()).logits, plain)
        assert torch.equal(twin(tokens()).logits, plain)
        with replay(twin, drawn(), VALID):
            assert not torch.equal(twin(tokens()).logits, plain)
        assert (
            torch.equal(twin(tokens()).logits, plain)
            and "forward" not in twin.model.layers[0].mlp.gate.__dict__
        )


def test_somebody_elses_forward_is_put_back():
    model = qwen()
    gate = model.model.layers[0].mlp.gate
    calls, own = [], gate.forward

    def wrapper(x):
        calls.append(1)
        return own(x)

    gate.forward = wrapper
    with torch.no_grad(), replay(model, drawn(), VALID):
        model(tokens())
    assert calls == [1] and gate.__dict__["forward"] is wrapper


def test_a_model_is_freed_after_use():
    model = qwen()
    with torch.no_grad(), record(model) as routes, replay(model, drawn(), VALID):
        model(tokens())
    alive = weakref.ref(model.model.layers[0].mlp.gate)
    del model, routes
    gc.collect()
    assert alive() is None


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_has_the_same_gradients(reentrant):
    model, valid = qwen().train(), torch.arange(B * T).view(B, T) % 3 > 0
    with replay(model, drawn(), valid):
        plain = gradients(model)
    model.activation_checkpointing_enable(dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    with replay(model, drawn(), valid):
        assert same(plain, gradients(model))
    with torch.no_grad(), replay(model, drawn(), valid):
        model(tokens())  # no backward will come: no complaint


@pytest.mark.parametrize("reentrant", [False, True])
def test_leaving_before_a_checkpointed_backward_is_an_error(reentrant):
    model = qwen().train()
    model.activation_checkpointing_enable(dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    error = RuntimeError if reentrant else torch.utils.checkpoint.CheckpointError
    with pytest.raises(
        error, match="inside the `with`" if reentrant else "number of tensors|metadata"
    ):
        with replay(model, drawn(), VALID):
            loss = model(tokens()).logits.sum()
        loss.backward()


def test_replay_repairs_a_choice_that_flips_when_recomputed():
    """The reason to replay even on policy:

    what a checkpoint recomputes may choose other experts (here: the weights moved).
    """
    model = qwen().train()
    model.activation_checkpointing_enable(dict(use_reentrant=True))
    model.enable_input_require_grads()
    chosen = []

    def watch(m, args, out):
        chosen.append(out[2].clone())

    def go(routes=None):
        chosen.clear()
        hook = model.model.layers[1].mlp.gate.register_forward_hook(watch)
        loss = model(tokens()).logits.sum()
        keep = model.model.layers[1].mlp.gate.weight.data.clone()
        model.model.layers[1].mlp.gate.weight.data.add_(
            torch.randn(E, 32, generator=torch.Generator().manual_seed(5)), alpha=0.1
        )
        loss.backward()
        model.model.layers[1].mlp.gate.weight.data.copy_(keep)
        hook.remove()
        return len(chosen) == 2 and torch.equal(chosen[0], chosen[1])

    assert not go()
    with record(model) as routes:
        model(tokens())
    with replay(model, routes.pop(B), VALID):
        assert go()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("lower", ["float32", "bfloat16", "autocast"])
def test_experts_implementations_and_lower_precision(implementation, lower):
    model = qwen(dtype=torch.bfloat16 if lower == "bfloat16" else torch.float32)
    model.set_experts_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16, enabled=lower == "autocast"):
        with torch.no_grad(), record(model) as routes:
            plain = model(tokens()).logits
        own = routes.pop(B)
        with torch.no_grad(), replay(model, own, VALID):
            assert torch.equal(model(tokens()).logits, plain)
        live = gradients(model)
        with replay(model, own, VALID):
            assert same(live, gradients(model))
        with replay(model, drawn(), VALID), record(model) as used:
            other = gradients(model)
    assert torch.equal(used.pop(B), drawn()) and not same(live, other)
    assert all(bool(other[f"model.layers.{i}.mlp.gate.weight"].any()) for i in range(L))


def test_memory_is_the_packed_routes_and_one_layers_rows():
    model, shape = qwen(num_experts=64, num_experts_per_tok=8), (4, 256)
    x, forced, valid = (
        tokens(shape=shape),
        drawn(shape=shape, k=8, experts=64),
        torch.ones(shape, dtype=torch.bool),
    )
    valid[:, -1] = False

    def peak(replayed):
        model.zero_grad(set_to_none=True)
        with Peak() as p:
            if not replayed:
                model(x, labels=x).loss.backward()
            else:
                with replay(model, forced, valid):
                    model(x, labels=x).loss.backward()
        return p.peak

    peak(False)
    extra = peak(True) - peak(False)
    assert extra <= forced.numel() + valid.numel() * 8 * 8  # packed routes, and [tokens, K] int64


def test_micro_batches_add_up_to_the_batch():
    model, forced, x = qwen(dtype=torch.float64), drawn(), tokens()
    model.set_experts_implementation("eager")

    def loss_of(x):
        return model(x).logits.double().square().sum()

    with replay(model, forced, VALID):
        loss_of(x).backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for b in range(B):
        with replay(model, forced[b : b + 1], VALID[b : b + 1]):
            loss_of(x[b : b + 1]).backward()
    for n, p in model.named_parameters():  # float32 norms inside: sums in another order
        torch.testing.assert_close(
            p.grad, whole[n], rtol=1e-4, atol=1e-5 * float(whole[n].abs().max())
        )


def test_padding_and_packing_change_no_route():
    """The same responses padded right, padded left and packed into one row:

    the same choices, and replay puts them in place.
    """
    model, lengths = build(QWEN, dtype=torch.float64, use_cache=False), (T, 5)
    model.set_experts_implementation("eager")
    x, right = tokens(), torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    left = right.flip(1)
    x_left = torch.zeros_like(x)
    for b, n in enumerate(lengths):
        x_left[b, T - n :] = x[b, :n]
    packed = torch.cat([x[b, :n] for b, n in enumerate(lengths)])[None]
    place = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = {
        "right": (x, dict(attention_mask=right.long()), right),
        "left": (
            x_left,
            dict(attention_mask=left.long(), position_ids=(left.long().cumsum(1) - 1).clamp(min=0)),
            left,
        ),
        "packed": (packed, dict(position_ids=place), torch.ones(1, sum(lengths), dtype=torch.bool)),
    }
    with torch.no_grad():
        live, forced = {}, {}
        rows = drawn(shape=(1, sum(lengths)))[0]
        for name, (tok, more, valid) in inputs.items():
            with record(model) as routes:
                model(tok, **more)
            live[name] = routes.pop(len(tok))[valid]
            assert torch.equal(live[name], live["right"])
            full = torch.zeros(*tok.shape, L, K, dtype=torch.uint8)
            full[valid] = rows
            with replay(model, full, valid):
                forced[name] = model(tok, **more).logits[valid]
            torch.testing.assert_close(forced[name], forced["right"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        forced["right"], model(x, attention_mask=right.long()).logits[right], rtol=1e-2
    )


def test_gate_values_of_forced_experts_come_from_before_the_group_mask():
    """DeepSeek-V2 sets the scores of experts outside its best groups to zero; a forced one must
    still have its own score.
    """
    model = build(transformers.DeepseekV2ForCausalLM, use_cache=False)
    gate = model.model.layers[1].mlp.gate
    forced = drawn(layers=2)
    seen = {}
    hook = gate.register_forward_hook(
        lambda m, args, out: seen.update(x=args[0], weights=out[1], index=out[2])
    )
    with torch.no_grad(), replay(model, forced, VALID):
        model(tokens())
    hook.remove()
    scores = (seen["x"].reshape(-1, 32).float() @ gate.weight.T).softmax(
        -1
    ) * gate.routed_scaling_factor
    torch.testing.assert_close(seen["weights"], scores.gather(1, seen["index"]))
    assert torch.equal(seen["index"], forced[:, :, 0].flatten(0, 1).long()) and bool(
        (seen["weights"] > 0).all()
    )


def test_sparsemixer_is_refused_in_training_mode_only():
    model = build(transformers.PhimoeForCausalLM, use_cache=False).train()
    with pytest.raises(
        RuntimeError,
        match="layers.0.mlp.router is a PhimoeTopKRouter, which samples its experts in training",
    ):
        with record(model):
            model(tokens())
    for r in routers(model).values():
        r.module.eval()
    with record(model) as routes:
        model(tokens())
    assert routes.pop(B).shape == (B, T, 3, 2)


def test_compiled_models_break_at_the_routers_and_are_not_compiled_again():
    torch._dynamo.reset()
    model, forced = qwen(), drawn()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(tokens()).logits
        torch.testing.assert_close(compiled(tokens()).logits, plain)
        with replay(model, forced, VALID):
            want = model(tokens()).logits
        with replay(model, forced, VALID), record(model) as used:
            torch.testing.assert_close(compiled(tokens()).logits, want)
        assert torch.equal(used.pop(B), forced)
        with torch.compiler.set_stance("fail_on_recompile"):
            with replay(model, drawn(3), VALID), record(model) as used:
                compiled(tokens())
            assert torch.equal(used.pop(B), drawn(3))
        torch.testing.assert_close(compiled(tokens()).logits, plain)
    torch._dynamo.reset()


def test_a_whole_graph_is_refused_with_the_reason():
    torch._dynamo.reset()
    model = qwen()
    model.set_experts_implementation("batched_mm")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="this router is being recorded or replayed"
    ):
        with torch.no_grad(), record(model):
            compiled(tokens())
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------ two processes
def _sharded(rank, port, path):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = qwen().train()
    model.activation_checkpointing_enable(dict(use_reentrant=False))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    mine, losses = slice(rank, rank + 1), []
    for step in range(3):
        x, forced = tokens(step), drawn(step)
        with replay(model, forced[mine], VALID[mine]), record(model) as used:
            loss = model(x[mine]).logits.square().mean()
            loss.backward()
        assert torch.equal(used.pop(1), forced[mine])
        optimiser.step()
        optimiser.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / 2)
    if rank == 0:
        torch.save(losses, path)
    torch.distributed.destroy_process_group()


def test_fsdp2_on_two_processes_trains_as_one_does(tmp_path):
    mp.spawn(_sharded, (free_port(), tmp_path / "losses.pt"), nprocs=2)
    model = qwen().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    alone = []
    for step in range(3):
        with replay(model, drawn(step), VALID):
            loss = model(tokens(step)).logits.square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        alone.append(float(loss.detach()))
    torch.testing.assert_close(
        torch.load(tmp_path / "losses.pt"), alone, rtol=1e-5, atol=0
    )  # float32, other order of sums
    assert len(set(alone)) == 3


# --------------------------------------------------------------------------------- compare, resolve
def test_compare_on_numbers_made_by_hand():
    a = torch.tensor(
        [[[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]]]], dtype=torch.uint8
    )  # [1, 3, 2, 2]
    b = torch.tensor([[[[1, 0], [2, 4]], [[4, 5], [2, 3]], [[7, 7], [7, 7]]]], dtype=torch.uint8)
    flips = compare(a, b, torch.tensor([[True, True, False]]))
    assert flips.per_layer.tolist() == [0.5, 0.5]
    assert flips.per_token.tolist() == [[1, 1, 0]]
    assert flips.jaccard.tolist() == [0.5, (1 / 3 + 1) / 2]  # (1 + 0) / 2 and (1/3 + 1) / 2
    assert flips.stats() == {
        "flip": 0.5,
        "flip_any": 1.0,
        "flip_max": 0.5,
        "jaccard": pytest.approx((0.5 + 2 / 3) / 2),
    }
    with pytest.raises(ValueError, match="one shape"):
        compare(a, b[:, :2], torch.ones(1, 3, dtype=torch.bool))
    assert compare(a, b, torch.zeros(1, 3, dtype=torch.bool)).stats() == {
        "flip": 0,
        "flip_any": 0,
        "flip_max": 0,
        "jaccard": 0,
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.uint8, torch.uint16]))
def test_compare_against_python_sets(seed, dtype):
    a, b = drawn(seed, dtype=dtype), drawn(seed + 1, dtype=dtype)
    valid = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.7
    flips = compare(a, b, valid)
    sets = [
        [
            (set(a[i, t, l].tolist()), set(b[i, t, l].tolist()))
            for i in range(B)
            for t in range(T)
            if valid[i, t]
        ]
        for l in range(L)
    ]
    n = max(len(sets[0]), 1)
    assert flips.per_layer.tolist() == pytest.approx([sum(p != q for p, q in s) / n for s in sets])
    assert flips.jaccard.tolist() == pytest.approx(
        [sum(len(p & q) / len(p | q) for p, q in s) / n for s in sets]
    )
    assert int(flips.per_token.sum()) == sum(p != q for s in sets for p, q in s)
    assert compare(a, a[..., [2, 0, 1]], valid).stats()["flip"] == 0  # order does not matter


def test_auto_follows_the_paper():
    "Fig. 1 (N = 1): replay brings nothing. Figs. 2 to 4 (N = 2, 4, 8): R2, then R3."
    assert [routing.resolve("auto", n) for n in (1, 2, 4, 8)] == ["none", "R2", "R3", "R3"]
    assert routing.resolve("R3", 1) == "R3" and routing.resolve("none", 8) == "none"
    with pytest.raises(ValueError, match="'r2' must be one of none, R2, R3, auto"):
        routing.resolve("r2", 2)
