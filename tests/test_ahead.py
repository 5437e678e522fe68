"""One step off: a second process samples, with the same bits; its faults, its end, its checkpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_qwen3_moe
from small_runs import PowerCut, free_port, metrics, power_cut, small
from transformers import AutoModelForCausalLM

from minirl_nb import run, train
from minirl_nb.ahead import Ahead, EngineProcess, SamplerError
from minirl_nb.batch import load, save
from minirl_nb.checkpoint import checkpoints, read_ahead
from minirl_nb.checks import changes_of, check
from minirl_nb.config import config_yaml, load_config
from minirl_nb.parity import ParityError, compare_weights
from minirl_nb.plan import _step_seconds
from minirl_nb.rollout import Sampling, TorchEngine
from minirl_nb.vllm.served import ServedEngine
from minirl_nb.vllm.server import Server
from minirl_nb.world import World

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
SAMPLING = Sampling(n=3, max_new_tokens=12, seed=5)


def one_ahead(folder, model, **changes):
    "Four rollout steps of two updates, one step off; few responses."
    shorter = {"rollout.responses": 2, "rollout.max_new_tokens": 12, "evaluation.every": 0}
    shorter |= {"evaluation.numerics": "train", "rollout.ahead": 1}
    return small(folder, model, **(shorter | changes))


def children():
    "Numbers of the processes that this one has started."
    said = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    return [x.split()[0] for x in said.stdout.splitlines() if "minirl_nb.ahead" in x]


def until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def assert_equal(a, b):
    for name in ("tokens", "logp_mu", "length", "group", "routes", "routes_valid", "finished"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.policy_version == b.policy_version


# ---------------------------------------------------------------------------------- the process
@pytest.mark.parametrize("tied, fp8", [(False, None), (True, "fp8_per_block")])
def test_the_process_samples_the_bits_of_the_engine(tied, fp8):
    model = tiny_qwen3_moe(tie_word_embeddings=tied)
    here = TorchEngine(model, fp8=fp8, routes=True)
    process_engine = EngineProcess(model, fp8=fp8, routes=True)
    try:
        assert_equal(here.generate(PROMPTS, SAMPLING), process_engine.generate(PROMPTS, SAMPLING))
        other = dict(tiny_qwen3_moe(1, tie_word_embeddings=tied).named_parameters())
        for engine in (here, process_engine):
            engine.load(other, 3)
        rollout = process_engine.generate(PROMPTS, SAMPLING)
        assert_equal(here.generate(PROMPTS, SAMPLING), rollout)
        assert torch.equal(here.score(rollout), process_engine.score(rollout))
        assert len(process_engine.generate([], SAMPLING)) == 0
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            process_engine.generate([[1], []], SAMPLING)
        assert_equal(
            rollout, process_engine.generate(PROMPTS, SAMPLING)
        )  # an error is answered, no end
    finally:
        process_engine.close()
    assert not children()
    with pytest.raises(SamplerError, match="was closed"):
        process_engine.generate(PROMPTS, SAMPLING)


def test_what_cannot_be_shared_is_said(moe):
    with pytest.raises(ValueError, match="on the CPU.*it is on meta|model is on meta"):
        EngineProcess(tiny_qwen3_moe().to("meta"))
    with pytest.raises(ValueError, match="rollout.transfer_folder: /nowhere has no room"):
        EngineProcess(moe, folder="/nowhere")
    moe.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="built again from its config.*extra.bias stands in one"):
        EngineProcess(moe)
    assert not children()


def test_the_process_ends_with_the_one_that_started_it(moe_folder):
    code = (
        "import time; from transformers import AutoModelForCausalLM\n"
        "from minirl_nb.ahead import EngineProcess\n"
        f"engine = EngineProcess(AutoModelForCausalLM.from_pretrained({str(moe_folder)!r}))\n"
        "print(engine._process.pid, flush=True)\ntime.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        number = int(parent.stdout.readline())
        os.kill(number, 0)
        parent.kill()
    until(lambda: not os.path.exists(f"/proc/{number}"))


def test_a_closed_engine_hangs_up_on_its_servers():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        listening.listen()
        engine = ServedEngine.__new__(ServedEngine)
        engine._broken = None
        engine.servers = [Server(f"http://localhost:{listening.getsockname()[1]}", 60)]
        waiting = Ahead()
        waiting.begin(0, lambda: engine.servers[0].must("GET", "/never"))
        until(lambda: engine.servers[0].open)
        listening.accept()
        started = time.monotonic()
        engine.close()
        waiting.close()
        assert time.monotonic() - started < 10
        with pytest.raises(Exception, match="does not answer GET /never"):
            waiting.check()


# ----------------------------------------------------------------------------------------- a run
class AtOnce(Ahead):
    "Samples where `begin` stands, in this process: nothing runs at the same time."

    begun: list = []

    def begin(self, number, respond):
        compare_weights(self.run.engine, self.run.model)
        self.begun.append((number, self.run.step // self.run.config.batch.updates))
        self.restore(number, respond())


SLEEP = 0.6  # seconds by which sampling, and the updates of a step, are slowed


@pytest.fixture(scope="module")
def off(tmp_path_factory, coldstart):
    """A run one step off that nothing disturbs: `result`, `rollouts` as they were trained on, and
    the `weights` of each version. Sampling and training are slowed, to see them overlap."""
    recompute, update, generate = train.recompute, train.update, EngineProcess.generate
    kept = SimpleNamespace(rollouts=[], weights={})

    def keeping(state, step, rows=None):
        own = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        kept.weights[state.rollout_step] = own
        kept.rollouts.append(step.rollout)
        recompute(state, step, rows)

    def slow_update(state, step, i):
        time.sleep(SLEEP / 2)
        return update(state, step, i)

    def slow_generate(self, prompts, sampling):
        time.sleep(SLEEP)
        return generate(self, prompts, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "recompute", keeping)
        patch.setattr(train, "update", slow_update)
        patch.setattr(EngineProcess, "generate", slow_generate)
        kept.result = train.train(one_ahead(tmp_path_factory.mktemp("off") / "run", coldstart))
    return kept


def test_a_step_learns_from_the_version_before_it(off, tmp_path, coldstart, monkeypatch):
    """Sampling at the same time has the metrics of sampling one after the other, bit for bit, with
    an engine that has the trainer's weights at the moment of sampling."""
    steps = off.result.steps()
    assert [r["version"] for r in steps] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [r["lag"] for r in steps] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert all(r["seconds/wait"] >= 0 and r["seconds/generate"] > 0 for r in steps)
    monkeypatch.setattr(AtOnce, "begun", [])
    monkeypatch.setattr(run, "Ahead", AtOnce)
    monkeypatch.setattr(run, "EngineProcess", lambda model, folder, **o: TorchEngine(model, **o))
    opened = run._open_folder

    def known(state, checkpoint):
        state.ahead.run = state
        opened(state, checkpoint)

    monkeypatch.setattr(run, "_open_folder", known)
    one_by_one = train.train(one_ahead(tmp_path / "run", coldstart))
    assert metrics(one_by_one.folder) == metrics(off.result.folder)
    assert AtOnce.begun == [(0, 0), (1, 0), (2, 1), (3, 2)]
    sampled = json.loads((off.result.folder / "samples" / "step_000008.json").read_text())
    assert {s["version"] for s in sampled} == {2}


