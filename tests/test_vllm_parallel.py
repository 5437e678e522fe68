"""vLLM in runs of several processes, against the real vLLM: inside the ranks of a torchrun, and
apart.

This file is also what the ranks run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_runs import free_port, small
from test_vllm import PROMPTS, ROUNDING, assert_same_function, engines, tiny  # noqa: F401 (engines is a fixture)

from minirl_nb import batch
from minirl_nb.rollout import ParityError, Sampling, TorchEngine
from minirl_nb.routing import compare
from minirl_nb.vllm.requests import EngineError

HERE = Path(__file__).resolve()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]
N = 3
SAMPLING = Sampling(n=N, max_new_tokens=16, seed=4)
ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def changed(seed=7):
    "Other weights than the engines start with."
    return dict(tiny(seed=seed).named_parameters())


def torchrun(script, folder, *arguments, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        str(script),
        str(folder),
        *arguments,
    ]
    # torchrun never deletes its folder of logs
    env = os.environ | ENV | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture
def whole(engines):  # noqa: F811
    "One process, one engine: what every other arrangement must give."
    return engines()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    "What two ranks left: engines of their own first, then one engine that both share."
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(HERE, folder)
    return folder, [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]


def same(a, b, tolerance=ROUNDING):
    "The same tokens, log-probabilities to rounding, the same experts."
    assert torch.equal(a.length, b.length) and torch.equal(a.tokens, b.tokens)
    assert (a.logp_mu - b.logp_mu).abs().max() < tolerance
    assert (
        torch.equal(a.routes_valid, b.routes_valid)
        and compare(a.routes, b.routes, a.routes_valid).stats()["flip"] == 0
    )


# -------------------------------------------------------------------------------- what the ranks do
def rank_main(folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from minirl_nb.vllm.engine import VLLMEngine

    dist.init_process_group("gloo")
    rank, said, model = dist.get_rank(), {}, tiny()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)

    def error(do):
        try:
            do()
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return "none"

    def full(tensors=None, alter=None):
        """A stream as a sharded trainer has it: every tensor is gathered when it is asked for, by
        all ranks."""
        for name, p in model.named_parameters():
            t = p.full_tensor() if tensors is None else tensors[name]
            dist.barrier()  # a rank that stops asking leaves the others here
            said["gathered"] = said.get("gathered", 0) + 1
            yield name, alter(name, t) if alter else t

    # an engine for each rank
    engine = VLLMEngine(model, routes=True, max_batch=32)
    said |= {
        "inside": engine._inside,
        "layers": len(engine.places.layers),
        "compared": engine.compare_weights(),
    }
    share = PROMPTS[:3] if rank == 0 else PROMPTS[3:]  # uneven
    first = SAMPLING.first + (0 if rank == 0 else 3 * N)
    batch.save(
        engine.generate(share, Sampling(n=N, max_new_tokens=16, seed=4, first=first)),
        folder / f"own{rank}.safetensors",
    )
    none = engine.generate(PROMPTS if rank == 0 else [], SAMPLING)  # a rank without prompts
    said |= {
        "empty": [
            list(none.tokens.shape),
            list(none.routes.shape),
            str(none.routes.dtype),
            str(none.finished.dtype),
            len(none),
        ]
    }
    engine.sleep()
    engine.load(full(changed()), version=5)
    batch.save(
        engine.generate(share, Sampling(n=N, max_new_tokens=16, seed=4, first=first)),
        folder / f"loaded{rank}.safetensors",
    )
    said |= {"version": engine.version, "again": engine.compare_weights()}
    # a tensor that changes on its way, one of another shape, one that is missing
    own, down = engine.transfer.checkpoint, "model.layers.0.mlp.experts.down_proj"

    def on_the_way(unit):
        return own({k: v * 1.02 if k == down else v for k, v in unit.items()})

    engine.transfer.checkpoint = on_the_way
    said["altered"] = error(lambda: engine.load(full()))
    engine.transfer.checkpoint = own
    said["gathered"] = 0
    said["misshapen"] = error(
        lambda: engine.load(full(alter=lambda n, t: t[:1] if n == "model.norm.weight" else t))
    )
    said["gathered all"] = said["gathered"] == len(list(model.named_parameters()))
    said["refused"] = error(lambda: engine.generate(PROMPTS, SAMPLING))
    said["missing"] = error(
        lambda: engine.load((n, t) for n, t in full() if n != "model.norm.weight")
    )
    engine.load(full())
    said["good again"] = error(lambda: engine.generate(share, SAMPLING))
    said["process"] = error(lambda: VLLMEngine(model, process=True))
    said["three"] = error(lambda: VLLMEngine(model, tensor_parallel=3))
    engine.close()
    said["closed"] = error(lambda: engine.generate(share, SAMPLING))
    dist.all_reduce(torch.ones(1))  # the trainer's process group is still there

    # one engine for both, its halves verified
    def share_one(scheme):
        engine = VLLMEngine(model, routes=True, max_batch=32, tensor_parallel=2, fp8=scheme)
        said[f"compared {scheme}"] = engine.compare_weights()
        batch.save(engine.generate(PROMPTS, SAMPLING), folder / f"shared{rank}{scheme}.safetensors")
        plain, engine.transfer.checkpoint = engine.transfer.checkpoint, on_the_way
        said[f"altered {scheme}"] = error(lambda: engine.load(full()))
        engine.transfer.checkpoint = plain
        engine.load(full())
        if scheme is None:
            said["different"] = error(lambda: engine.generate(PROMPTS[: 1 + rank], SAMPLING))
            said["shared empty"] = len(engine.generate([], SAMPLING))
        engine.close()

    for scheme in (None, "fp8_per_channel"):
        share_one(scheme)
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def rank_served(folder, addresses):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from minirl_nb.vllm.served import ServedEngine

    dist.init_process_group("gloo")
    rank, said, model = dist.get_rank(), {}, tiny()
    fully_shard(model)

    def full():
        for name, p in model.named_parameters():
            dist.barrier()  # a rank that stops asking leaves the others here
            yield name, p.full_tensor()

    engine = ServedEngine(addresses, model, routes=True, max_batch=8)
    share, first = (PROMPTS[:3], 0) if rank == 0 else (PROMPTS[3:], 3 * N)
    for version in (1, 2):
        engine.load(full(), version)
    batch.save(
        engine.generate(share, replace(SAMPLING, first=first)), folder / f"served{rank}.safetensors"
    )
    said["compared"] = engine.compare_weights(full())
    dist.barrier()
    engine._sleeps = True
    engine.sleep()
    engine.wake()
    said["empty"] = len(engine.generate([] if rank else PROMPTS, SAMPLING))
    engine.folder = folder / "gone"  # rank 0 cannot write; rank 1 must not wait for it
    try:
        engine.load(full())
    except Exception as e:
        said["error"] = f"{type(e).__name__}: {e}"
    engine.close()
    (folder / f"served{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------- colocated
class TestColocated:
    def test_seeds_can_be_cut_anywhere(self):
        from minirl_nb.vllm.requests import request_seeds

        for seed in (0, 3, 2**40 + 1):
            all_of_them = request_seeds(seed, 0, 100)
            assert all(
                request_seeds(seed, at, 100 - at) == all_of_them[at:] for at in (1, 7, 50, 99)
            )
            assert len(set(all_of_them)) == 100 and all(0 <= s < 2**63 for s in all_of_them)
        assert request_seeds(0, 0, 5) != request_seeds(1, 0, 5)

    def test_halves_on_two_ranks_are_one_process_whole(self, whole, ranks):
        (engine, model), (folder, said) = whole, ranks
        for name, tensors in (("own", None), ("loaded", changed())):
            if tensors:
                engine.load(tensors)
            halves = batch.cat([batch.load(folder / f"{name}{r}.safetensors") for r in range(2)])
            same(halves, engine.generate(PROMPTS, SAMPLING))
        engine.load(dict(model.named_parameters()))
        assert all(s["inside"] and s["layers"] == 2 for s in said)

    def test_a_rank_without_prompts_gets_a_rollout_without_rows(self, ranks):
        assert ranks[1][1]["empty"] == [[0, 0], [0, 0, 2, 2], "torch.uint8", "torch.bool", 0]
        assert ranks[1][0]["empty"][4] == len(PROMPTS) * N

    def test_streams_are_verified_and_taken_to_their_end(self, ranks):
        for s in ranks[1]:
            assert (
                s["compared"] == [] and s["again"] == [] and s["version"] == 5
            )  # every tensor was compared
            assert (
                "ParityError" in s["altered"]
                and "model.layers.0.mlp.experts (experts 0, 1" in s["altered"]
            )
            assert (
                "model.norm.weight is (1,), must be (64,)" in s["misshapen"] and s["gathered all"]
            )
            assert "load them again" in s["refused"] and "model.norm.weight" in s["refused"]
            assert "no new value for model.norm.weight" in s["missing"]
            assert s["good again"] == "none" and "closed" in s["closed"]

    def test_launches_that_do_not_fit_are_refused(self, ranks):
        for s in ranks[1]:
            assert "engines of 2 ranks live inside them" in s["process"]
            assert "tensor_parallel = 3 does not divide the 2 processes" in s["three"]

    @pytest.mark.parametrize("scheme", [None, "fp8_per_channel"])
    def test_two_ranks_share_one_engine(self, whole, ranks, scheme):
        (engine, model), (folder, said) = whole, ranks
        a, b = (batch.load(folder / f"shared{r}{scheme}.safetensors") for r in range(2))
        assert (
            torch.equal(a.tokens, b.tokens)
            and torch.equal(a.logp_mu, b.logp_mu)
            and torch.equal(a.routes, b.routes)
        )
        if scheme is None:
            same(a, engine.generate(PROMPTS, SAMPLING))
        else:
            # scales over a half are finer than those over the whole: near its emulation, not equal
            gap = (TorchEngine(model, fp8=scheme).score(a) - a.logp_mu).abs()[a.response_mask]
            plain = (TorchEngine(model).score(a) - a.logp_mu).abs()[a.response_mask]
            assert gap.mean() < plain.mean()
        for s in said:
            assert s[f"compared {scheme}"] == []
            assert "model.layers.0.mlp.experts" in s[f"altered {scheme}"]
            assert (
                "called generate with different arguments" in s["different"]
                and s["shared empty"] == 0
            )

    def test_an_engine_before_the_process_group_is_refused(self, monkeypatch):
        from minirl_nb.vllm.engine import VLLMEngine

        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(
            ValueError, match="WORLD_SIZE=2 processes, but torch.distributed has no process group"
        ):
            VLLMEngine(tiny())


# -------------------------------------------------------------------------------------------- apart
class Servers:
    "Servers as `serve_command` starts them; all end with the tests."

    def __init__(self, folder):
        self.folder, self.running = folder, {}

    def start(self, model, fp8="none", **options):
        from minirl_nb.vllm.server import serve_command

        path = self.folder / f"model{len(self.running)}"
        model.save_pretrained(path)
        address = f"http://127.0.0.1:{free_port()}"
        config = SimpleNamespace(
            model=SimpleNamespace(path=str(path), dtype="float32", compute="same"),
            rollout=SimpleNamespace(
                fp8=fp8, max_batch=32, tensor_parallel=1, servers=(address,), options=options
            ),
        )
        command = serve_command(config, python=sys.executable)
        with open(self.folder / f"{len(self.running)}.log", "w") as log:
            self.running[address] = subprocess.Popen(
                command,
                shell=True,
                start_new_session=True,
                stdout=log,
                stderr=log,
                env=os.environ
                | ENV
                | {"VLLM_LOGGING_LEVEL": "WARNING", "TMPDIR": str(self.folder)},
            )
        return address

    def kill(self, address):
        self._signal(self.running[address], signal.SIGKILL)
        self.running[address].wait(30)

    def end(self):
        """Politely, all at once, so that each deletes its files; what has not ended after 20
        seconds is killed."""
        for process in self.running.values():
            self._signal(process, signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass
            self._signal(process, signal.SIGKILL)  # what is left of its group
            process.wait(30)

    def _signal(self, process, which):
        try:
            os.killpg(process.pid, which)
        except ProcessLookupError:
            pass


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    "Two float32 servers and an FP8 one, starting while other tests run."
    made = Servers(tmp_path_factory.mktemp("servers"))
    made.plain = [made.start(tiny()) for _ in range(2)]
    made.rounded = made.start(tiny(), fp8="fp8_per_channel")
    yield made
    made.end()


def served(addresses, model, **options):
    from minirl_nb.vllm.served import ServedEngine

    return ServedEngine(addresses, model, routes=True, max_batch=32, **{"patience": 300} | options)


@pytest.mark.usefixtures("servers")
class TestApart:
    def test_one_or_two_servers_give_what_the_engine_inside_gives(self, servers, whole):
        engine, model = whole
        for n in (1, 2):
            apart = served(servers.plain[:n], model)
            assert apart.compare_weights() == []  # every tensor of the model was compared
            a, b = apart.generate(PROMPTS, SAMPLING), engine.generate(PROMPTS, SAMPLING)
            same(a, b)
            assert torch.equal(a.finished, b.finished) and a.policy_version == 0
            part = apart.generate(PROMPTS[1:], replace(SAMPLING, first=N))
            assert all(torch.equal(part.response(i), b.response(i + N)) for i in range(len(part)))
            none = apart.generate([], SAMPLING)
            assert len(none) == 0 and none.routes.shape == (0, 0, 2, 2)
            for t in (1.0, 0.7):
                assert (apart.score(b, t) - engine.score(b, t)).abs().max() < ROUNDING
            cold = Sampling(temperature=0.0, max_new_tokens=8)
            same(apart.generate(PROMPTS, cold), engine.generate(PROMPTS, cold))

    def test_weights_arrive_and_what_does_not_is_named(self, servers, whole):
        engine, model = whole
        apart = served(servers.plain, model)
        apart.load(iter(changed().items()), version=3)
        engine.load(changed())
        try:
            same(apart.generate(PROMPTS, SAMPLING), engine.generate(PROMPTS, SAMPLING))
        finally:
            engine.load(dict(model.named_parameters()))
        assert apart.version == 3 and apart.compare_weights(changed()) == []
        with pytest.raises(ParityError, match=f"{servers.plain[0]}: model"):
            apart.compare_weights(model.named_parameters())
        own, name = apart.transfer.checkpoint, "model.layers.2.self_attn.o_proj.weight"
        apart.transfer.checkpoint = lambda unit: own(
            {k: v * 1.02 if k == name else v for k, v in unit.items()}
        )
        with pytest.raises(
            ParityError, match=r"2 of vLLM's .*: model\.layers\.2\.self_attn\.o_proj is off by"
        ):
            apart.load(changed())
        apart.transfer.checkpoint = own
        with pytest.raises(KeyError, match="no new value for model.norm.weight"):
            apart.load((n, t) for n, t in changed().items() if n != "model.norm.weight")
        with pytest.raises(EngineError, match="load them again"):
            apart.generate(PROMPTS, SAMPLING)
        apart.load(changed())
        assert len(apart.generate(PROMPTS, SAMPLING)) == len(PROMPTS) * N
        assert not list(Path("/dev/shm").glob("minirl-weights-*"))

    def test_emulated_fp8_is_the_same_function(self, servers, whole):
        model = whole[1]
        apart = served([servers.rounded], model, fp8="fp8_per_channel")
        assert apart.compare_weights() == []
        r = apart.generate(PROMPTS, Sampling(n=8, max_new_tokens=20))
        assert_same_function(TorchEngine(model, fp8="fp8_per_channel"), r)

    def test_a_server_that_another_run_loaded_is_not_used(self, servers, whole):
        mine = served(servers.plain[:1], whole[1])
        other = served(servers.plain[:1], whole[1])
        with pytest.raises(
            EngineError, match=f"{servers.plain[0]} does not hold this run's weights of version 0"
        ):
            mine.generate(PROMPTS, SAMPLING)
        assert len(other.generate(PROMPTS, SAMPLING)) == len(PROMPTS) * N

    def test_servers_that_share_their_memory_sleep_and_wake(self, servers, whole):
        apart = served(servers.plain[:1], whole[1])
        apart.sleep()  # a server without sleep mode stays awake
        before = apart.generate(PROMPTS, SAMPLING)
        apart._sleeps = True
        apart.sleep()
        with pytest.raises(EngineError, match="every rank must call wake"):
            apart.generate(PROMPTS, SAMPLING)
        apart.wake()
        same(apart.generate(PROMPTS, SAMPLING), before)
        apart.sleep()
        apart.load(whole[1].named_parameters())  # wakes by itself
        same(apart.generate(PROMPTS, SAMPLING), before)

    def test_servers_that_are_not_meant(self, servers, whole, tmp_path, monkeypatch):
        from minirl_nb.vllm import served as module
        from minirl_nb.vllm.server import Server

        model = whole[1]
        for other, options, words in (
            (tiny(hidden_size=128), {}, "has hidden_size = 64; the trainer's model has 128"),
            (
                tiny("mixtral"),
                {},
                "runs Qwen3MoeForCausalLM; the trainer's model is MixtralForCausalLM",
            ),
            (
                model,
                {"fp8": "fp8_per_block"},
                "is quantised as None; the trainer wants fp8_per_block",
            ),
            (model, {"dtype": "bfloat16"}, "computes in float32; the trainer wants bfloat16"),
        ):
            with pytest.raises(EngineError, match=f"{servers.plain[0]} {words}"):
                served(servers.plain[:1], other, **options)
        with pytest.raises(ValueError, match="stands twice"):
            served(servers.plain[:1] * 2, model)
        with pytest.raises(ValueError, match="must look like http://host:port"):
            served(["localhost:80"], model)
        with pytest.raises(ValueError, match="cannot be written"):
            served(servers.plain, model, folder=tmp_path / "none")
        nowhere = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(
            EngineError,
            match=f"no vLLM server answers at {nowhere} .*refused.*start it with: vllm serve x",
        ):
            served([nowhere], model, patience=0, command="vllm serve x")
        with monkeypatch.context() as m:
            m.setattr(module, "known_versions", lambda: ("0.99",))
            with pytest.raises(EngineError, match="runs vLLM 0.30.0; tested are 0.99"):
                served(servers.plain[:1], model)
        # the same questions to servers that were started in another way: their answers, told here
        # without a start of 20 seconds each
        own = Server.ask
        for path, status, words in (
            ("/collective_rpc", 404, "without VLLM_SERVER_DEV_MODE=1"),
            ("/collective_rpc", 500, "without --worker-extension-cls"),
            ("/inference/v1/generate", 404, "without --enable-scale-out"),
            ("/inference/v1/generate", 403, "without --enable-scale-out"),
        ):

            def ask(self, method, p, *args, path=path, status=status, **kwargs):
                return (status, {}) if p == path else own(self, method, p, *args, **kwargs)

            with monkeypatch.context() as m:
                m.setattr(Server, "ask", ask)
                with pytest.raises(EngineError, match=words):
                    served(servers.plain[:1], model)

    def test_two_ranks_use_the_same_servers(self, servers, whole, tmp_path):
        torchrun(HERE, tmp_path, *servers.plain)
        halves = batch.cat([batch.load(tmp_path / f"served{r}.safetensors") for r in range(2)])
        same(halves, whole[0].generate(PROMPTS, SAMPLING))
        a, b = (json.loads((tmp_path / f"served{r}.json").read_text()) for r in range(2))
        assert a["compared"] == b["compared"] == [] and (a["empty"], b["empty"]) == (
            len(PROMPTS) * N,
            0,
        )
        assert (
            "FileNotFoundError" in a["error"]
            and "EngineError: another rank failed at the servers" in b["error"]
        )

    def test_a_server_that_dies_ends_the_call_and_the_engine(self, servers, whole):
        apart = served(servers.plain, whole[1])
        victim = servers.plain[1]
        timer = threading.Timer(0.3, servers.kill, (victim,))
        timer.start()
        started = time.monotonic()
        with pytest.raises(EngineError, match=victim):
            apart.generate(PROMPTS * 300, Sampling(n=4, max_new_tokens=50))
        assert time.monotonic() - started < 60
        timer.join()
        with pytest.raises(EngineError, match="make a new one"):
            apart.generate(PROMPTS, SAMPLING)
        assert (
            len(served(servers.plain[:1], whole[1]).generate(PROMPTS, SAMPLING)) == len(PROMPTS) * N
        )  # the other one lives


def test_a_run_one_step_off(coldstart, tmp_path):
    """A server samples the next rollout while a step trains. With float32 on both sides `mu` is
    `pi_old` to rounding where the version is the trainer's, and not where it is older."""
    from transformers import AutoModelForCausalLM

    from minirl_nb.train import train

    apart = Servers(tmp_path)
    try:
        address = apart.start(AutoModelForCausalLM.from_pretrained(coldstart))
        changes = {"rollout.engine": "vllm", "rollout.servers": [address], "rollout.ahead": 1}
        changes |= {"rollout.fp8": "none", "rollout.max_new_tokens": 12, "evaluation.every": 0}
        changes |= {"evaluation.numerics": "train", "rollout.max_batch": 32, "steps": 6}
        rows = train(small(tmp_path / "run", coldstart, **changes)).steps()
    finally:
        apart.end()
    assert [r["version"] for r in rows] == [0, 0, 0, 0, 1, 1]
    assert [r["lag"] for r in rows] == [0, 0, 1, 1, 1, 1]
    assert all(r["parity/k3"] < 1e-9 for r in rows)
    assert all(r["k3"] < 1e-9 for r in rows[:2]) and all(r["k3"] > 1e-7 for r in rows[2:])


