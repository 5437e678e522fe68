"""Watching generation, bugs that others had, and transformers' own recipe for replay."""

import copy
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import transformers
from small_models import FAMILIES, SMALL
from transformers.monkey_patching import (
    apply_patches,
    register_patch_mapping,
    unregister_patch_mapping,
)

from minirl_nb import routing
from minirl_nb.batch import Ragged, Rollout
from minirl_nb.integrations.generation import Sampled, place_routes, watch_generation
from minirl_nb.policy import token_logprobs
from minirl_nb.routing import compare, read_routes, record, replay
from minirl_nb.vllm.requests import EngineError, RouterPlaces

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22]]
B, T, K = 3, 9, 2


def model_of(family="qwen3_moe", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = SMALL | FAMILIES[family] | dict(use_cache=True, eos_token_id=1, bos_token_id=None)
    config = transformers.AutoConfig.for_model(family, **sizes | changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(seed=0):
    return torch.randint(3, 48, (B, T), generator=torch.Generator().manual_seed(seed))


def generated(model, temperature=1.0, **more):
    P = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (P - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in PROMPTS])
    with watch_generation(model, temperature) as seen, torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            max_new_tokens=8,
            **more,
        )
    rows = [row[P:].tolist() for row in out]
    return seen, [c[: c.index(1) + 1] if 1 in c else c for c in rows]


