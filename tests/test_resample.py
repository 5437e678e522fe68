"""Prompts without signal are replaced: which ones, by which, on ranks, in runs; and what it does to
the expected gradient."""

import itertools
import threading

import pytest
import torch
from small_runs import STEPS_ALONE, PowerCut, metrics, power_cut, small

from minirl_nb import exact, tasks
from minirl_nb.batch import Rollout
from minirl_nb.checks import check
from minirl_nb.config import load_config
from minirl_nb.metrics import metric
from minirl_nb.objective import equal_groups, group_advantage
from minirl_nb.resample import Drawn, missing, places, resample
from minirl_nb.train import Run, sample, train
from minirl_nb.world import World

G = 2  # responses of a group in the tests without a model


def drawn_of(numbers, rewards):
    "Responses to prompts of these numbers; each prompt has G rewards, each response is one token."
    group = torch.tensor(numbers, dtype=torch.long).repeat_interleave(G)
    B = len(group)
    rollout = Rollout(
        tokens=torch.zeros(B, 2, dtype=torch.long),
        prompt_length=torch.ones(B, dtype=torch.long),
        length=torch.full((B,), 2),
        logp_mu=torch.zeros(B, 2),
        group=group,
    )
    rollout.reward = torch.tensor([rewards[i] for i in numbers], dtype=torch.float32).reshape(-1)
    return Drawn(rollout, group.tolist(), [f"{i}" for i in group.tolist()])


def on_ranks(size, wanted, bound, rewards):
    "`resample` on ranks that are threads, each with its share of every draw."
    meeting, given, found = threading.Barrier(size), [None] * size, [None] * size

    def work(rank):
        world = World()
        world.rank, world.size = rank, size

        def gather(x):
            given[rank] = x
            meeting.wait(10)
            seen = list(given)
            meeting.wait(10)
            return seen

        def draw(first, n):
            return drawn_of(list(range(first, first + n))[world.share(n)], rewards)

        found[rank] = resample(draw(0, wanted), draw, wanted, bound, gather)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    return found


def test_the_batch_holds_the_first_prompts_with_signal():
    """Against the rule in one sentence, for all patterns of seven prompts and each bound: the first
    n with signal among the first n + m, in the order of the places that are free."""
    wanted, largest = 3, 4
    for flags in itertools.product([False, True], repeat=wanted + largest):
        for bound in range(largest + 1):
            ends = [i + 1 for i in range(wanted + bound) if sum(flags[: i + 1]) == wanted]
            drawn = max(wanted, ends[0] if ends else wanted + bound)
            signal = torch.tensor(flags[:drawn])
            assert missing(signal, wanted, bound) == 0
            for fewer in range(wanted, drawn):
                assert missing(torch.tensor(flags[:fewer]), wanted, bound) > 0
            place = places(signal, wanted).tolist()
            batch = sorted((p, i) for i, p in enumerate(place) if p >= 0)
            assert [p for p, _ in batch] == [0, 1, 2]
            further = [i for _, i in batch if i >= wanted]
            assert further == [i for i in range(wanted, drawn) if flags[i]]
            assert all(i == p for p, i in batch if flags[p])  # who has signal keeps its place


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_choose_as_one_process_does(size):
    "Five ranks and three prompts: some have nothing to sample in any round, and take part."
    rewards = [(0, 0), (1, 0), (1, 1), (0, 0), (0, 1), (1, 1), (1, 0), (0, 1)]
    found = on_ranks(size, 3, 4, rewards)
    rows = {}
    for chosen, further, counted in found:
        assert further == 4 and counted == found[0][2]
        for b, place in enumerate(chosen.rollout.group.tolist()):
            rows.setdefault(place, []).append(chosen.problems[b])
            assert chosen.texts[b] == f"{chosen.problems[b]}"
            assert float(chosen.rollout.reward[b]) in rewards[chosen.problems[b]]
    assert rows == {0: [4, 4], 1: [1, 1], 2: [6, 6]}
    assert found[0][2] == {
        "resample/reward": 7 / 14,
        "resample/equal_groups": 4 / 7,
        "resample/replaced": 2,
        "resample/further": 4,
    }


def test_the_expected_gradient_keeps_its_direction():
    """Every sequence of prompts and responses of a policy with two prompts, two responses each,
    with its probability: the mean of the batch's gradient is that without resampling, times the
    expected number of groups with signal over what it was."""
    ys = exact.list_responses(2, 1, None)
    policy = exact.TablePolicy(ys, prompts=2)
    theta = policy.init(0)
    score = [exact.token_scores(lambda p, x=x: policy(p, x), theta).sum(1) for x in (0, 1)]
    p = [exact.sequence_logp(policy(theta, x)).exp() for x in (0, 1)]
    units = list(itertools.product((0, 1), range(len(ys)), range(len(ys))))
    chance = [0.5 * float(p[x][a] * p[x][b]) for x, a, b in units]
    reward = [(float(a == x), float(b == x)) for x, a, b in units]  # prompt x wants response x

    def gradient(x, a, b):
        of_group = torch.tensor([float(a == x), float(b == x)], dtype=torch.float64)
        A = group_advantage(of_group, torch.zeros(2, dtype=torch.long))
        return (A[0] * score[x][a] + A[1] * score[x][b]) / 2

    gradients = [gradient(*u) for u in units]
    assert sum(chance) == pytest.approx(1)
    plain = sum(c * g for c, g in zip(chance, gradients))
    s = sum(c for c, r in zip(chance, reward) if r[0] != r[1])
    wanted, bound = 2, 1
    expected, filled = torch.zeros_like(theta), 0.0
    for at in itertools.product(range(len(units)), repeat=wanted + bound):
        rewards = [reward[i] for i in at]

        def draw(first, n, rewards=rewards):
            return drawn_of(range(first, first + n), rewards)

        chosen, _, _ = resample(draw(0, wanted), draw, wanted, bound, lambda x: [x])
        weight = float(torch.tensor([chance[i] for i in at], dtype=torch.float64).prod())
        prompts = chosen.problems[::G]
        expected += weight * sum(gradients[at[i]] for i in prompts) / wanted
        equal = equal_groups(chosen.rollout.reward, chosen.rollout.group)
        filled += weight * float((~equal).double().mean())
    assert 1.1 * s < filled < 0.99  # it does something, and the bound is felt
    # 512 sequences, each a product of a few float64 numbers
    assert torch.allclose(expected, filled / s * plain, rtol=1e-12, atol=1e-14)
    assert exact.angle(expected, plain) < 1e-6 and plain.norm() > 1e-3


