"""Studies: what is registered is valid, runs are told apart, and kept rows belong to their study."""

import hashlib
from dataclasses import replace

import pytest
import yaml

from minirl_nb.config import RunConfig, config_yaml, load_config
from minirl_nb.parsing import flatten, parse_config
from minirl_nb.results import effects, outcomes, questions, results
from minirl_nb.study import (
    LATER_FIELDS,
    PlannedRun,
    code_hash,
    identifying,
    load_study,
    planned_runs,
    run_one,
    state_of,
    steps_done,
    studies,
)

KEPT = ("on_policy", "off_policy", "cold_starts")


@pytest.mark.parametrize("name", studies())
def test_a_study_of_the_package_is_valid(name):
    study = load_study(name)
    assert study.question and study.stopping and study.comparisons
    runs = planned_runs(study, name)
    assert len({r.identity for r in runs}) == len(runs)
    compared = {(s, a) for s, c in questions(study) for a in (c.arm, c.against)}
    assert {(r.setting, r.arm) for r in runs} >= compared


@pytest.mark.parametrize(
    "text, said",
    [
        ("arms: {a: {}}\ncomparisons: [{arm: b, against: a}]", "names the arm 'b'"),
        ("arms: {a: {}}\nseeds_of: {b: 2}", "no arm and no setting"),
        ("armz: {a: {}}", "unknown key 'armz.a'"),
        ("arms: {a: {}}\nsettings: {s: {}}\nseeds_of: {s/b: 2}", "no arm and no setting"),
    ],
)
def test_a_wrong_study_is_refused_in_a_sentence(tmp_path, text, said):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load_study(tmp_path / "wrong.yaml")
    assert "\n" not in str(error.value)


def test_a_wrong_field_of_an_arm_is_named(tmp_path):
    (tmp_path / "wrong.yaml").write_text("arms: {a: {objectiv: {preset: minirl}}}\nsettings: {s: }")
    with pytest.raises(ValueError, match="wrong: a: unknown key 'objectiv.preset'"):
        planned_runs(load_study(tmp_path / "wrong.yaml"), "wrong")


def test_code_and_config_tell_runs_apart(tmp_path):
    run = planned_runs(load_study("on_policy"), "on_policy")[0]
    others = [
        replace(run, code="other"),
        replace(run, config=replace(run.config, seed=1)),
        replace(run, config=replace(run.config, steps=7)),
        replace(run, config=load_config(None, {"rollout.ahead": 1})),
    ]
    assert len({r.folder(tmp_path) for r in [run, *others]}) == 5
    assert len(code_hash()) == 64 and code_hash() != code_hash("clipping")


def test_a_run_that_ends_in_an_error_is_kept_and_not_run_again(tmp_path):
    config = parse_config(
        RunConfig(),
        {
            "steps": 3,
            "optimizer": {"lr": 1e30, "warmup": 0},
            "batch": {"prompts": 8},
            "rollout": {"responses": 8, "max_new_tokens": 32, "probe": 0},
            "evaluation": {"samples": 1, "numerics": "train"},
            "output": {"progress": False, "samples_every": 0},
            "threads": 1,
        },
        "test",
    )
    run = PlannedRun("broken", "here", "lr", 0, config, code_hash())
    assert run_one(run, tmp_path) == "failed"
    assert state_of(run, tmp_path) == "failed" and steps_done(run, tmp_path) == 3
    before = (run.folder(tmp_path) / "metrics.jsonl").stat().st_mtime_ns
    assert run_one(run, tmp_path) == "failed"
    assert (run.folder(tmp_path) / "metrics.jsonl").stat().st_mtime_ns == before


# a value of each later field that is not its default
OTHERS = {
    "batch.resample": 1,
    "rollout.ahead": 1,
    "output.figure": False,
    "rollout.floor": 0.1,
    "objective.truncation_of": "discrepancy",
}


def test_later_fields_count_once_they_are_set():
    """At their defaults the identity is the one from before them: the hash of a config without
    them. At another value it is another run's."""
    run = planned_runs(load_study(KEPT[0]), KEPT[0])[0]
    tree, defaults = yaml.safe_load(config_yaml(run.config)), flatten(RunConfig())
    for name, default in LATER_FIELDS.items():
        assert defaults[name] == default
        section, key = name.split(".")
        del tree[section][key]
    text = yaml.safe_dump(tree, sort_keys=False)
    assert run.identity == hashlib.sha256(f"{text}\n{run.code}".encode()).hexdigest()
    assert OTHERS.keys() == LATER_FIELDS.keys()
    for name, other in OTHERS.items():
        set_one = parse_config(run.config, {name: other}, "test")
        assert replace(run, config=set_one).identity != run.identity


@pytest.mark.parametrize("name", KEPT)
def test_kept_rows_belong_to_the_registered_grid(name):
    "Each run's row has the config that the study names for it, under one code."
    table = results(name)
    rows = table[table.kind == "run"]
    registered = {(r.setting, r.arm, r.seed): r for r in planned_runs(load_study(name), name)}
    assert rows["code"].nunique() == 1 and rows["identity"].is_unique
    for row in rows.itertuples():
        run = registered[row.setting, row.arm, row.seed]
        assert replace(run, code=row.code).identity == row.identity
        assert identifying(row.config) == identifying(config_yaml(run.config))
        own = table[
            (table.setting == row.setting) & (table.arm == row.arm) & (table.seed == row.seed)
        ]
        steps = own[own.kind == "step"]["step"].tolist()
        assert steps == list(range(1, run.config.steps + 1))
    assert len(outcomes(table)) == len(rows)
    assert effects(load_study(name), table)
