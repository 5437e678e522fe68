"""Routes from elsewhere: what each form means, and what is refused, with rows and layers."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_families import build, discover

from minirl_nb import routing
from minirl_nb.batch import Rollout
from minirl_nb.routing import check, read_routes, record, replay

L, K, E = 3, 3, 8
EXPERTS = [E] * L
MODEL = build(discover()["qwen3_moe"], use_cache=False)


def drawn(n, seed=0, layers=L, k=K, experts=E):
    "int64 [n, L, K], each row K different experts."
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, layers, experts, generator=g).argsort(-1)[..., :k]


def rollout(lengths=(40, 25), seed=0, packed=False, tokens=None):
    "Responses whose routes could have been recorded."
    length = torch.tensor(lengths)
    B, T = len(lengths), max(lengths)
    g = torch.Generator().manual_seed(seed)
    out = Rollout(
        tokens=torch.randint(3, 64, (B, T), generator=g) if tokens is None else tokens,
        prompt_length=torch.full((B,), 2),
        length=length,
        logp_mu=torch.zeros(B, T),
        group=torch.arange(B),
        routes=drawn(B * T, seed).view(B, T, L, K).to(torch.uint8),
        routes_valid=torch.arange(T) < length[:, None] - 1,
    )
    return out.pack_routes() if packed else out


# ------------------------------------------------------------------------------ forms, one sequence
@given(st.integers(2, 30), st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64]))
@settings(max_examples=20, deadline=None)
def test_one_row_fewer_than_tokens_or_as_many_leave_the_last_token_live(tokens, dtype):
    given = drawn(tokens).to(dtype)
    for rows in (given[: tokens - 1], given):
        routes, valid = read_routes(rows, tokens, EXPERTS)
        assert routes.dtype == torch.uint8 and routes.shape == (tokens, L, K)
        assert valid.tolist() == [True] * (tokens - 1) + [False]
        assert torch.equal(routes[:-1].long(), given[:-1].long())
    for wrong in (given[: tokens - 2], drawn(tokens + 1), drawn(tokens)[:, 1:]):
        with pytest.raises(ValueError, match=rf"for {tokens} tokens; they must be \[{tokens - 1}"):
            read_routes(wrong, tokens, EXPERTS)


def test_a_boundary_between_turns_has_no_route_and_is_computed_as_without_replay():
    "Rows of -1 in the middle: those tokens use the experts that the model itself chooses."
    x = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    given = drawn(11)
    given[[4, 5]] = -1
    routes, valid = read_routes(given, 12, EXPERTS)
    assert (~valid).nonzero()[:, 0].tolist() == [4, 5, 11]
    # in the first layer nothing but the token decides, so its live choice is that of a free forward
    with torch.no_grad(), record(MODEL) as free:
        MODEL(x)
        own = free.pop(1)
        with replay(MODEL, routes[None], valid[None]):
            MODEL(x)
        used = free.pop(1)
    assert torch.equal(used[0, valid], routes[valid])
    assert torch.equal(used[0, ~valid, 0], own[0, ~valid, 0])


@pytest.mark.parametrize(
    "rows, layers, value",
    [([6], [1], -1), ([6, 7], [0, 2], -1), ([0], [2], E), ([3], [0, 1, 2], -2)],
)
def test_numbers_that_are_no_expert_are_refused_with_rows_and_layers(rows, layers, value):
    given = drawn(10)
    for t in rows:
        given[t, layers, 0] = value
    with pytest.raises(ValueError) as error:
        read_routes(given, 11, EXPERTS)
    said = str(error.value)
    assert said.startswith(f"routes[{rows[0]}] = ") and f"in layer {layers[0]} has" in said
    assert "outside 0..7" in said and "a token without a route has -1 in every layer" in said
    if len(rows) * len(layers) > 1:
        places = ", ".join(f"[0, {t}]" for t in rows)
        numbers = ", ".join(map(str, layers))
        assert f"{len(rows)} such rows ({places}), in layers {numbers}" in said


def test_minus_one_does_not_wrap_to_an_expert():
    "-1 is 255 as uint8, which exists where there are 256 experts and each token uses one."
    given = drawn(6, layers=2, k=1, experts=256)
    given[2, 1] = -1
    with pytest.raises(ValueError, match=r"routes\[2\] = \[-1\] in layer 1"):
        read_routes(given, 7, [256, 256])
    given[2] = -1
    assert read_routes(given, 7, [256, 256])[1].tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert read_routes(drawn(3, experts=300), 4, [300] * L)[0].dtype == torch.uint16


# ------------------------------------------------------------------------------ a rollout, checked
@pytest.mark.parametrize("packed", [False, True])
def test_routes_that_can_be_right_pass(packed):
    check(MODEL, rollout(packed=packed))
    assert routing.check is check


@pytest.mark.parametrize("packed", [False, True])
def test_a_tail_padded_with_zeros_is_refused_with_rows_and_layers(packed):
    r = rollout()
    r.routes[1, 20:] = 0
    with pytest.raises(ValueError) as error:
        check(MODEL, r.pack_routes() if packed else r)
    said = str(error.value)
    assert "(layer 0): routes[1, 20] = [0, 0, 0] has zeros only" in said
    assert "4 such rows" in said and "in layers 0, 1, 2" in said
    r.routes_valid[1, 20:] = False  # said to be unrecorded, they route live
    check(MODEL, r)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("repeats", [29, 67])
def test_a_row_repeated_over_many_tokens_is_stale(packed, repeats):
    r = rollout(lengths=(30, 90))
    r.routes[1, 10 : 10 + repeats] = r.routes[1, 10]
    form = r.pack_routes() if packed else r
    if repeats < 30:  # 28 changes of the token: 9 choices a row make 256 things after 29
        check(MODEL, form)
        return
    with pytest.raises(
        ValueError, match=r"routes\[1, 10:77\] are one row 67 times in all 3 layers"
    ):
        check(MODEL, form)


def test_a_repeated_token_may_keep_its_route_and_rows_of_two_responses_are_no_run():
    r = rollout(lengths=(80, 80))
    r.routes[0, 5:70] = r.routes[0, 5]
    r.tokens[0, 5:70] = 9
    check(MODEL, r)
    ends = rollout(lengths=(21, 21), packed=True)
    ends = dataclasses.replace(ends, routes_valid=torch.ones(2, 21, dtype=torch.bool))
    ends.routes.values[:] = ends.routes.values[0]  # 20 changes in each response, none between them
    check(MODEL, ends)


def test_one_layer_that_changes_makes_a_row_fresh():
    r = rollout(lengths=(90,))
    changing = r.routes[:, :, 1].clone()
    r.routes[:] = r.routes[:, :1]
    r.routes[:, :, 1] = changing
    check(MODEL, r)


def test_a_rollout_without_any_route_is_refused():
    r = rollout()
    with pytest.raises(ValueError, match="no token of this rollout has a route"):
        check(MODEL, dataclasses.replace(r, routes_valid=torch.zeros_like(r.routes_valid)))
    with pytest.raises(ValueError, match="no token of this rollout has a route"):
        check(MODEL, dataclasses.replace(r, routes=None, routes_valid=None))
    with pytest.raises(ValueError, match="3 routers"):
        check(MODEL, dataclasses.replace(r, routes=r.routes[:, :, :2]))


@pytest.mark.parametrize("seed", range(3))
def test_what_a_model_recorded_itself_passes(seed):
    "Also where it repeats itself: real routes of a small model are no false alarm."
    model = build(discover()["mixtral"], seed=seed, use_cache=False, sliding_window=None)
    g = torch.Generator().manual_seed(seed)
    r = rollout(lengths=(60, 60), tokens=torch.randint(3, 6, (2, 60), generator=g))
    with torch.no_grad(), record(model) as own:
        model(r.tokens)
    check(model, dataclasses.replace(r, routes=own.pop(2)))