@pytest.mark.any_kernels("imports")
def test_only_the_extra_pulls_in_trl_and_nothing_imports_it():
    required = metadata.requires("minirl_nb")
    names = {r: re.match(r"[\w-]+", r)[0] for r in required}
    assert [r for r in required if names[r] == "trl" and "extra" not in r] == []
    assert {names[r] for r in required if 'extra == "trl"' in r.replace("'", '"')} == {"trl"}
    code = """
import sys

sys.modules["trl"] = sys.modules["vllm"] = None
import minirl_nb.train
from minirl_nb.integrations import trl, trl_checks, trl_vllm, verl
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# ------------------------------------------------------------------------- watching generation
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_what_was_watched_is_what_one_forward_says(family):
    model = model_of(family, initializer_range=0.2)
    torch.manual_seed(5)
    seen, completions = generated(model, temperature=0.7)
    sampled = seen.sampled(completions)
    for b, (prompt, completion) in enumerate(zip(PROMPTS, completions)):
        row = torch.tensor([prompt + completion])
        mask = torch.arange(row.shape[1])[None] >= len(prompt)
        with torch.no_grad(), record(model) as live:
            logp, _ = token_logprobs(model, row, mask, temperature=0.7)
            routes = live.pop(1)[0]
        assert torch.allclose(torch.tensor(sampled.logp[b]), logp[0, len(prompt) :], atol=1e-5)
        assert torch.equal(sampled.routes[b], routes[:-1])
    assert len({len(c) for c in completions}) > 1 or len(completions[0]) == 8


def test_other_completions_than_the_watched_are_refused():
    "A chat template that renders a turn anew may change its tokens: routes would belong to others."
    torch.manual_seed(5)
    seen, completions = generated(model_of(initializer_range=0.2))
    drifted = [list(c) for c in completions]
    drifted[0][1] = (drifted[0][1] + 1) % 48
    with pytest.raises(RuntimeError, match="not the completions that were watched"):
        seen.sampled(drifted)
    last = [list(c) for c in completions]
    last[1] = [*last[1][:3], (last[1][3] + 1) % 48]  # a last token that the model was fed
    with pytest.raises(RuntimeError, match="completion 1 has token .* at 3"):
        seen.sampled(last)
    with pytest.raises(RuntimeError, match="3 prompts and"):
        seen.sampled(completions[:2])
    longer = [[*c, 3, 3, 3, 3, 3, 3, 3, 3] for c in completions]
    with pytest.raises(RuntimeError, match="steps were watched"):
        seen.sampled(longer)


def test_generation_without_a_cache_is_refused():
    with pytest.raises(RuntimeError, match="one token at a time, with a cache"):
        generated(model_of(), use_cache=False)


def test_routes_that_do_not_fit_are_refused():
    values = torch.zeros(7, 2, K, dtype=torch.uint8)
    length = torch.tensor([4, 3])
    sampled = Sampled(
        torch.tensor([3, 1]),
        None,
        Ragged(values, length),
        Ragged(torch.ones(7, dtype=torch.bool), length),
    )
    dense, valid = place_routes(sampled, 4, 8)
    assert valid.int().tolist() == [[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
    assert dense.shape == (2, 8, 2, K)
    with pytest.raises(ValueError, match="row 0 has a prompt of 3 tokens and 4 routes"):
        place_routes(sampled, 2, 8)


# ------------------------------------------------------------------------------- others' bugs
def given(model, seed=0):
    "Routes of another model, as an engine would give them: [n, L, K] for each row."
    other, found = model_of(seed=7), []
    for row in tokens(seed):
        with torch.no_grad(), record(other) as live:
            other(row[None])
            found.append(live.pop(1)[0, :-1].long())
    return found


def test_routes_of_a_multi_token_prediction_layer_are_no_routes_of_the_backbone():
    "NeMo-RL #3903: its layer came first or last among the engine's, and shifted all others."
    model = model_of()
    experts = [r.experts for r in routing.routers(model).values()]
    one = given(model)[0]
    with pytest.raises(ValueError, match=r"must be \[8 or 9, L, K\] with L = 2 routers"):
        read_routes(torch.cat([one, one[:, :1]], 1), T, experts)


def test_a_multi_token_prediction_layer_behind_the_backbone_moves_nothing():
    "An engine that numbers all layers: dense layer 1 and the prediction layer 3 are left out."
    model = model_of(num_hidden_layers=3, mlp_only_layers=[1])
    places = RouterPlaces.from_model(model)
    with torch.no_grad(), record(model) as live:
        model(tokens())
        routes = live.pop(B)
    numbered = torch.zeros(B, T - 1, 4, K, dtype=torch.uint8)
    numbered[:, :, [0, 2]] = routes[:, :-1]
    numbered[:, :, 3] = torch.tensor([3, 2], dtype=torch.uint8)
    for b in range(B):
        taken, valid = places.take(b, numbered[b].numpy(), T)
        assert torch.equal(taken[:-1], routes[b, :-1]) and valid.sum() == T - 1
    with pytest.raises(EngineError, match="more than 2 layers"):
        places.take(0, numbered[0, :, :2].numpy(), T)


def test_dense_layers_take_no_slot():
    "Engines may number all layers; a dense one between two of experts has no routes."
    model = model_of(num_hidden_layers=3, mlp_only_layers=[1])
    names = list(routing.routers(model))
    assert [name.split(".")[2] for name in names] == ["0", "2"]
    with torch.no_grad(), record(model) as live:
        model(tokens())
        assert live.pop(B).shape == (B, T, 2, K)
    with pytest.raises(ValueError, match="L = 2 routers"):
        read_routes(torch.zeros(T, 3, K, dtype=torch.long), T, [4, 4])


def test_rows_without_routes_stay_live_among_rows_with():
    "NeMo-RL marks them with -1; taken as experts, they are an index from behind."
    model, x = model_of(), tokens()
    experts = [r.experts for r in routing.routers(model).values()]
    rows = given(model)
    rows[1][2:5] = -1
    rows[2][:] = -1
    routes, valid = (torch.stack(x) for x in zip(*(read_routes(r, T, experts) for r in rows)))
    assert valid.sum(1).tolist() == [8, 5, 0]
    with torch.no_grad():
        live = model(x).logits
        with replay(model, routes, valid), record(model) as used:
            replayed = model(x).logits
            used = used.pop(B)
    assert torch.equal(used[valid], routes[valid])
    assert torch.allclose(replayed[2], live[2], atol=1e-6) and not torch.allclose(
        replayed[0], live[0], atol=1e-4
    )


def test_an_alignment_that_is_off_by_one_or_by_a_row_shows():
    "SkyRL #1908: metadata sorted or padded in another way than the tokens."
    model, x = model_of(initializer_range=0.2), tokens()
    with torch.no_grad(), record(model) as live:
        model(x)
        routes = live.pop(B)
    valid = torch.ones(B, T, dtype=torch.bool)
    order = torch.tensor([2, 0, 1])

    def flips(given, tokens):
        with torch.no_grad(), record(model) as live:
            model(tokens)
            return compare(given, live.pop(B), valid).stats()["flip"]

    r = Rollout(
        tokens=x,
        prompt_length=torch.full((B,), 3),
        length=torch.full((B,), T),
        logp_mu=torch.zeros(B, T),
        group=torch.arange(B),
        routes=routes,
        routes_valid=valid,
    )
    together = r.select(order)
    assert flips(together.routes, together.tokens) == 0
    assert flips(routes, x[order]) > 0.3
    assert flips(routes.roll(1, 1), x) > 0.3


@pytest.mark.parametrize("fault", ["zeros", "one row for all", "an expert too many"])
def test_wrong_routes_do_not_run(fault):
    "NeMo-RL #3327: a path that replayed what nobody had recorded."
    model = model_of()
    long = torch.randint(3, 48, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record(model) as live:
        model(long)
        routes = live.pop(2)
    valid = torch.arange(90).expand(2, 90) < 89
    if fault == "zeros":
        routes[:] = 0
    elif fault == "one row for all":
        routes[:] = torch.tensor([0, 1], dtype=torch.uint8)
    else:
        routes[0, 5, 0, 0] = 4
    r = Rollout(
        tokens=long,
        prompt_length=torch.full((2,), 3),
        length=torch.full((2,), 90),
        logp_mu=torch.zeros(2, 90),
        group=torch.arange(2),
        routes=routes,
        routes_valid=valid,
    )
    with pytest.raises(ValueError):
        routing.check(model, r)


def test_replayed_gates_are_live_values_with_their_gradient():
    "Gathered after the scores of other experts were zeroed, a replayed gate is 0 and learns nothing."
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    top, chosen = scores.topk(2)
    zeroed = torch.zeros_like(scores).scatter(1, chosen, top)
    recorded = torch.tensor([[0, 1]])
    assert zeroed.gather(1, recorded).sum() == 0  # the bug

    model, x = model_of(), tokens()
    routes = torch.stack([torch.cat([r, r[-1:]]) for r in given(model)]).to(torch.uint8)
    valid = torch.ones(B, T, dtype=torch.bool)
    router = next(iter(routing.routers(model).values())).module
    with replay(model, routes, valid):
        loss = model(x).logits.double().logsumexp(-1).sum()
        loss.backward()
    gradient, step = router.weight.grad.clone(), 1e-2
    direction = gradient / gradient.norm()

    def at(h):
        with torch.no_grad():
            router.weight += h * direction
            with replay(model, routes, valid):
                value = float(model(x).logits.double().logsumexp(-1).sum())
            router.weight -= h * direction
        return value

    assert gradient.norm() > 0
    # float32: differences of values near 100 carry about 1e-5 / step
    numeric = (at(step) - at(-step)) / (2 * step)
    assert numeric == pytest.approx(float(gradient.norm()), rel=0.05)


# --------------------------------------------------------------------- transformers' own recipe
STATE = {"replayed": None, "recorded": []}


def recipe(router):
    "A subclass as its monkey-patching page writes one: it records, or replays what it is given."

    class Recorded(router):
        def forward(self, hidden_states):
            logits, scores, chosen = super().forward(hidden_states)
            if STATE["replayed"] is None:
                STATE["recorded"].append(chosen)
                return logits, scores, chosen
            chosen = STATE["replayed"].pop(0)
            scores = logits.float().softmax(-1).gather(1, chosen)
            if getattr(self, "norm_topk_prob", True):
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores.to(logits.dtype), chosen

    return Recorded


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_transformers_recipe_and_ours_give_the_same_answers(family):
    model = model_of(family, initializer_range=0.2)
    class_ = type(next(iter(routing.routers(model).values())).module)
    # the recipe rewrites what the family's classes say about their routers, for all models to come
    said = {
        type(m): copy.deepcopy(m._can_record_outputs)
        for m in model.modules()
        if getattr(m, "_can_record_outputs", None)
    }
    register_patch_mapping({class_.__name__: recipe(class_)})
    try:
        with apply_patches():
            patched = model_of(family, initializer_range=0.2)
    finally:
        unregister_patch_mapping([class_.__name__])
        for cls, outputs in said.items():
            cls._can_record_outputs = outputs
    patched.load_state_dict(model.state_dict())
    x, other = tokens(), model_of(family, seed=7, initializer_range=0.2)
    with torch.no_grad(), record(other) as live:
        other(x)
        routes = live.pop(B)
    STATE["recorded"].clear()
    with record(model) as live:
        model(x)
        ours = live.pop()
    patched(x)
    assert torch.equal(torch.stack(STATE["recorded"], 1), ours.long())

    STATE["replayed"] = list(routes.flatten(0, 1).long().unbind(1))
    try:
        theirs = patched(x).logits
    finally:
        STATE["replayed"] = None
    theirs.logsumexp(-1).sum().backward()
    with replay(model, routes, torch.ones(B, T, dtype=torch.bool)):
        logits = model(x).logits
        logits.logsumexp(-1).sum().backward()
    assert torch.allclose(logits, theirs, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), patched.parameters()):
        if p.grad is not None:
            scale = p.grad.abs().max().clamp(min=1e-3)
            assert ((p.grad - q.grad).abs().max() / scale) < 1e-4, name
    with torch.no_grad():
        assert not torch.allclose(model(x).logits, logits, atol=1e-3), "the routes change nothing"
