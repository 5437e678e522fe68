"""Runs are paired by seed and problems; intervals hold what they should."""

import json
import shutil

import pytest

from minirl_nb.cli import main
from minirl_nb.compare import changes, comparison, last_quarter, pairs_of, read_group
from minirl_nb.config import config_yaml, load_config
from minirl_nb.logs import read_log


def copy_of(finished, folder, seed=0, reward=0.0):
    "The finished run again, under another seed, with rewards moved."
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    config = load_config(folder / "config.yaml", {"seed": seed})
    (folder / "config.yaml").write_text(config_yaml(config))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    moved = [r | ({"reward": r["reward"] + reward} if "reward" in r else {}) for r in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in moved))
    return folder


@pytest.fixture(scope="module")
def groups(finished, tmp_path_factory):
    "Three seeds of A and of B, whose rewards are 0.1 higher, give or take a little."
    folder = tmp_path_factory.mktemp("groups")
    for seed, extra in enumerate((0.0, 0.01, -0.01)):
        copy_of(finished, folder / f"a_{seed}", seed, reward=seed / 5)
        copy_of(finished, folder / f"b_{seed}", seed, reward=seed / 5 + 0.1 + extra)
    return folder


def test_a_run_against_itself_has_no_difference(finished):
    log = read_log(finished.folder)
    assert all(c.before == c.after and c.low is None for c in changes([(log, log)]))
    text = comparison([log], [log])
    assert "no interval over seeds" in text and "intervals over problems" in text
    assert "+0.000  [+0.000, +0.000]" in text


def test_groups_are_paired_by_seed(groups):
    pairs = pairs_of(read_group(f"{groups}/a_*"), read_group(f"{groups}/b_*"))
    assert [(a.name, b.name) for a, b in pairs] == [(f"a_{i}", f"b_{i}") for i in range(3)]
    reward = next(c for c in changes(pairs) if c.key == "reward")
    assert reward.after - reward.before == pytest.approx(0.1)
    # the levels of the seeds differ by 0.2, the differences by 0.01
    assert 0.05 < reward.low < 0.1 < reward.high < 0.15
    (pair,) = pairs_of(read_group(f"{groups}/a_[12]"), read_group(f"{groups}/b_1"))
    assert (pair[0].name, pair[1].name) == ("a_1", "b_1")


def test_the_last_quarter(finished):
    log = read_log(finished.folder)
    rows = [r["entropy"] for r in log.steps[-2:]]  # of eight steps
    assert last_quarter(log, "entropy") == pytest.approx(sum(rows) / 2)
    assert last_quarter(log, "nothing") is None


def test_the_command_prints_a_table(groups, capsys):
    assert main(["compare", f"{groups}/a_*", f"{groups}/b_*"]) == 0
    out = capsys.readouterr().out
    assert "3 pairs of seeds" in out and "training reward" in out and "benchmark accuracy" in out


def test_what_cannot_be_compared_is_one_sentence(groups, capsys):
    for words, said in (
        ([f"{groups}/a_*"], "two runs or patterns"),
        ([f"{groups}/c_*", f"{groups}/b_*"], "no run that fits"),
        ([f"{groups}/a_0", f"{groups}/b_[12]"], "no seed is on both sides"),
        ([f"{groups}/?_0", f"{groups}/b_*"], "two runs have one seed"),
    ):
        assert main(["compare", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