def test_log_probabilities_are_those_of_the_version_that_sampled(off, coldstart):
    """`logp_mu` of each rollout against a pass with the weights of every version: rounding for its
    own, what training did for the others."""
    model = AutoModelForCausalLM.from_pretrained(coldstart)
    engine = TorchEngine(model, fp8="fp8_per_channel")
    assert [r.policy_version for r in off.rollouts] == [0, 0, 1, 2]
    for rollout in off.rollouts:
        distance = {}
        for version, weights in off.weights.items():
            engine.load(weights)
            gap = engine.score(rollout) - rollout.logp_mu
            # the median, because a rounded activation may jump
            distance[version] = float(gap.abs()[rollout.response_mask].median())
        own = distance.pop(rollout.policy_version)
        assert own < 1e-5 < 1e-4 < min(distance.values()), (own, distance)


def test_a_step_takes_the_longer_phase(off):
    "While a step trained, the next rollout was sampled: that time is not waited for again."
    first = [r for r in off.result.steps() if r["mini_batch"] == 0]
    for now, later in zip(first[1:], first[2:]):
        sampling = later["seconds/generate"]
        assert sampling >= SLEEP
        # both updates slept while it was being sampled; the rest is for a busy machine
        assert now["seconds/wait"] < max(0.0, sampling - SLEEP) + 0.3 * SLEEP
    assert first[-1]["seconds/wait"] < 0.3 * SLEEP  # there is nothing behind the last step


