"""Runs on several gloo processes against a run on one. `parallel_worker.py` is what each process
runs.

Sums over ranks are taken in another order than sums over rows: u = 2^-24 = 6e-8 a rounding in
float32. Losses, gradient norms and the weights as one vector are sums of thousands of such terms,
so a step adds up to about 14 u to them, and 8 steps add 8 x 14 u = 7e-6: the bound is 1e-5. AdamW divides by
the root of a mean square: an entry whose gradient is itself a rounding moves by up to the learning
rate whatever its size, so a tensor of small gradients is held to 30 times that. Measured over all
cases: 1.3e-6, 5e-6, 4e-6, and 5e-5 for the worst tensor.

Processes are dear: each imports torch and transformers. So the cases of one number of processes
share a launch, what runs on one process runs in this one, and commands that must fail are forks of
processes that have imported everything."""

import atexit
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from parallel_worker import run_case
from safetensors.torch import load_file
from small_runs import free_port

from minirl_nb import batch, checkpoint, parallel, tasks, train
from minirl_nb.cli import main
from minirl_nb.rollout import Sampling, TorchEngine

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "parallel_worker.py"
BOUND = 1e-5  # of losses, gradient norms and all weights: see above
PROMPTS, RESPONSES, STEPS = 6, 8, 8
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
ENVIRONMENT = {
    k: v
    for k, v in ENVIRONMENT.items()
    if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
}


# torchrun leaves a folder of logs in the temporary folder; conftest.py takes this one away
LOGS = tempfile.mkdtemp(prefix="pytest-of-torchrun-")
atexit.register(shutil.rmtree, LOGS, ignore_errors=True)


