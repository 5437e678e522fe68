import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb.batch import Rollout, cat, load, microbatches, minibatches, padding_share, save, validate


def make(lengths, prompt=2, T=None, routes=False, group=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths)
    B, T = len(lengths), T or max(lengths)
    r = Rollout(tokens=torch.randint(0, 9, (B, T), generator=g), prompt_length=torch.full((B,), prompt), length=length,
                logp_mu=torch.zeros(B, T), group=torch.arange(B) if group is None else torch.tensor(group))
    r.logp_mu = torch.where(r.response_mask, -torch.rand(B, T, generator=g), 0.0)
    if routes:
        r.routes = torch.randint(0, 4, (B, T, 3, 2), generator=g).to(torch.uint8)
        r.routes_valid = torch.arange(T) < length[:, None] - 1
    return r


def test_select_trims_and_keeps_rows_together():
    r = make([3, 7, 5], routes=True)
    s = validate(r.select([2, 0]))
    assert s.tokens.shape == (2, 5) and s.routes.shape == (2, 5, 3, 2)
    assert torch.equal(s.response(0), r.response(2)) and torch.equal(s.logp_mu[1, :3], r.logp_mu[0, :3])
    assert s.group.tolist() == [2, 0]


@pytest.mark.parametrize("field, value, words", [
    ("tokens", torch.zeros(2, 6, dtype=torch.int32), "int32"),
    ("length", torch.tensor([2, 4]), "at least one sampled token"),
    ("length", torch.tensor([7, 4]), "at most T = 6"),
    ("logp_mu", torch.full((2, 6), -0.1), "prompt"),
    ("reward", torch.zeros(3), "shape"),
    ("finished", torch.ones(2), "float32"),
    ("routes_valid", torch.ones(2, 6, dtype=torch.bool), "last token"),
    ("routes", torch.zeros(2, 6, 3, 2, dtype=torch.int64), "int64"),
    ("routes", torch.full((2, 6, 3, 2), 200, dtype=torch.uint8), "expert 200 of 4"),
])
def test_validate_names_the_field(field, value, words):
    r = make([6, 4], routes=True)
    setattr(r, field, value)
    with pytest.raises(ValueError, match=f"rollout.{field}") as e: validate(r, experts=4)
    assert words in str(e.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.5])
def test_validate_refuses_what_is_no_log_probability(bad):
    r = make([6, 4])
    r.logp_mu[1, 3] = bad
    with pytest.raises(ValueError, match=r"logp_mu: \[1, 3\]"): validate(r)


@given(st.lists(st.integers(3, 40), min_size=1, max_size=60), st.integers(1, 200), st.sampled_from([0.0, 0.05, 0.5]))
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
    group = torch.arange(n * groups_each).repeat_interleave(size)[torch.randperm(n * groups_each * size)]
    parts = minibatches(group, n, torch.Generator().manual_seed(seed) if seed else None)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(group)))
    homes = [set(group[p].tolist()) for p in parts]
    assert all(len(h) == groups_each for h in homes) and len(set.union(*homes)) == n * groups_each


def test_minibatches_say_which_n_would_do():
    with pytest.raises(ValueError, match="6 groups do not split into 4"): minibatches(torch.arange(6), 4)


def test_save_load_is_exact_and_uses_no_pickle(tmp_path):
    r = make([6, 4], routes=True)
    r.reward = torch.tensor([1.0, 0.0])
    r.policy_version = 7
    save(r, tmp_path, prompts=["a", "b"], responses=["c", "d"])
    back = load(tmp_path)
    for name in ("tokens", "prompt_length", "length", "logp_mu", "group", "reward", "routes", "routes_valid", "finished"):
        assert torch.equal(getattr(back, name), getattr(r, name)), name
    assert back.policy_version == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["responses.parquet", "rollout.safetensors"]
    with pytest.raises(FileNotFoundError, match="no rollout"): load(tmp_path / "nowhere")


def test_cat_pads_and_refuses_mixtures():
    a, b = make([6, 4], routes=True), make([9], routes=True)
    both = validate(cat([a, b]))
    assert both.tokens.shape == (3, 9) and torch.equal(both.select([2]).logp_mu, b.logp_mu)
    with pytest.raises(ValueError, match="with and without routes"): cat([a, make([3])])
    b.policy_version = 1
    with pytest.raises(ValueError, match="versions"): cat([a, b])
