"""The plan: phases that add up, what does not fit and what helps, refusals, and the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from plan_models import THIN, small

from minirl_nb import plan
from minirl_nb.cli import main
from minirl_nb.config import load_config
from minirl_nb.plan import Assumptions, Cluster, GiB, Plan, refuse, shape
from minirl_nb.plan.step import fake_processes

BIG = {
    "model.path": "Qwen/Qwen3-30B-A3B",
    "model.compute": "bfloat16",
    "model.gradient_checkpointing": True,
    "parallel.expert": 8,
    "rollout.engine": "vllm",
    "rollout.fp8": "fp8_per_block",
    "rollout.max_new_tokens": 32768,
    "rollout.responses": 16,
    "batch.prompts": 64,
    "batch.tokens": 32768,
    "rollout.max_batch": 64,
    "evaluation.numerics": "rollout",
    "steps": 1200,
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    THIN.save_pretrained(folder)
    return str(folder)


def test_all_phases_add_up_and_say_so(mixture):
    found = plan.plan(small(mixture), Cluster.of("h100", 8))
    assert (
        isinstance(found, Plan)
        and found.fits
        and [p.name for p in found.phases] == ["rollout", "recompute", "update", "transfer"]
    )
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["seconds"] == pytest.approx(sum(p["time"] for p in numbers["phases"]))
    assert numbers["gpu hours a gradient step"] == pytest.approx(numbers["seconds"] * 8 / 3600)
    assert numbers["route bytes a token"] == 3 * 2
    text = found.report()
    for word in (
        "weights",
        "activations",
        "KV cache",
        "optimiser",
        "GPU hours",
        "largest micro-batch",
        "8 x h100",
    ):
        assert word in text, word


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_the_largest_micro_batch_is_the_largest(mixture, offload):
    cluster = replace(Cluster.of("h100", 8), memory=6 * GiB)
    found = plan.plan(small(mixture, **{"parallel.offload": offload}), cluster)
    most = int(found.numbers["largest micro-batch"])

    def needed(width):
        row = {"batch.tokens": width, "rollout.max_new_tokens": width - 200}
        config = small(mixture, **row, **{"parallel.offload": offload})
        return plan.plan(config, cluster, search=False).phase("update").total

    assert most > 4096 and needed(most) <= cluster.memory < needed(int(1.05 * most))


def test_what_does_not_fit_is_said_with_the_knob_that_helps(mixture):
    tight = replace(Cluster.of("h100", 8), memory=6 * GiB)
    found = plan.plan(small(mixture, **{"batch.tokens": 10**6}), tight, search=False)
    assert not found.fits and any(
        "activations" in w and "lower batch.tokens" in w for w in found.warnings
    )
    found = plan.plan(
        small(mixture, **{"batch.tokens": 2**18, "model.gradient_checkpointing": False}),
        tight,
        search=False,
    )
    assert any("gradient_checkpointing to True" in w for w in found.warnings)
    reserved = Assumptions().context + Assumptions().workspace
    config = small(mixture, **{"rollout.max_new_tokens": 4000})
    cache = plan.plan(config, replace(Cluster.of("h100", 8), memory=reserved + 2**21), search=False)
    assert not cache.fits and any(
        "room for" in w and "rollout.tensor_parallel" in w for w in cache.warnings
    )


def test_offload_moves_states_to_the_host(mixture):
    a, b = (
        plan.plan(small(mixture, **{"parallel.offload": o}), Cluster.of("h100", 8), search=False)
        for o in (False, True)
    )
    least = 8 * 16 * shape(THIN).parameters / 8
    assert (
        a.host["states"] == 0 and least <= b.host["states"] < 1.5 * least
    )  # with one temporary of AdamW for all parameters
    assert (
        b.phase("update").total < a.phase("update").total
        and "weights" not in b.phase("update").memory
    )


def test_larger_global_batches_and_shorter_responses_are_cheaper(mixture):
    def cost(mean=0.4, **changes):
        assume, config = Assumptions(mean_length=mean), small(mixture, **changes)
        found = plan.plan(config, Cluster.of("h100", 8), assume, search=False)
        return found.numbers["gpu hours a gradient step"]

    assert cost(**{"batch.updates": 8}) < cost()
    assert cost(0.1) < cost(0.4)


def test_a_lower_bound_never_refuses_what_the_plan_lets_pass(mixture):
    config = small(mixture)
    for memory in (0.01, 0.1, 1.0, 1.6, 3.0, 5.0, 6.0, 20.0):
        cluster = replace(Cluster.of("h100", 8), memory=memory * GiB)
        said = refuse(config, cluster)
        if said:
            assert not plan.plan(config, cluster, search=False).fits, (memory, said)
        else:
            assert memory > 1
    assert refuse(config, Cluster.of("h100", 8)) is None


def test_a_launch_asks_about_this_machine(mixture, monkeypatch):
    asked = []

    def here(cls, processes=None):
        asked.append(processes)
        return replace(Cluster.of("h100", processes), memory=2**20)

    monkeypatch.setattr(Cluster, "here", classmethod(here))
    said = plan.refuse_if_too_large(small(mixture), 4)
    assert asked == [4] and "does not fit on 4 x h100" in said and "\n" not in said


def test_refusals_of_the_30b_model_are_one_sentence_with_the_largest_term():
    config = load_config(None, BIG)
    said = refuse(config, Cluster.of("a100-40", 8))
    assert (
        "optimiser states" in said
        and "parallel.offload" in said
        and "\n" not in said
        and said.count(". ") == 0
    )
    assert refuse(config, Cluster.of("h100", 64)) is None
    hours = load_config(
        None, BIG | {"model.gradient_checkpointing": False, "rollout.max_new_tokens": 40000}
    )
    assert "activations" in refuse(
        hours, Cluster.of("h100", 64)
    ) and "gradient_checkpointing" in refuse(hours, Cluster.of("h100", 64))
    offload = load_config(None, BIG | {"parallel.offload": True})
    assert "host memory" in refuse(offload, replace(Cluster.of("h100", 8), host=400 * GiB))


def test_bad_layouts_end_in_one_sentence(mixture):
    for over, word in (
        ({"parallel.expert": 3}, "parallel.expert is 3"),
        ({"parallel.shard": 3}, "parallel.shard is 3"),
        ({"rollout.tensor_parallel": 3}, "rollout.tensor_parallel is 3"),
        ({"parallel.expert": 8, "parallel.shard": 4}, "parallel.expert"),
    ):
        with pytest.raises(ValueError, match=word):
            plan.plan(small(mixture, **over), Cluster.of("h100", 8))


def test_a_plan_leaves_no_processes_behind(mixture):
    import torch.distributed as dist

    plan.plan(small(mixture, **{"batch.tokens": 2000}), Cluster.of("h100", 4), search=False)
    assert not dist.is_initialized()
    with fake_processes(2):
        with pytest.raises(RuntimeError, match="before torch.distributed is started"):
            plan.plan(small(mixture), Cluster.of("h100", 8), search=False)
    assert not dist.is_initialized()


# ----------------------------------------------------------------------- the limits of the command
WATCHED = """
import json, resource, sys
from minirl_nb.cli import main
status = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime
print(json.dumps({"status": status, "cpu": cpu, "rss": used.ru_maxrss * 1024}))
"""


def within_limits(*words):
    """Processor seconds instead of seconds, because the test must not depend on what else the
    machine does; a plan is one thread's work. The limits: two minutes and 8 GB."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *text, last = done.stdout.strip().splitlines()
    used, found = json.loads(last), json.loads("\n".join(text))
    assert used["status"] == 0 and used["cpu"] <= 120 and used["rss"] <= 8e9, used
    return found