def test_where_nothing_moves_both_ways_are_equal(tmp_path, coldstart):
    "With a learning rate below rounding all versions are one, so each number is that of taking turns."
    found = []
    for number in (0, 1):
        still = {"optimizer.lr": 1e-30, "rollout.ahead": number, "steps": 4}
        result = train.train(one_ahead(tmp_path / str(number), coldstart, **still))
        found.append(metrics(result.folder))
        for row in found[-1]:
            assert (row.pop("lag", None) is None) == (not number or row["kind"] != "step")
            row.pop("version", None)
    assert found[0] == found[1] and len(found[0]) >= 4


def test_stopped_and_resumed_is_uninterrupted(off, tmp_path, coldstart):
    config = one_ahead(tmp_path / "run", coldstart)
    with pytest.raises(PowerCut):
        train.train(config, on_step=power_cut(4))
    (part,) = checkpoints(config.output.folder)[-1].glob("ahead_*")
    assert load(part).policy_version == 1  # step 3, sampled while step 2 trained
    train.train(one_ahead(tmp_path / "run", coldstart, resume=True))
    assert metrics(tmp_path / "run") == metrics(off.result.folder)
    newest = checkpoints(off.result.folder)[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        same = (checkpoints(tmp_path / "run")[-1] / name).read_bytes()
        assert same == (newest / name).read_bytes()
    assert not list(newest.glob("ahead_*"))  # there is no step behind the last


def test_a_stale_tensor_of_the_sampler_is_named(tmp_path, coldstart, monkeypatch):
    healthy, name = EngineProcess.load, "model.layers.1.mlp.experts.down_proj"

    def stale(self, named, version=None):
        kept = self.model.get_parameter(name).data.clone()
        healthy(self, named, version)
        self.model.get_parameter(name).data[5] = kept[5]

    monkeypatch.setattr(EngineProcess, "load", stale)
    with pytest.raises(ParityError, match=r"down_proj \(expert 5\)"):
        train.train(one_ahead(tmp_path / "run", coldstart))
    assert not children()


@pytest.mark.parametrize("fault", ["killed", "not finite"])
def test_the_end_of_the_sampler_ends_the_run_in_its_step(fault, tmp_path, coldstart, monkeypatch):
    done, place = [], tmp_path / "weights"
    place.mkdir()

    def hurt(state):
        if state.step == 2 and fault == "killed":
            state.engine._process.send_signal(signal.SIGKILL)
        elif state.step == 2:
            state.engine.model.lm_head.weight.data.fill_(torch.nan)

    slow = train.update

    def update(state, step, i):
        if state.step >= 2:
            until(state.ahead._coming[1].done, 120)  # the sampler has failed
        row = slow(state, step, i)
        done.append(state.step)
        return row

    monkeypatch.setattr(train, "update", update)
    error, said = {
        "killed": (SamplerError, "the process that samples was killed by signal 9"),
        "not finite": (FloatingPointError, "log-probability"),
    }[fault]
    with pytest.raises(error, match=said) as found:
        config = one_ahead(tmp_path / "run", coldstart, **{"rollout.transfer_folder": str(place)})
        train.train(config, on_step=hurt)
    assert "\n" not in str(found.value)
    assert done == [1, 2]  # the first update behind it did not end
    assert not children() and not list(place.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith("minirl-ahead")]


# --------------------------------------------------------------------------------- several ranks
def world_of(rank, size):
    world = World()
    world.rank, world.size = rank, size
    return world


@pytest.mark.parametrize("writers, readers", [(1, 1), (2, 1), (1, 2), (2, 3), (3, 5)])
def test_a_rollout_in_a_checkpoint_is_divided_anew(writers, readers, tmp_path):
    prompts = 4
    everything = TorchEngine(tiny_qwen3_moe(), routes=True).generate(
        [[3, 4 + g] for g in range(prompts)], SAMPLING
    )

    def part(rank, size):
        mine = world_of(rank, size).share(prompts)
        own = (everything.group >= mine.start) & (everything.group < mine.stop)
        return everything.select(own.nonzero()[:, 0])

    for rank in range(writers):
        save(part(rank, writers), tmp_path / f"ahead_{rank:05d}")
    for rank in range(readers):
        assert_equal(read_ahead(tmp_path, world_of(rank, readers), prompts), part(rank, readers))
    assert read_ahead(tmp_path / "none", World(), prompts) is None


def test_each_rank_has_its_own_sampler(off, tmp_path, coldstart):
    """Two replicas against one process. The first two rollout steps have the weights of the start,
    so they have the same tokens. (Later ones need not: rounded weights jump, and sums over ranks
    are taken in another order.)"""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(config_yaml(one_ahead(tmp_path / "run", coldstart, steps=4)))
    code = f"from minirl_nb.cli import main; raise SystemExit(main(['train', {str(recipe)!r}]))"
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | place | {k: str(v) for k, v in of_rank.items()},
            stdout=subprocess.DEVNULL,
        )
        for of_rank in (
            {"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2} for r in (0, 1)
        )
    ]
    try:
        assert [p.wait(600) for p in ranks] == [0, 0]
    finally:
        for p in ranks:
            p.kill()
            p.wait()
    rows = [r for r in metrics(tmp_path / "run") if r["kind"] == "step"]
    alone = [r for r in metrics(off.result.folder) if r["kind"] == "step"]
    assert [r["lag"] for r in rows] == [0, 0, 1, 1]
    for name in ("reward", "response_length", "version"):
        assert [r[name] for r in rows] == [r[name] for r in alone[:4]], name