def start(processes, *command):
    "A command under torchrun."
    options = f"--nproc-per-node {processes} --max-restarts 0 --rdzv-backend c10d"
    options += " --rdzv-endpoint localhost:0"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options.split(), *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT | {"TMPDIR": LOGS},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def work(processes, cases, folder):
    "Run the cases one after the other: in this process, or in so many."
    if processes == 1:
        before = Path.cwd()
        os.chdir(ROOT)
        try:
            for case in cases:
                run_case(case)
        finally:
            os.chdir(before)
        return
    (folder / f"cases{processes}.json").write_text(json.dumps(cases))
    p = start(processes, WORKER, folder / f"cases{processes}.json")
    out, _ = p.communicate(timeout=900)
    assert p.returncode == 0, out[-4000:]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "Rollouts by the FP8 engine, for N = 1 and N = 4, in files, and the config that goes with them."
    from transformers import AutoModelForCausalLM

    folder, task = tmp_path_factory.mktemp("given"), tasks.load("arithmetic")
    engine = TorchEngine(
        AutoModelForCausalLM.from_pretrained(ROOT / "data/coldstart"),
        fp8="fp8_per_channel",
        routes=True,
        eos_token_id=task.tokenizer.eos_token_id,
        pad_token_id=task.tokenizer.pad_token_id,
    )
    order = torch.randperm(
        len(task.problems), generator=torch.Generator().manual_seed(train.seed_of(0, "order", 0))
    )
    for updates in (1, 4):
        n = PROMPTS * updates
        for k in range(STEPS // updates):
            prompts = [task.encode(task.problems[i]) for i in order[k * n : (k + 1) * n].tolist()]
            batch.save(
                engine.generate(prompts, Sampling(RESPONSES, 1.0, 24, seed=k)),
                folder / f"N{updates}" / str(k),
            )
    base = {
        "model.path": "data/coldstart",
        "rollout.fp8": "fp8_per_channel",
        "rollout.max_new_tokens": 24,
        "rollout.probe": 0,
        "batch.prompts": PROMPTS,
        "rollout.responses": RESPONSES,
        "steps": STEPS,
        "threads": 1,
        "batch.tokens": 512,
        "output.monitor": 8,
        "output.progress": False,
        "output.figure": False,
    }

    def case(name, updates=1, replay="R3", share="balanced", config=(), **more):
        config = (
            base
            | {
                "batch.updates": updates,
                "objective.replay": replay,
                "output.folder": str(folder / name),
            }
            | dict(config)
        )
        return {"config": config, "rollouts": str(folder / f"N{updates}"), "share": share, **more}

    case.folder = folder
    return case


SETTINGS = [(n, r) for n in (1, 4) for r in ("none", "R2", "R3")]
REPLICAS, APART = {"parallel.shard": 1}, {"parallel.expert": 2}
CHECKPOINTED = {"model.gradient_checkpointing": True}
SHARED = {
    "balanced-N4-R3": (4, "R3", dict()),
    "cut-N1-R2": (1, "R2", dict(share="cut")),  # groups split 2 to 5
    "onerank-N4-R2": (4, "R2", dict(share="one rank")),  # rank 1 computes padding only
    "experts-N4-R3": (4, "R3", dict(config=APART)),
    "replicas-N4-R3": (4, "R3", dict(config=REPLICAS, share="cut")),
}
SHARED_SLOW = {
    **{f"balanced-N{n}-{r}": (n, r, dict()) for n, r in SETTINGS if (n, r) != (4, "R3")},
    "cut-N4-R3": (4, "R3", dict(share="cut")),
    "onerank-N1-R3": (1, "R3", dict(share="one rank")),
    "onerow-N1-R3": (1, "R3", dict(share="one row")),
    "experts-N1-R2": (1, "R2", dict(config=APART)),
    "checkpointed-N1-R3": (1, "R3", dict(config=CHECKPOINTED)),
    "replicas-N1-R2": (1, "R2", dict(config=REPLICAS)),
    "replicas-onerank-N4-R3": (4, "R3", dict(config=REPLICAS, share="one rank")),
    "replicas-checkpointed-N1-R3": (1, "R3", dict(config=REPLICAS | CHECKPOINTED)),
}


# five steps of 6 prompts and at most 3 further ones use up the 48 that are given
RESAMPLED = {"batch.resample": 3, "steps": 5}
RESUMED = {"one": 1, "two": 2}  # a run's name: the processes it goes on with; "four" is slow


@pytest.fixture(scope="module")
def alone(given):
    "A function that makes the runs on one process that others are compared with, each once."

    def make(settings):
        wanted = [(f"alone-N{n}-{r}", n, r) for n, r in settings]
        work(1, [given(*w) for w in wanted if not (given.folder / w[0]).exists()], given.folder)

    return make


@pytest.fixture(scope="module")
def compared(given, alone, silent):
    """The runs of this file's quicker comparisons. First alone, then on two processes, then again
    alone what was begun on two."""
    alone(sorted({(n, r) for n, r, _ in SHARED.values()}))
    resampling = [given(f"resampled-{k}", 1, "R3", config=RESAMPLED) for k in ("alone", "pair")]
    work(1, resampling[:1], given.folder)
    pairs = [given(name, n, r, **more) for name, (n, r, more) in SHARED.items()]
    begun = [given(f"resumed-{k}", 4, "R3", stop=4, checkpoint=True) for k in RESUMED]
    one, two = (given(f"resumed-{k}", 4, "R3", config={"resume": True}) for k in RESUMED)
    work(2, [*pairs, resampling[1], *begun, two], given.folder)
    work(1, [one], given.folder)
    return given.folder


@pytest.fixture(scope="module")
def compared_slowly(given, alone):
    "The other runs: what was begun on two processes goes on on four, with two copies."

    def from_one(config=(), **more):
        return given("from-one", 1, "R2", config=config, **more)

    alone(SETTINGS)
    work(1, [from_one(stop=2, checkpoint=True)], given.folder)
    pairs = [given(name, n, r, **more) for name, (n, r, more) in SHARED_SLOW.items()]
    begun = given("resumed-four", 4, "R3", stop=4, checkpoint=True)
    replicas, apart = {"resume": True} | REPLICAS, {"resume": True} | APART
    spread = [
        from_one(config, stop=stop, checkpoint=True)
        for config, stop in ((replicas, 4), (apart, 5), (replicas, 7))
    ]
    work(2, [*pairs, begun, *spread], given.folder)
    work(1, [from_one({"resume": True})], given.folder)
    copies = {"resume": True, "parallel.shard": 2}
    work(4, [given("resumed-four", 4, "R3", config=copies)], given.folder)
    return given.folder


def steps(folder):
    return [
        r
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if (r := json.loads(line))["kind"] == "step"
    ]


def assert_equal_runs(a, b, count=STEPS):
    for x, y in zip(steps(a), steps(b), strict=True):
        assert x["step"] == y["step"]
        for key in ("loss", "grad_norm"):
            assert y[key] == pytest.approx(x[key], rel=BOUND, abs=1e-9), (x["step"], key)
        for key in ("reward", "response_length", "equal_groups", "cut", "lr"):
            assert x[key] == pytest.approx(y[key], rel=1e-6), key
        for key in ("entropy", "k3", "weight/max", "clip_high", "clip_low"):
            assert y[key] == pytest.approx(x[key], rel=1e-3, abs=1e-6), key
    assert len(steps(a)) == count
    a, b = load_file(a / "final.safetensors"), load_file(b / "final.safetensors")
    assert a.keys() == b.keys()
    gap = {k: float((a[k] - b[k]).double().norm()) for k in a}
    size = {k: float(a[k].double().norm()) for k in a}

    def total(d):
        return sum(v**2 for v in d.values()) ** 0.5

    assert total(gap) <= BOUND * total(size)
    for k in a:
        assert gap[k] <= 30 * BOUND * size[k], k


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(name, compared):
    n, r, _ = SHARED[name]
    assert_equal_runs(compared / f"alone-N{n}-{r}", compared / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_SLOW)
def test_two_processes_are_one_in_every_setting(name, compared_slowly):
    n, r, _ = SHARED_SLOW[name]
    assert_equal_runs(compared_slowly / f"alone-N{n}-{r}", compared_slowly / name)


def test_two_processes_replace_the_prompts_that_one_replaces(compared):
    """The ranks share further prompts, of which there may be fewer than ranks."""
    alone, pair = (compared / f"resampled-{k}" for k in ("alone", "pair"))
    assert_equal_runs(alone, pair, RESAMPLED["steps"])
    further = set()
    for a, b in zip(steps(alone), steps(pair)):
        keys = [key for key in a if key.startswith("resample/")]
        assert len(keys) == 4 and {k: a[k] for k in keys} == {k: b[k] for k in keys}
        further.add(a["resample/further"])
    assert max(further) > 0


def test_a_comparison_would_notice(compared):
    """Runs that differ in the replay alone are further apart than the bound: the comparison above
    can fail."""
    with pytest.raises(AssertionError):
        assert_equal_runs(compared / "alone-N4-R2", compared / "balanced-N4-R3")


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_other_numbers_of_processes(name, compared):
    """Stopped at 4 of 8 steps on two processes, while weights change under the writer's hands;
    resumed on one and on two."""
    assert (compared / f"resumed-{name}/checkpoints/step_000004/shards").is_dir()
    assert_equal_runs(compared / "alone-N4-R3", compared / f"resumed-{name}")


@pytest.mark.slow
def test_resumed_on_four_processes(compared_slowly):
    assert (compared_slowly / "resumed-four/checkpoints/step_000004/shards").is_dir()
    assert_equal_runs(compared_slowly / "alone-N4-R3", compared_slowly / "resumed-four")


@pytest.mark.slow
def test_resumed_as_replicas_with_experts_apart_and_on_one_process(compared_slowly):
    """Two steps on one process, two on two replicas, one with experts apart, two on replicas, one
    on one."""
    assert_equal_runs(compared_slowly / "alone-N1-R2", compared_slowly / "from-one")


# ------------------------------------------------------------------------------------------ failures
def run_to_its_end(processes, cases, folder, limit=60):
    """What was printed, and seconds from the moment of the failure (a file that the failing rank
    leaves) to the end of all."""
    (folder / "failing.json").write_text(json.dumps(cases))
    p = start(processes, WORKER, folder / "failing.json")
    out, _ = p.communicate(timeout=300)
    ended = time.time()
    return p.returncode, out, ended - (folder / "failed").stat().st_mtime


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all_with_that_error(rank, given):
    code, out, seconds = run_to_its_end(
        2, [given(f"fails-{rank}", 1, "R3", fail=[rank, 2])], given.folder
    )
    assert code != 0 and seconds < 60
    assert out.count("gradient step 2: made to fail") == 1, out[-3000:]
    assert "onnection closed" not in out  # the other rank's echo is not what a user reads


def test_a_killed_rank_ends_all(given):
    code, out, seconds = run_to_its_end(2, [given("killed", 1, "R3", kill=[1, 2])], given.folder)
    assert code != 0 and seconds < 60 and re.search(r"rank\s*:\s*1", out) and "SIGKILL" in out


@pytest.fixture(scope="module")
def silent(given):
    """Two launchers, as on two machines. Rank 1 freezes with its connections open, so that neither
    a launcher nor gloo sees anything. It takes half a minute of waiting to find out: started
    early, asked for late. In the end: rank 0's exit status, what it printed, seconds since the
    freezing."""
    folder = given.folder.parent / f"{given.folder.name}-silent"
    folder.mkdir()
    (folder / "cases.json").write_text(
        json.dumps([given("silent", 1, "R3", freeze=[1, 2], failed=str(folder / "failed"))])
    )
    port, processes = free_port(), []
    for rank in range(2):
        env = ENVIRONMENT | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), str(folder / "cases.json")],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def wait():
        out, _ = processes[0].communicate(timeout=300)
        return processes[0].returncode, out, time.time() - (folder / "failed").stat().st_mtime

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(wait)
        for p in processes:
            p.kill()
            p.wait()


