import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb.batch import (
    Ragged,
    Rollout,
    cat,
    load,
    microbatches,
    minibatches,
    pack,
    padding_share,
    save,
    unpack,
    validate,
)


def make(lengths, prompt=2, T=None, routes=False, group=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths)
    B, T = len(lengths), T or max(lengths)
    r = Rollout(
        tokens=torch.randint(0, 9, (B, T), generator=g),
        prompt_length=torch.full((B,), prompt),
        length=length,
        logp_mu=torch.zeros(B, T),
        group=torch.arange(B) if group is None else torch.tensor(group),
    )
    r.logp_mu = torch.where(r.response_mask, -torch.rand(B, T, generator=g), 0.0)
    if routes:
        r.routes = torch.randint(0, 4, (B, T, 3, 2), generator=g).to(torch.uint8)
        r.routes_valid = torch.arange(T) < length[:, None] - 1
    return r


def test_select_trims_and_keeps_rows_together():
    r = make([3, 7, 5], routes=True)
    s = validate(r.select([2, 0]))
    assert s.tokens.shape == (2, 5) and s.routes.shape == (2, 5, 3, 2)
    assert torch.equal(s.response(0), r.response(2)) and torch.equal(
        s.logp_mu[1, :3], r.logp_mu[0, :3]
    )
    assert s.group.tolist() == [2, 0]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("tokens", torch.zeros(2, 6, dtype=torch.int32), "int32"),
        ("length", torch.tensor([2, 4]), "at least one sampled token"),
        ("length", torch.tensor([7, 4]), "at most T = 6"),
        ("logp_mu", torch.full((2, 6), -0.1), "prompt"),
        ("reward", torch.zeros(3), "shape"),
        ("finished", torch.ones(2), "float32"),
        ("routes_valid", torch.ones(2, 6, dtype=torch.bool), "last token"),
        ("routes", torch.zeros(2, 6, 3, 2, dtype=torch.int64), "int64"),
        ("routes", torch.full((2, 6, 3, 2), 200, dtype=torch.uint8), "expert 200 of 4"),
    ],
)
def test_validate_names_the_field(field, value, words):
    r = make([6, 4], routes=True)
    setattr(r, field, value)
    with pytest.raises(ValueError, match=f"rollout.{field}") as e:
        validate(r, experts=4)
    assert words in str(e.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.5])
def test_validate_refuses_what_is_no_log_probability(bad):
    r = make([6, 4])
    r.logp_mu[1, 3] = bad
    with pytest.raises(ValueError, match=r"logp_mu: \[1, 3\]"):
        validate(r)


@given(
    st.lists(st.integers(3, 40), min_size=1, max_size=60),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=100, deadline=None)
def test_microbatches_partition_rows_within_both_limits(lengths, budget, padding):
    length = torch.tensor(lengths)
    parts = microbatches(length, budget, padding)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for p in parts:
        assert len(p) == 1 or int(length[p].max()) * len(p) <= budget
        assert padding_share(length[p], [torch.arange(len(p))]) <= padding + 1e-12


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_minibatches_keep_groups_whole(n, groups_each, size, seed):
    group = torch.arange(n * groups_each).repeat_interleave(size)[
        torch.randperm(n * groups_each * size)
    ]
    parts = minibatches(group, n, torch.Generator().manual_seed(seed) if seed else None)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(group)))
    homes = [set(group[p].tolist()) for p in parts]
    assert all(len(h) == groups_each for h in homes) and len(set.union(*homes)) == n * groups_each


def test_minibatches_say_which_n_would_do():
    with pytest.raises(ValueError, match="6 groups do not split into 4"):
        minibatches(torch.arange(6), 4)


def test_save_load_is_exact_and_uses_no_pickle(tmp_path):
    r = make([6, 4], routes=True)
    r.reward = torch.tensor([1.0, 0.0])
    r.policy_version = 7
    save(r, tmp_path, prompts=["a", "b"], responses=["c", "d"])
    back = load(tmp_path)
    for name in (
        "tokens",
        "prompt_length",
        "length",
        "logp_mu",
        "group",
        "reward",
        "routes",
        "routes_valid",
        "finished",
    ):
        assert torch.equal(getattr(back, name), getattr(r, name)), name
    assert back.policy_version == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "responses.parquet",
        "rollout.safetensors",
    ]
    with pytest.raises(FileNotFoundError, match="no rollout"):
        load(tmp_path / "nowhere")


def test_cat_pads_and_refuses_mixtures():
    a, b = make([6, 4], routes=True), make([9], routes=True)
    both = validate(cat([a, b]))
    assert both.tokens.shape == (3, 9) and torch.equal(both.select([2]).logp_mu, b.logp_mu)
    with pytest.raises(ValueError, match="with and without routes"):
        cat([a, make([3])])
    b.policy_version = 1
    with pytest.raises(ValueError, match="versions"):
        cat([a, b])


