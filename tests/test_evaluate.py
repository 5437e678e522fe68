"""Engineering tests of `evaluate`: rewards at their problems, intervals against scipy, pairing."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from end_tokens import ends_rightly
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb import cli, run, tasks
from minirl_nb.batch import Rollout
from minirl_nb.config import load_config
from minirl_nb.evaluate import (
    EvalResult,
    bootstrap_interval,
    difference_table,
    evaluate,
    paired_difference,
    resampling,
    student_quantile,
)
from minirl_nb.rollout import Sampling

TASK = tasks.load("arithmetic")


class Oracle:
    """An engine that answers from a list: sample k of a problem is right where `right(a, b, k)`
    says so; rows come in a shuffled order."""

    version = 0

    def __init__(self, right, shuffle=True, limit=False):
        self.right, self.shuffle, self.limit, self.calls = right, shuffle, limit, []

    def generate(self, prompts, sampling):
        self.calls.append((len(prompts), sampling))
        rows = []
        for g, prompt in enumerate(prompts):
            a, b = map(int, TASK.decode(list(prompt)).rstrip("=").split("*"))
            for k in range(sampling.n):
                text = f"{a * b + (0 if self.right(a, b, k) else 1)}."
                rows.append((g, list(prompt), TASK.tokenizer(text)["input_ids"]))
        if self.shuffle:
            rows = [
                rows[i]
                for i in torch.randperm(
                    len(rows), generator=torch.Generator().manual_seed(1)
                ).tolist()
            ]
        T = max(len(p) + len(r) for _, p, r in rows)
        tokens = torch.tensor([p + r + [0] * (T - len(p) - len(r)) for _, p, r in rows])
        start, length = (
            torch.tensor([len(p) for _, p, _ in rows]),
            torch.tensor([len(p) + len(r) for _, p, r in rows]),
        )
        return Rollout(
            tokens,
            start,
            length,
            torch.zeros(tokens.shape),
            torch.tensor([g for g, _, _ in rows]),
            finished=torch.full((len(rows),), not self.limit),
        )


def result(rewards, ids=None, n=None):
    rewards = {k: torch.tensor(v, dtype=torch.float32) for k, v in rewards.items()}
    ids = ids or {k: [f"{k}{i}" for i in range(len(v))] for k, v in rewards.items()}
    flat = dict.fromkeys(rewards, 0.0)
    return EvalResult(
        rewards,
        ids,
        flat,
        flat,
        {k: [] for k in rewards},
        Sampling(n=n or next(iter(rewards.values())).shape[1]),
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_reward_lands_at_its_problem(shuffle):

    def right(a, b, k):
        return (a + b) % 4 >= k

    engine = Oracle(right, shuffle)
    r = evaluate(engine, TASK, n=4, temperature=0.7, max_new_tokens=9, seed=5)
    assert engine.calls == [(90, Sampling(n=4, temperature=0.7, max_new_tokens=9, seed=5))]
    for name, problems in TASK.benchmarks.items():
        assert r.ids[name] == [p.id for p in problems]
        for p, row in zip(problems, r.rewards[name]):
            a, b = map(int, p.problem.split("*"))
            assert row.sum() == (a + b) % 4 + 1
        assert len(r.samples[name]) == 30 and all(s.endswith(".") for s in r.samples[name])
        assert r.cut[name] == 0 and 3 <= r.length[name] <= 6
    assert r.accuracy() == pytest.approx(sum(r.accuracy(k) for k in TASK.benchmarks) / 3)
    assert evaluate(Oracle(right, limit=True), TASK, n=1).cut["easy"] == 1.0


def test_benchmarks_of_different_sizes():
    some = {"one": TASK.problems[:7], "two": TASK.problems[7:10]}
    r = evaluate(Oracle(lambda a, b, k: k == 0), TASK, some, n=5)
    assert [tuple(r.rewards[k].shape) for k in some] == [
        (7, 5),
        (3, 5),
    ] and r.accuracy() == pytest.approx(0.2)
    assert r.metrics("eval/").keys() == {
        "eval/accuracy",
        *(f"eval/{k}/{m}" for k in some for m in ("accuracy", "length", "cut")),
    }
    table = r.table().splitlines()
    assert (
        len(table) == 5
        and "pass@5" in table[0]
        and table[-1].split()[:3] == ["mean", "10", "0.200"]
    )


def test_wrong_input(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "1*1", "answer": "1"}')
    bare = tasks.load(f"{tmp_path}/p.jsonl?verifier=arithmetic")
    with pytest.raises(ValueError, match="no benchmark to evaluate on"):
        evaluate(Oracle(lambda *_: 1), bare)
    r = result({"b": [[1, 0], [1, 1]]})
    with pytest.raises(ValueError, match="no benchmark 'c'; there are b"):
        r.accuracy("c")
    with pytest.raises(ValueError, match="pass@3 cannot be computed from 2 samples"):
        r.pass_at(3)
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap_interval([torch.zeros(0)])
    with pytest.raises(ValueError, match="same problems of benchmark b"):
        paired_difference(r, result({"b": [[1, 0], [1, 1]]}, {"b": ["x", "y"]}))


def test_one_problem_has_no_interval():
    assert result({"b": [[1, 0]]}).interval() == (0.0, 1.0)
    low, high = bootstrap_interval([torch.tensor([0.3])])
    assert (float(low), float(high)) == (-math.inf, math.inf)


@pytest.mark.parametrize("degrees", [5, 7, 14, 29, 87, 1000])
def test_student_quantile(degrees):
    # the first term left out is of order 1/degrees^4, with a coefficient below 3 at this quantile
    assert student_quantile(0.975, degrees) == pytest.approx(
        scipy.stats.t.ppf(0.975, degrees), abs=3 / degrees**4
    )


@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5),
    st.integers(1, 6),
)
def test_pass_at_k_by_listing_the_subsets(rows, k):
    from itertools import combinations

    r = result({"b": rows})
    listed = [any(s) for row in rows for s in combinations(row, k)]
    assert r.pass_at(k) == pytest.approx(sum(listed) / len(listed))


def test_resampling_matrix():
    a, b = resampling([3, 5], draws=20_000, seed=2)
    for w in (a, b):
        P = w.shape[1]
        torch.testing.assert_close(w.sum(1), torch.ones(len(w), dtype=torch.float64))
        counts = (w * P).round()
        assert torch.allclose(counts, w * P) and abs(counts.mean() - 1) < 1e-9
        assert (
            abs(float(counts.var(correction=0)) - (1 - 1 / P)) < 0.03
        )  # of a binomial(P, 1/P) number
    assert not torch.equal(resampling([3], 50, 1)[0], resampling([3], 50, 2)[0])
    assert torch.equal(resampling([3], 50, 1)[0], resampling([3], 50, 1)[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(0, 100))
def test_plain_interval_agrees_with_scipy(values, seed):
    x = np.array(values)
    ours = bootstrap_interval([torch.tensor(values, dtype=torch.float64)], expand=False, seed=seed)
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(seed)
    ).bootstrap_distribution
    # Compared as ranks, which does not depend on the values: of 10,000 draws a share of 0.025 has a
    # standard error of 0.0016, the difference of two such shares one of 0.0022. Six of them; means
    # agree to rounding.
    slack, rounding = 6 * 0.0022, 1e-12
    for end, share in zip(map(float, ours), (0.025, 0.975)):
        assert (theirs < end - rounding).mean() <= share + slack and (
            theirs <= end + rounding
        ).mean() >= share - slack
    low, high = ours
    expanded = bootstrap_interval([torch.tensor(values, dtype=torch.float64)], seed=seed)
    assert expanded[0] <= low and high <= expanded[1], (
        "the expanded interval contains the plain one"
    )


def test_interval_of_normal_values_is_students():
    """For many problems of normally distributed accuracy the expanded interval is Student's t
    interval."""
    x = 0.5 + 0.1 * torch.randn(
        200, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    low, high = bootstrap_interval([x], draws=100_000)
    half = scipy.stats.t.ppf(0.975, 199) * float(x.std()) / 200**0.5
    # 100,000 draws: a 2.5% quantile has a standard error of 0.004 half widths; the skewness of 200
    # values adds about 0.01
    assert float(low) == pytest.approx(float(x.mean()) - half, abs=0.03 * half)
    assert float(high) == pytest.approx(float(x.mean()) + half, abs=0.03 * half)


def test_leading_dimensions_are_separate_experiments():
    x, y = torch.rand(3, 4, 10), torch.rand(3, 4, 20)
    low, high = bootstrap_interval([x, y], draws=500)
    assert low.shape == high.shape == (3, 4)
    one = bootstrap_interval([x[1, 2], y[1, 2]], draws=500)
    torch.testing.assert_close(torch.stack([low[1, 2], high[1, 2]]), torch.stack(one))


def test_paired_interval_covers_the_true_gain_of_pooled_benchmarks():
    """1,000 simulated trainings on three benchmarks of 30 problems of different difficulty: 95%
    within four standard errors."""
    g = torch.Generator().manual_seed(3)
    hits, gains = [], []
    change = []
    for shift, mean in ((0.5, 0.2), (0.2, 0.5), (1.0, 0.3)):
        p = (torch.randn(1000, 30, generator=g) * 1.2 + math.log(mean / (1 - mean))).double()
        q = p + shift + 0.5 * torch.randn(1000, 30, generator=g)
        big = torch.randn(400_000, generator=g).double() * 1.2 + math.log(mean / (1 - mean))
        gains.append(
            float(
                (
                    (big + shift + 0.5 * torch.randn(400_000, generator=g)).sigmoid()
                    - big.sigmoid()
                ).mean()
            )
        )
        before, after = (
            torch.binomial(torch.full_like(x, 32.0), x.sigmoid(), generator=g) / 32 for x in (p, q)
        )
        change.append(after - before)
    low, high = bootstrap_interval(change, draws=1000)
    truth = sum(gains) / 3
    hits = ((low <= truth) & (truth <= high)).double().mean()
    assert abs(float(hits) - 0.95) < 4 * (0.95 * 0.05 / 1000) ** 0.5


def test_paired_difference_and_its_table():
    before = result({"a": [[0, 1], [0, 0], [1, 1]], "b": [[0, 0], [1, 0]]})
    same = paired_difference(before, before)
    assert all((d.mean, d.low, d.high) == (0, 0, 0) for d in same.values())
    after = result(
        {"a": [[1, 1, 1, 1]] * 3, "b": [[1, 1, 1, 1]] * 2}, before.ids
    )  # another number of samples
    d = paired_difference(before, after)
    assert list(d) == ["a", "b", None]
    assert (
        d["a"].mean == pytest.approx(0.5)
        and d["b"].mean == pytest.approx(0.75)
        and d[None].mean == pytest.approx(0.625)
    )
    assert all(x.low <= x.mean <= x.high for x in d.values())
    lines = difference_table(d).splitlines()
    assert len(lines) == 5 and lines[-1].split()[:4] == ["mean", "0.375", "1.000", "+0.625"]
    assert (
        len(
            difference_table(
                paired_difference(result({"a": [[1], [0]]}), result({"a": [[1], [1]]}))
            ).splitlines()
        )
        == 3
    )


def test_interval_is_cut_to_probabilities():
    low, high = result({"b": [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]}).interval()
    assert 0 <= low <= high <= 1
    assert result({"b": [[1], [1], [1]]}).interval() == (1.0, 1.0)


# ------------------------------------------------------------------------------------- end tokens
def test_runs_and_evaluations_end_responses_by_one_rule(tmp_path, moe, monkeypatch, capsys):
    "All end tokens of generation_config and tokenizer; the recipe may name others."
    moe.generation_config.eos_token_id = [14, 13]
    moe.save_pretrained(tmp_path / "model")
    tasks.arithmetic_tokenizer().save_pretrained(tmp_path / "model")
    seen = []

    def kept(engine, task, **options):
        seen.append(engine.eos.tolist())
        return evaluate(engine, task, **options)

    monkeypatch.setattr("minirl_nb.evaluate.evaluate", kept)
    words = ["--samples", "4", "--max_new_tokens", "12"]
    cli.main(["evaluate", str(tmp_path / "model"), *words])
    cli.main(["evaluate", str(tmp_path / "model"), *words, "--end_tokens", "14"])
    shown = capsys.readouterr().out.splitlines()

    def engine_of(**changes):
        name = "-".join(map(str, changes.values()))
        known = {
            "model.path": str(tmp_path / "model"),
            "output.folder": str(tmp_path / f"run{name}"),
        }
        return run.Run(load_config(None, known | {"rollout.max_new_tokens": 24} | changes)).engine

    for changes, end, row in (({}, [14, 13, 15], 0), ({"rollout.end_tokens": [14]}, [14], 1)):
        engine = engine_of(**changes)
        assert engine.eos.tolist() == seen[row] == end
        result = evaluate(engine, TASK, n=4, max_new_tokens=12)
        # the evaluation's lengths and cuts are those of the same rule
        assert result.table().splitlines()[-1] == [x for x in shown if x.startswith("mean")][row]
        rows = engine.generate([TASK.encode(p) for p in TASK.benchmarks["easy"]], result.sampling)
        assert float(rows.response_length.float().mean()) == pytest.approx(result.length["easy"])
        assert float((~rows.finished).float().mean()) == pytest.approx(result.cut["easy"])
        assert ends_rightly(rows, end)
    with pytest.raises(ValueError, match="rollout.end_tokens names 99, but the model has tokens 0"):
        engine_of(**{"rollout.end_tokens": [99]})