def test_the_command_for_gpus():
    pytest.importorskip("transformers")
    from minirl_nb.train import load_config
    from minirl_nb.vllm.server import serve_command

    folder = HERE.parent.parent / "data" / "coldstart"
    config = load_config(
        overrides={
            "model.path": str(folder),
            "rollout.engine": "vllm",
            "rollout.fp8": "fp8_per_block",
            "rollout.tensor_parallel": 2,
            "rollout.servers": ["http://a:8000", "http://b:8001"],
            "rollout.options": {"gpu_memory_utilization": "0.8"},
        }
    )
    first, second = serve_command(config, cpu=False).splitlines()
    assert first.startswith(
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --host a --port 8000 --enable-scale-out "
        "--tensor-parallel-size 2"
    )
    assert "--port 8001" in second
    for words in (
        "--quantization fp8_per_block",
        "--enable-return-routed-experts",
        "--logprobs-mode processed_logprobs",
        "--load-format dummy",
        "--worker-extension-cls minirl_nb.vllm.worker.WorkerMethods",
        "--gpu-memory-utilization 0.8",
        "--skip-tokenizer-init",
    ):
        assert words in first, words
    assert "enforce" not in first and "sleep" not in first and "--no-" not in first
    with pytest.raises(ValueError, match="rollout.servers is empty"):
        serve_command(load_config(), cpu=False)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        rank_main(Path(sys.argv[1]))
    else:
        rank_served(Path(sys.argv[1]), sys.argv[2:])