def test_the_guard_ends_a_rank_that_nobody_else_would(silent):
    """Rank 0, in a collective that would wait for half an hour, ends because rank 1 has fallen
    silent, and says so."""
    code, out, seconds = silent.result()
    assert seconds < 60
    assert code != 0 and "rank 1 has not been heard of for 30 s" in out, out[-3000:]


# ------------------------------------------------------------------------------------------ the command
def minirl(processes, folder, *words):
    "`minirl train`, here or on two processes: exit status and what it printed."
    words = ["train", "--output.folder", str(folder), *words]
    if processes == 1:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.chdir(ROOT):
            return main(words), said.getvalue()
    p = start(processes, "--no-python", Path(sys.executable).with_name("minirl"), *words)
    out, _ = p.communicate(timeout=600)
    return p.returncode, out


def test_the_command_under_torchrun(tmp_path):
    """`minirl train` whole, packed, with evaluations, probe, samples and checkpoints. A rollout
    step has one prompt, so rank 0 samples nothing. The same metrics, one report; and its checkpoint
    exported is the model of one process."""
    words = [
        "--model.path",
        "data/coldstart",
        "--rollout.max_new_tokens",
        "20",
        "--rollout.responses",
        "8",
        "--batch.prompts",
        "1",
        "--steps",
        "3",
        "--objective.replay",
        "R2",
        "--evaluation.samples",
        "1",
        "--batch.packed",
        "True",
        "--output.samples_every",
        "2",
        "--output.progress",
        "False",
        "--threads",
        "1",
    ]
    for n in (1, 2):
        code, out = minirl(n, tmp_path / str(n), *words)
        assert code == 0 and out.count("gradient steps in") == 1, out[-3000:]
    one, two = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "12"
    )
    assert [r["kind"] for r in one] == [r["kind"] for r in two]
    for a, b in zip(one, two):
        for k in a:
            if k in ("loss", "grad_norm", "reward", "entropy", "response_length") or k.startswith(
                "accuracy/"
            ):
                assert b[k] == pytest.approx(a[k], rel=1e-5, abs=1e-7), k
    assert any(
        r["equal_groups"] < 1 for r in one if r["kind"] == "step"
    )  # something was learnt from
    assert {p.name for p in (tmp_path / "1").iterdir()} == {
        p.name for p in (tmp_path / "2").iterdir()
    }
    exported = checkpoint.export(tmp_path / "2", tmp_path / "out", dtype="same")
    a = load_file(tmp_path / "1/checkpoints/step_000003/model.safetensors")
    b = load_file(exported / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)
    with pytest.raises(FileExistsError):
        checkpoint.export(tmp_path / "2", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        checkpoint.export(tmp_path / "nowhere", tmp_path / "new")


BAD = {
    "does not divide the 1 processes of parallel.shard": "--parallel.expert 2 --parallel.shard 1",
    "torch finds no GPU": "--model.device cuda",
    "parallel.offload keeps parameters in host memory": "--parallel.offload True",
    "2 processes do not divide the 9 responses": "--batch.prompts 3 --rollout.responses 3",
    "does not fit on 2 x cpu": "",  # the 30B model, on this machine
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """`minirl train` on two processes with each of BAD, in a folder of models that have a config
    and no weights: reading them would fail. For each command: exit statuses, and the lines said."""
    from minirl_nb.plan import model_config

    folder = tmp_path_factory.mktemp("refused")
    (folder / "small").mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / "small" / name).write_text((ROOT / "data/coldstart" / name).read_text())
    model_config("Qwen/Qwen3-30B-A3B").save_pretrained(folder / "large")
    # each command has a store of its own, which outlives its processes, as a launcher's does
    stores = [torch.distributed.TCPStore("localhost", 0, is_master=True) for _ in BAD]
    commands = []
    for i, (words, store) in enumerate(zip(BAD.values(), stores)):
        model = folder / ("small" if words else "large")
        where = f"train --output.folder {folder / str(i)} --model.path {model}"
        commands.append({"words": [*where.split(), *words.split()], "port": store.port})
    (folder / "commands.json").write_text(json.dumps(commands))
    p = start(2, WORKER, "commands", folder / "commands.json")
    out, _ = p.communicate(timeout=600)
    assert p.returncode == 0, out[-3000:]
    assert not any((folder / str(i)).exists() for i in range(len(BAD)))  # no run has begun
    found = []
    for i in range(len(BAD)):
        ranks = [json.loads((folder / f"said-{i}-{rank}.json").read_text()) for rank in (0, 1)]
        text = "".join(said for _, said in ranks)
        found.append(([status for status, _ in ranks], text))
    return dict(zip(BAD, found))


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_launch_ends_before_weights_in_one_sentence(sentence, refused):
    "Two processes find it out; one sentence is said."
    statuses, out = refused[sentence]
    said = [line for line in out.splitlines() if line.startswith("minirl:")]
    assert all(statuses) and len(said) == 1 and sentence in said[0], out[-3000:]


def test_a_model_that_does_not_fit_is_refused_with_what_helps(refused):
    _, out = refused["does not fit on 2 x cpu"]
    assert "set model.gradient_checkpointing" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    config = train.load_config(None, {"model.device": "cuda"})
    with pytest.raises(ValueError, match="no GPU"):
        parallel.device_of(config, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel.dist, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="NCCL"):
        parallel.device_of(config, 0)
    monkeypatch.setattr(parallel.dist, "is_nccl_available", lambda: True)
    with pytest.raises(ValueError, match="3 processes on a machine with 2 GPUs"):
        parallel.device_of(config, 2)
    assert parallel.device_of(config, 1) == torch.device("cuda", 1)


def test_layout_says_what_transformers_is_told(monkeypatch):
    config = train.load_config(
        None,
        {
            "parallel.shard": 8,
            "parallel.expert": 4,
            "model.compute": "bfloat16",
            "parallel.offload": True,
        },
    )
    d = parallel.layout(config, 16)
    assert (
        d.fsdp_size,
        d.dp_replicate_size,
        d.ep_size,
        d.fsdp_mixed_precision,
        d.fsdp_cpu_offload,
    ) == (8, 2, 4, True, True)
    assert parallel.layout(config, 1) is None


# ------------------------------------------------------------------------------------------ parts
def test_rows_are_shared_out_in_each_mini_batch_evenly():
    g = torch.Generator().manual_seed(0)
    length, part = (torch.rand(512, generator=g) ** 3 * 30000).long() + 10, torch.arange(512) % 4
    to = parallel.assign_rows(length, part, 16)
    for i in range(4):
        load = torch.zeros(16, dtype=torch.long).index_add_(0, to[part == i], length[part == i])
        best = max(int(length[part == i].max()), -(-int(length[part == i].sum()) // 16))
        assert load.max() <= 4 / 3 * best
    assert torch.equal(to, parallel.assign_rows(length, part, 16))
    assert (
        parallel.assign_rows(torch.tensor([5, 5]), torch.tensor([0, 0]), 4).unique().numel() == 2
    )  # fewer rows than ranks