def test_the_papers_run_on_64_gpus_is_planned_in_time_and_fits():
    found = within_limits("plan", "qwen3_30b_a3b", "--gpus", "64", "--gpu", "h100", "--json")
    assert found["fits"] and found["route bytes a token"] == 384 and found["responses"] == 1024
    assert found["phases"][2]["memory"]["weights"] == pytest.approx(
        4 * 30_532_122_624 / 64, rel=1e-3
    )
    assert found["phases"][2]["memory"]["optimiser"] == pytest.approx(
        8 * 30_532_122_624 / 64, rel=1e-3
    )
    assert found["phases"][3]["moved"]["weight sync"] == pytest.approx(
        2 * 30_532_122_624 * 63 / 64, rel=1e-3
    )


# ------------------------------------------------------------------------------------- the command
def test_the_command_prints_a_table_or_numbers(mixture, capsys):
    words = [
        "plan",
        "--model.path",
        mixture,
        "--rollout.engine",
        "vllm",
        "--gpus",
        "8",
        "--gpu",
        "h200",
        "--gpus_per_node=4",
        "--assume.mean_length",
        "0.3",
    ]
    assert main(words) == 0
    assert "8 x h200 (2 nodes)" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["gpus_per_node"] == 4 and found["assumptions"]["mean_length"] == 0.3


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "h1000"], "known are"),
        (["--gpus", "many"], "gpus cannot be 'many'"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus"], "--gpus needs a value"),
        (["--gpus", "8", "--assume.mean_lenght", "0.3"], "did you mean 'assume.mean_length'"),
        (["nothing"], "there is no recipe nothing"),
        (["demo", "--gpus", "6", "--parallel.shard", "4"], "does not divide the 6"),
        (["demo", "--model.path", "data/nothing"], "there is no folder"),
    ],
)
def test_mistakes_are_one_sentence_and_status_two(words, said, capsys):
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("minirl: ")


def test_a_run_that_cannot_fit_ends_before_weights_are_loaded(
    mixture, tmp_path, monkeypatch, capsys
):
    """The folder has a config and no weights: whoever looked for them would say so."""
    monkeypatch.setattr(
        Cluster,
        "here",
        classmethod(lambda cls, processes=None: replace(Cluster.of("h100", 1), memory=2**20)),
    )
    assert (
        main(
            [
                "train",
                "demo",
                "--model.path",
                mixture,
                "--output.folder",
                str(tmp_path / "run"),
                "--output.progress",
                "False",
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert "does not fit on 1 x h100" in err and "optimiser states" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_names_gpus_and_assumptions(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--gpu" in text and "--assume.mean-length" in text