# -------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"rollout.ahead": 2}, "rollout.ahead is 2; it is 0 or 1"),
        ({"rollout.engine": "vllm"}, "takes turns with it"),
    ],
)
def test_what_cannot_be_ahead_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        load_config(None, {"rollout.ahead": 1} | changes)
    assert "\n" not in str(error.value)
    load_config(
        None, {"rollout.ahead": 1, "rollout.engine": "vllm", "rollout.servers": ["http://a:1"]}
    )


def test_resampling_is_refused_beside_it():
    said = "rollout.ahead is 1, but batch.resample = 5 samples several times"
    with pytest.raises(ValueError, match=said) as error:
        check(load_config(None, {"rollout.ahead": 1, "batch.resample": 5}))
    assert "\n" not in str(error.value)
    for alone in ({"rollout.ahead": 1}, {"batch.resample": 5}):
        check(load_config(None, alone))


@pytest.mark.parametrize("number, free", [(0, True), (1, False)])
def test_a_longer_run_is_another_run_only_where_it_samples_ahead(number, free, tmp_path):
    (tmp_path / "config.yaml").write_text(
        config_yaml(load_config(None, {"rollout.ahead": number, "steps": 4}))
    )
    longer = {"rollout.ahead": number, "steps": 8, "output.folder": str(tmp_path)}
    assert (changes_of(load_config(None, longer)) == {}) == free


def test_a_plan_takes_the_longer_of_sampling_and_training():
    phases = [
        SimpleNamespace(name=name, time=seconds)
        for name, seconds in (("rollout", 5), ("recompute", 1), ("update", 3), ("transfer", 2))
    ]

    def seconds(number):
        config = load_config(None, {"rollout.ahead": number})
        return _step_seconds(SimpleNamespace(config=config), phases)

    assert (seconds(0), seconds(1)) == (11, 7)
    phases[2].time = 9
    assert seconds(1) == 12