def same(a, b):
    for name in (
        "tokens",
        "prompt_length",
        "length",
        "logp_mu",
        "group",
        "reward",
        "routes_valid",
        "finished",
    ):
        assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()), name
    assert isinstance(a.routes, Ragged) and isinstance(b.routes, Ragged)
    assert torch.equal(a.routes.values, b.routes.values) and torch.equal(
        a.routes.length, b.routes.length
    )
    assert a.routes.dtype == b.routes.dtype and a.policy_version == b.policy_version


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_rollout_with_ragged_routes_is_the_same_rollout(tmp_path, dtype):
    r = make([6, 9, 4], routes=True)
    r.routes, r.policy_version, r.tokens = r.routes.to(dtype), 3, r.tokens * r.token_mask
    p = validate(r.pack_routes(), vocab_size=9, experts=4)
    assert p.pack_routes() is p and p.routes.values.shape == (19, 3, 2)
    rows = [2, 0]
    same(p.select(rows), validate(r.select(rows).pack_routes()))
    same(cat([p, r.select(rows)]), cat([r, r.select(rows)]).pack_routes())
    save(p, tmp_path)
    same(load(tmp_path), p)
    same(validate(unpack(pack(r), 3), experts=4), p)
    same(validate(unpack({k: x.select(rows) for k, x in pack(r).items()}, 3)), p.select(rows))
    p.routes.values[0, 1, 0] = 7
    with pytest.raises(ValueError, match="names expert 7 of 4"):
        validate(p, experts=4)
    p.routes = p.select([0, 1]).routes
    with pytest.raises(ValueError, match="rollout.routes: rows of lengths"):
        validate(p)
    p.routes = Ragged(torch.zeros(19, 3, dtype=dtype), r.length)
    with pytest.raises(ValueError, match=r"must be \(n, L, K\)"):
        validate(p)


@pytest.mark.parametrize("form", ["none", "padded", "ragged"])
def test_no_rows_at_all(tmp_path, form):
    r = make([6, 4], routes=form != "none")
    if form == "ragged":
        r = r.pack_routes()
    e = validate(r.select([]), vocab_size=9, experts=4)
    assert (
        len(e) == 0
        and e.tokens.shape == (0, 0)
        and e.response_mask.shape == e.token_mask.shape == (0, 0)
    )
    assert (
        e.response_length.shape == (0,) and len(e.select(torch.tensor([], dtype=torch.long))) == 0
    )
    for joined in (cat([e, r]), cat([r, e])):
        assert (
            torch.equal(joined.tokens, r.tokens)
            and torch.equal(joined.logp_mu, r.logp_mu)
            and len(validate(joined)) == 2
        )
        if form == "padded":
            assert torch.equal(joined.routes, r.routes)
        if form == "ragged":
            assert torch.equal(joined.routes.values, r.routes.values)
    assert len(validate(cat([e, e]))) == 0
    assert microbatches(e.length, 10) == [] and padding_share(e.length, []) == 0
    assert [len(p) for p in minibatches(e.group, 3)] == [0, 0, 0]
    save(e, tmp_path)
    for back in (load(tmp_path), unpack(pack(e))):
        assert len(validate(back)) == 0 and (back.routes is None) == (form == "none")
    both = unpack({k: Ragged.cat([a, pack(r)[k]]) for k, a in pack(e).items()})
    assert torch.equal(both.logp_mu, r.logp_mu)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 120))
@settings(max_examples=150, deadline=None)
def test_packed_microbatches_partition_rows_under_the_budget_and_are_few(lengths, budget):
    length = torch.tensor(lengths, dtype=torch.int64)
    parts = microbatches(length, budget, packed=True)
    assert sorted(b for p in parts for b in p.tolist()) == list(range(len(lengths)))
    for p in parts:
        assert len(p) == 1 or int(length[p].sum()) <= budget
    fit = [n for n in lengths if n <= budget]
    least = -(-sum(fit) // budget)  # no cut can have fewer bins than tokens / budget
    half = sum(n > budget / 2 for n in fit)  # nor fewer than rows of which no two fit together
    bins = len(parts) - (len(lengths) - len(fit))
    assert (
        max(least, half) <= bins <= 2 * least + 1
    )  # a first fit leaves at most one bin half empty
    assert [int(length[p].max()) for p in parts] == sorted(
        (int(length[p].max()) for p in parts), reverse=True
    )


def optimum(lengths, budget):
    "Least number of bins, by trying everything."

    def place(rows, room):
        if not rows:
            return len(room)
        tried, best = set(), len(lengths)
        for i, r in enumerate(room):
            if r >= rows[0] and r not in tried:
                tried.add(r)
                best = min(best, place(rows[1:], room[:i] + [r - rows[0]] + room[i + 1 :]))
        return min(best, place(rows[1:], [*room, budget - rows[0]])) if len(room) < best else best

    return place(sorted(lengths, reverse=True), [])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(20, 40))
@settings(max_examples=60, deadline=None)
def test_packed_microbatches_keep_the_bound_of_first_fit(lengths, budget):
    assert (
        len(microbatches(torch.tensor(lengths), budget, packed=True))
        <= 11 / 9 * optimum(lengths, budget) + 6 / 9 + 1e-9
    )


def test_packed_microbatches_are_even_where_they_can_be():
    length = (
        (8000 * (0.7 * torch.randn(1024, generator=torch.Generator().manual_seed(0))).exp())
        .clamp(64, 32768)
        .long()
    )
    parts = microbatches(length, 65_536, packed=True)
    sums = torch.stack([length[p].sum() for p in parts])
    assert (
        len(parts) == -(-int(length.sum()) // 65_536)
        and int(sums.max()) <= 65_536
        and int(sums.min()) > 0.95 * int(sums.max())
    )
    assert microbatches(length[:0], 10, packed=True) == []