# ------------------------------------------------------------------------------------------ in a run
@pytest.fixture(scope="module")
def resampled(tmp_path_factory, coldstart):
    "A run that resamples, and the parts of the stream that it asked for, in their order."
    folder, asked = tmp_path_factory.mktemp("resampled"), []
    whole = Run.problems

    def problems(self, start, n):
        asked.append((start, n))
        return whole(self, start, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "problems", problems)
        result = train(small(folder / "run", coldstart, **{"batch.resample": 5}))
    return result, asked


def test_metrics_of_a_run(resampled, finished):
    result, asked = resampled
    rows = result.steps()
    for row in rows:
        assert 0 <= row["resample/replaced"] <= row["resample/further"] <= 5
        assert all(metric(key) is not None for key in row)
    # of the batch and of everything that was sampled: the same groups lack signal or were replaced
    for a, b in zip(rows[::2], rows[1::2]):
        assert {k: a[k] for k in a if k.startswith("resample/")} == {
            k: b[k] for k in b if k.startswith("resample/")
        }
        sampled = 8 + a["resample/further"]
        with_signal = 8 * (1 - (a["equal_groups"] + b["equal_groups"]) / 2)
        assert with_signal == pytest.approx(sampled * (1 - a["resample/equal_groups"]))
        full = a["equal_groups"] == b["equal_groups"] == 0
        assert full or a["resample/further"] == 5
    assert any(row["resample/replaced"] for row in rows)
    assert any(abs(a["resample/reward"] - a["reward"]) > 0.01 for a in rows)
    # the evaluation before the first step is what it is without the setting
    first, plain = result.evaluations[0], finished.evaluations[0]
    for name in plain:
        assert first[name].accuracy("easy") == plain[name].accuracy("easy")


def test_the_stream_is_read_without_gaps_and_without_repeats(resampled):
    _, asked = resampled
    assert len(asked) > 4  # rounds of resampling
    at = 0
    for start, n in asked:
        assert start == at and n > 0
        at += n


def test_replaced_groups_have_signal(tmp_path, coldstart):
    "Against the same rollout step without the setting: groups with signal stay what they are."
    runs = {
        bound: Run(small(tmp_path / str(bound), coldstart, **{"batch.resample": bound}))
        for bound in (0, 64)
    }
    plain, full = (sample(run) for run in runs.values())
    for run in runs.values():
        run.engine.close()
    assert plain.further == 0 and plain.resampled == {}
    equal = equal_groups(plain.rollout.reward, plain.rollout.group)
    assert 0 < equal.sum() == full.resampled["resample/replaced"] <= full.further
    assert not equal_groups(full.rollout.reward, full.rollout.group).any()
    for g in range(8):
        a, b = (s.rollout.select((s.rollout.group == g).nonzero()[:, 0]) for s in (plain, full))
        same = a.tokens.shape == b.tokens.shape and torch.equal(a.tokens, b.tokens)
        assert same == (not equal[g]), g


def test_a_batch_full_of_signal_is_the_run_without_the_setting(tmp_path, coldstart, monkeypatch):
    "To the bit, apart from the keys of the setting."
    rewards = lambda self, problems, texts: torch.arange(len(problems)) % 2.0  # noqa: E731
    monkeypatch.setattr(tasks.Task, "verify_many", rewards)
    found = []
    for bound in (0, 5):
        changes = STEPS_ALONE | {"batch.resample": bound, "steps": 4}
        train(small(tmp_path / str(bound), coldstart, **changes))
        found.append(metrics(tmp_path / str(bound)))
    plain, other = found
    assert not any(key.startswith("resample/") for row in plain for key in row)
    for a, b in zip(plain, other, strict=True):
        assert a == {k: v for k, v in b.items() if not k.startswith("resample/")}
        assert b.get("resample/further", 0) == 0


def test_a_resumed_run_repeats_one_that_was_not_stopped(resampled, tmp_path, coldstart):
    changes = {"batch.resample": 5, "output.checkpoint_every": 4}
    with pytest.raises(PowerCut):
        train(small(tmp_path / "run", coldstart, **changes), on_step=power_cut(6))
    train(small(tmp_path / "run", coldstart, **changes, resume=True))
    result, _ = resampled
    assert metrics(tmp_path / "run") == metrics(result.folder)


def test_what_is_refused():
    with pytest.raises(ValueError, match="batch.resample is -1"):
        load_config(None, {"batch.resample": -1})
    with pytest.raises(ValueError, match="objective.advantage = none"):
        check(load_config(None, {"batch.resample": 4, "objective.advantage": "none"}))
