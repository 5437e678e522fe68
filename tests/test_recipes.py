"""Recipes and launch files: every recipe is a run that could start, the overrides that a recipe
lists do what it says, and the launch files start what they say."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minirl_nb import benchmarks, parsing, selection, tasks, train
from minirl_nb.objective import PRESETS
from minirl_nb.plan.case import PUBLISHED
from minirl_nb.weights import TIS

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
RECIPES = sorted(train.recipes())
BIG = [n for n in RECIPES if not n.startswith(("demo", "cpu", "smollm2"))]
# a model that is made here, not published
MADE = {
    "models/smollm2_sums": dict(
        model_type="mixtral",
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=4,
        intermediate_size=384,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}
PROCESSES = {"qwen3_30b_a3b": 64, "qwen3_30b_a3b_node": 8, "olmoe_1b_7b": 8, "demo_parallel": 2}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """The config of a recipe with its model's config.json in a local folder (no weights) and an
    empty run folder."""
    monkeypatch.chdir(ROOT)

    def make(name, overrides=()):
        config = train.load_config(name, overrides)
        known = PUBLISHED | MADE
        if config.model.path in known:
            folder = tmp_path / config.model.path.split("/")[1]
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(known[config.model.path]))
            config = replace(config, model=replace(config.model, path=str(folder)))
        return replace(config, output=replace(config.output, folder=str(tmp_path / "run")))

    return make


# ------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_a_sentence_and_can_start(name, local):
    path = train.recipes()[name]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"# \S.{30,150}", lines[0]), "`minirl recipes` shows the first line"
    assert max(map(len, lines)) <= 150 and len(lines) <= 90
    train.check(local(name), PROCESSES.get(name, 1))
    tree = yaml.safe_load(path.read_text())
    assert (
        train.load_config(path)
        == train.load_config(name)
        == train.parse_config(train.RunConfig(), tree, name)
    )


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_trains_and_measures_on_is_known(name):
    config = train.load_config(name)
    for given in [config.task.name, *config.task.benchmarks.values()]:
        assert (
            given == "arithmetic"
            or given in benchmarks.SETS
            or given == selection.ProblemsConfig().output
            or (ROOT / given.partition("?")[0]).is_relative_to(ROOT / "data")
            and len(tasks.load(given).problems) > 50
        ), given
    known = [b for b in config.task.benchmarks.values() if not b.startswith("data/")]
    assert all(benchmarks.SETS[b].benchmark for b in known)
    assert (
        not benchmarks.SETS[config.task.name].benchmark
        if config.task.name in benchmarks.SETS
        else True
    )


@pytest.mark.parametrize("name", BIG)
def test_a_longest_response_fits(name):
    config = train.load_config(name)
    length = config.rollout.options.get("max_model_len")
    positions = int(length) if length else PUBLISHED[config.model.path]["max_position_embeddings"]
    assert positions <= PUBLISHED[config.model.path]["max_position_embeddings"]
    assert config.rollout.max_new_tokens + 1024 <= positions <= config.batch.tokens
    assert (
        config.model.compute == "bfloat16"
        and config.model.dtype == "float32"
        and config.model.gradient_checkpointing
    )
    assert config.steps % 8 == 0


def test_the_papers_settings():
    c = train.load_config("qwen3_30b_a3b")
    assert (c.batch.prompts, c.rollout.responses, c.batch.updates, c.rollout.max_new_tokens) == (
        64,
        16,
        1,
        32768,
    )
    assert c.batch.prompts * c.rollout.responses == 1024 and train.prompts_of(c) == (64, 64)
    o = train.objective_of(c)
    assert o == PRESETS["minirl"]
    assert (
        o.truncation == TIS(5.0)
        and (o.clip.low, o.clip.high) == (0.2, 0.27)
        and (o.advantage, o.normalizer) == ("mean", "responses")
    )
    assert (c.rollout.engine, c.rollout.fp8, c.objective.replay) == (
        "vllm",
        "fp8_per_block",
        "none",
    )
    assert (
        list(c.task.benchmarks) == ["aime24", "aime25", "hmmt25"]
        and c.evaluation.samples == 32
        and c.rollout.temperature == 1.0
    )
    default = selection.ProblemsConfig()
    assert (default.count, list(default.benchmarks), default.output) == (
        4096,
        list(c.task.benchmarks),
        c.task.name,
    )


def listed():
    "The overrides that the recipe's comments list, with what they are said to be."
    text = train.recipes()["qwen3_30b_a3b"].read_text(encoding="utf-8")
    return re.findall(r"^#   (--\S+ \S+)\s{2,}(.+)$", text, re.M)


SAID = {  # override -> (objective, replay, updates, responses of a rollout step)
    "--batch.updates 2": (PRESETS["minirl"], "none", 2, 2048),
    "--batch.updates 4": (PRESETS["minirl"], "none", 4, 4096),
    "--batch.updates 8": (PRESETS["minirl"], "none", 8, 8192),
    "--objective.preset minirl_length_norm": (
        replace(PRESETS["minirl"], normalizer="response_length"),
        "none",
        1,
        1024,
    ),
    "--objective.preset minirl_no_is": (
        replace(PRESETS["minirl"], weight="pi/old"),
        "none",
        1,
        1024,
    ),
    "--objective.replay R2": (PRESETS["minirl"], "R2", 1, 1024),
    "--objective.replay R3": (PRESETS["minirl"], "R3", 1, 1024),
    "--objective.clip False": (replace(PRESETS["minirl"], clip=None), "none", 1, 1024),
    "--objective.preset grpo": (PRESETS["grpo"], "none", 1, 1024),
    "--objective.preset cispo": (PRESETS["cispo"], "none", 1, 1024),
    **{
        f"--objective.preset {name}": (PRESETS[name], "none", 1, 1024)
        for name in ("dppo_tv", "dppo_kl", "trm", "opsm", "vespo")
    },
}


def test_the_listed_overrides_are_all_that_was_promised():
    assert [o for o, _ in listed()] == list(SAID)
    for override, words in listed():
        if "updates" in override:
            assert f"N = {override.split()[1]}" in words


@pytest.mark.parametrize("override", SAID)
def test_one_override_makes_the_experiment(override, local):
    config = local("qwen3_30b_a3b", override.split())
    objective, replay, updates, responses = SAID[override]
    assert train.objective_of(config) == objective
    assert (train.replay_of(config, True), config.batch.updates) == (replay, updates)
    assert (
        train.prompts_of(config)[0] * config.rollout.responses == responses
        and train.prompts_of(config)[1] * 16 == 1024
    )
    train.check(config, 64)
    plain = parsing.flatten(local("qwen3_30b_a3b"))
    assert [k for k, v in parsing.flatten(config).items() if v != plain[k]] == [
        override.split()[0][2:]
    ]  # nothing else changes


def test_the_ablations_of_figures_2_to_4(local):
    for n in (2, 4, 8):
        for replay in ("none", "R2", "R3"):
            for clip in ("True", "False"):
                config = local(
                    "qwen3_30b_a3b",
                    f"--batch.updates {n} --objective.replay {replay} --objective.clip {clip}".split(),
                )
                train.check(config, 64)
                assert (train.objective_of(config).clip is None) == (
                    clip == "False"
                ) and train.replay_of(config, True) == replay


def test_the_problem_command_of_the_recipe(tmp_path):
    text = train.recipes()["qwen3_30b_a3b"].read_text(encoding="utf-8")
    source, *options = re.search(r"minirl problems (.+)", text)[1].split()
    config = train.parse_config(
        selection.ProblemsConfig(), ["--source", source, *options], "recipe"
    )
    assert config == selection.ProblemsConfig()


# ------------------------------------------------------------------------------------------- launch files
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_form_of_a_launch_file(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ")
    if path.name != "env.sh":
        assert "set -euo pipefail" in lines
        assert path.stat().st_mode & stat.S_IXUSR, "not executable"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-P", str(LAUNCH), str(path)], check=True)
    else:
        subprocess.run(["bash", "-n", str(path)], check=True)


def settings_of(script):
    return re.findall(
        r"^(?:export )?([A-Z_]+)=", (LAUNCH / script).read_text(encoding="utf-8"), re.M
    )


def test_every_environment_setting_is_explained():
    lines = (LAUNCH / "env.sh").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        if line.startswith("export "):
            assert lines[i - 1].startswith(("#", "export ")), line
    assert "OMP_WAIT_POLICY" in settings_of("env.sh")


@pytest.fixture
def stubs(tmp_path):
    """A PATH on which srun, scontrol and torchrun only note how they were called (as JSON lines)."""
    folder, notes = tmp_path / "bin", tmp_path / "calls.jsonl"
    folder.mkdir()

    def add(name, body=""):
        script = folder / name
        script.write_text(
            f"#!{sys.executable}\nimport json, os, sys\nwith open({str(notes)!r}, 'a') as f:\n"
            f"    f.write(json.dumps([{name!r}, sys.argv[1:], dict(os.environ)]) + '\\n')\n{body}\n"
        )
        script.chmod(0o755)

    add("torchrun")
    add(
        "scontrol",
        "if sys.argv[1:3] == ['show', 'hostnames']: print('node07\\nnode08\\nnode09\\nnode10')",
    )
    # what a node does: srun's command, once
    add(
        "srun",
        "import subprocess\ncommand = sys.argv[1:]\nwhile command and command[0].startswith('-'): command.pop(0)\n"
        "sys.exit(subprocess.run(command).returncode)",
    )
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    for name in list(environment):
        if name.startswith(("SLURM_", "MINIRL_", "OMP_", "NCCL_", "VLLM_")) or name in (
            "PROCESSES",
            "NODES",
            "HEAD",
            "PORT",
        ):
            del environment[name]

    def calls():
        return (
            [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        )

    return environment, calls, add


def launch(script, words, environment, cwd, ok=True):
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def options(words):
    "torchrun's options, and the command behind them."
    end = words.index("--no-python")
    return dict(w.removeprefix("--").split("=", 1) for w in words[:end]), words[end + 1 :]


def test_one_node(stubs, tmp_path):
    environment, calls, _ = stubs
    launch("node.sh", ["demo_parallel", "--steps", "8"], environment | {"PROCESSES": "2"}, tmp_path)
    ((_, words, seen),) = [c for c in calls() if c[0] == "torchrun"]
    assert words[0] == "--standalone"
    given, command = options(words[1:])
    assert (
        given["nproc-per-node"] == "2"
        and given["max-restarts"] == "0"
        and given["redirects"] == "3"
        and given["tee"] == "0:3"
    )
    assert (
        command == ["minirl", "train", "demo_parallel", "--steps", "8"]
        and seen["OMP_WAIT_POLICY"] == "PASSIVE"
    )
    assert "expandable_segments" not in seen.get("PYTORCH_CUDA_ALLOC_CONF", "")
    assert "usage: node.sh RECIPE" in launch("node.sh", [], environment, tmp_path, ok=False).stderr


def test_several_nodes(stubs, tmp_path):
    environment, calls, _ = stubs
    launch(
        "nodes.sh",
        ["qwen3_30b_a3b"],
        environment | {"NODES": "8", "HEAD": "node07", "PROCESSES": "8"},
        tmp_path,
    )
    given, command = options(next(c for c in calls() if c[0] == "torchrun")[1])
    assert (
        given["nnodes"] == "8"
        and given["rdzv-backend"] == "c10d"
        and given["rdzv-endpoint"] == "node07:29400"
    )
    assert given["max-restarts"] == "0" and command == ["minirl", "train", "qwen3_30b_a3b"]
    assert (
        "HEAD"
        in launch(
            "nodes.sh", ["qwen3_30b_a3b"], environment | {"NODES": "8"}, tmp_path, ok=False
        ).stderr
    )


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[07-10]",
    "SLURM_NNODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_slurm(stubs, tmp_path):
    environment, calls, _ = stubs
    environment = environment | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    launch(
        "slurm.sbatch",
        ["qwen3_30b_a3b", "runs/first", "--batch.updates", "4"],
        environment,
        tmp_path,
    )
    srun = [c[1] for c in calls() if c[0] == "srun"]
    assert (
        len(srun) == 1
        and {"--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(srun[0])
        and "--nodes=4" in srun[0]
    )
    given, command = options(next(c for c in calls() if c[0] == "torchrun")[1])
    assert (given["nnodes"], given["nproc-per-node"], given["max-restarts"]) == ("4", "8", "0")
    assert given["rdzv-endpoint"] == "node07:29400" and given["rdzv-id"] == "4711"
    assert command == [
        "minirl",
        "train",
        "qwen3_30b_a3b",
        "--output.folder",
        "runs/first",
        "--resume",
        "--output.progress",
        "False",
        "--batch.updates",
        "4",
    ]
    assert not any(c[0] == "scontrol" and c[1][0] == "requeue" for c in calls())


def test_slurm_asks_for_a_stop_before_its_time_is_up_and_queues_again(stubs, tmp_path):
    environment, calls, add = stubs
    # a trainer that is told to stop: it waits for the file, as the real one looks for it between steps
    add(
        "srun",
        "import pathlib, signal, time\nos.kill(os.getppid(), signal.SIGUSR1)\n"
        "for _ in range(200):\n    if pathlib.Path('runs/first/stop').exists(): sys.exit(0)\n"
        "    time.sleep(0.05)\nsys.exit(3)",
    )
    (tmp_path / "runs" / "first").mkdir(parents=True)
    launch(
        "slurm.sbatch",
        ["qwen3_30b_a3b", "runs/first"],
        environment | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        tmp_path,
    )
    assert ["requeue", "4711"] in [c[1] for c in calls() if c[0] == "scontrol"]


def test_slurm_passes_an_error_on(stubs, tmp_path):
    environment, calls, add = stubs
    add("srun", "sys.exit(7)")
    environment = environment | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = launch("slurm.sbatch", ["qwen3_30b_a3b", "runs/first"], environment, tmp_path, ok=False)
    assert done.returncode == 7 and not any("requeue" in c[1] for c in calls())


def test_slurm_with_servers_on_some_nodes(stubs, tmp_path):
    environment, calls, add = stubs
    add(
        "srun",
        "import subprocess, time\ncommand = sys.argv[1:]\nwhile command[0].startswith('-'): command.pop(0)\n"
        "if command[0] == 'bash': time.sleep(60)\n"
        # the trainer waits for its servers; here until they have noted their start
        f"while open({str(tmp_path / 'calls.jsonl')!r}).read().count('servers.sh') < 1: time.sleep(0.05)\n"
        "sys.exit(subprocess.run(command).returncode)",
    )
    environment = (
        environment | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path), "SERVERS": "1", "WIDE": "4"}
    )
    launch(
        "slurm.sbatch",
        ["qwen3_30b_a3b", "runs/apart", "--batch.updates", "2"],
        environment,
        tmp_path,
    )
    servers, trainers = sorted(
        (c[1] for c in calls() if c[0] == "srun"), key=lambda words: "torchrun" in words
    )
    assert {"--nodes=1", "--nodelist=node10"} <= set(servers) and {
        "--nodes=3",
        "--nodelist=node07,node08,node09",
    } <= set(trainers)
    words = servers[servers.index("qwen3_30b_a3b") + 1 :]
    assert words == ["8100", "2", "--rollout.tensor_parallel", "4", "--batch.updates", "2"]
    given, command = options(next(c for c in calls() if c[0] == "torchrun")[1])
    assert given["nnodes"] == "3" and given["rdzv-endpoint"] == "node07:29400"
    config = train.load_config(command[2], command[3:])
    assert (
        config.rollout.servers == ("http://node10:8100", "http://node10:8101")
        and config.resume
        and config.batch.updates == 2
    )
    assert config.rollout.transfer_folder == str(tmp_path / "runs" / "apart.weights")
    none = launch(
        "slurm.sbatch",
        ["qwen3_30b_a3b", "runs/apart"],
        environment | {"SERVERS": "4"},
        tmp_path,
        ok=False,
    )
    assert "none is left to train" in none.stderr


@pytest.mark.vllm
def test_servers_of_a_node(stubs, tmp_path, local):
    """The commands come from the library; a server that ends takes the others with it."""
    pytest.importorskip("vllm")
    environment, calls, add = stubs
    add("vllm", "import time\ntime.sleep(2 if '8101' in sys.argv else 120)\nsys.exit(5)")
    add(
        "python",
        f"if sys.argv[1] == '-': os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        "import time\ntime.sleep(2 if '8101' in sys.argv else 120)\nsys.exit(5)",
    )
    folder = local("qwen3_30b_a3b").model.path
    words = ["qwen3_30b_a3b", "8100", "3", "--model.path", folder, "--rollout.tensor_parallel", "2"]
    done = subprocess.run(
        ["bash", str(LAUNCH / "servers.sh"), *words],
        env=environment | {"ADDRESS": "node10"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 5 and "a server has ended (status 5)" in done.stderr, (
        done.stdout + done.stderr
    )
    servers = [c for c in calls() if "--port" in c[1]]
    assert sorted(c[1][c[1].index("--port") + 1] for c in servers) == ["8100", "8101", "8102"]
    for _, argv, seen in servers:
        first = 2 * (int(argv[argv.index("--port") + 1]) - 8100)
        assert (
            seen["CUDA_VISIBLE_DEVICES"] == f"{first},{first + 1}"
            and seen["VLLM_SERVER_DEV_MODE"] == "1"
        )
        assert (
            argv[argv.index("--host") + 1] == "node10"
            and argv[argv.index("--max-model-len") + 1] == "36864"
        )
        assert (
            argv[argv.index("--tensor-parallel-size") + 1] == "2"
            and "--enable-return-routed-experts" in argv
        )
    assert (tmp_path / "logs" / "servers-node10" / "8100.log").exists()
    assert (
        "usage: servers.sh RECIPE PORT COUNT"
        in launch("servers.sh", [], environment, tmp_path, ok=False).stderr
    )


@pytest.mark.slow
def test_one_node_for_real(tmp_path):
    "Two processes on this CPU, through the launch file, with a run of a few steps."
    pytest.importorskip("minirl_nb.parallel")
    if not shutil.which("torchrun") or not shutil.which("minirl"):
        pytest.skip("torchrun and minirl are not on PATH")
    environment = os.environ | {"PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    words = [
        "demo_parallel",
        "--steps",
        "4",
        "--batch.prompts",
        "4",
        "--rollout.responses",
        "4",
        "--evaluation.samples",
        "1",
        "--output.folder",
        str(tmp_path / "run"),
        "--output.checkpoint_every",
        "0",
        "--output.progress",
        "False",
    ]
    done = subprocess.run(
        ["bash", str(LAUNCH / "node.sh"), *words],
        env=environment | {"LOGS": str(tmp_path / "logs")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len({s["step"] for s in steps if "step" in s}) >= 4
    assert len(list((tmp_path / "logs").rglob("stdout.log"))) == 2, "a log a process"
    assert tasks.load("arithmetic").problems
