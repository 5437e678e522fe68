"""Shared fixtures, and what holds for the run as a whole.

- A tiny Qwen3-MoE with random weights, and the built-in task's tokenizer beside it.
- One thread a process, and no progress bars of libraries.
- With several workers (`pytest -n 2`): files of tests are handed out whole, the longest first, so
  that a file's fixtures are made once and the workers end together.
- A run with workers has a temporary folder of its own, and fails if it leaves a file in it, or a
  process behind.
"""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Before anything of torch or of the Hugging Face libraries is imported, here and in the processes
# that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "_proc" / "inductor"))
# torch keeps these in the temporary folder, whatever the variable above says
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import leftovers
import pytest

SECONDS = ROOT / "tools" / "seconds.json"  # of each file of tests, by `pytest --record-seconds`
UNKNOWN = 300  # seconds assumed of a file without a record: it starts early
# Files whose verdicts hang on floating-point kernels: `make numerics` runs them with others too.
# The rest tests files, text, messages and counts, or compares bits within one process; so do single
# tests of these files, which are marked `any_kernels` with the reason.
NUMERICS = {
    "test_exact.py": "float64 identities",
    "test_first_order.py": "slopes of small differences",
    "test_weights.py": "statistics of weights",
    "test_clipping.py": "masks at the edge of a trust region",
    "test_objective.py": "losses and gradients",
    "test_policy.py": "log-probabilities and gradients against torch",
    "test_packed.py": "packed against padded forwards, every family",
    "test_routing.py": "replay of near ties",
    "test_fp8.py": "rounding",
    "test_formats.py": "rounding",
    "test_one_page.py": "the entry page against the loop",
    "test_validity.py": "the meters of the approximation",
    "test_decoding.py": "the choice of a token",
    "test_parity.py": "probes of an engine",
    "test_rollout.py": "sampling",
    "test_precision.py": "sampling of rounded engines",
    "test_parity_depth.py": "probes of an engine of 30 layers",
    "test_coldstart.py": "losses of a short training",
    "test_train.py": "short runs of the loop",
    "test_trl.py": "TRL's losses and gradients against the loop's",
    "test_integrations.py": "watched log-probabilities, another recipe's gradients",
}

# Files that start servers, real models or many processes for what other tests hold on a smaller
# scale. `make slow` runs them, with all tests that need vLLM and those marked one by one.
SLOW = {
    "test_gpu_acceptance.py": "the whole script for a graphics card, at small sizes",
    "test_plan_rehearsal.py": "a model of a hundred million parameters",
    "test_pretrained.py": "a pretrained model, fetched and read",
    "test_real_depth.py": "a pretrained mixture of 30 layers",
    "test_second_device.py": "runs on a second device",
}


# ------------------------------------------------------------------------------ order and markers
def pytest_ignore_collect(collection_path, config):
    "`-m numerics` does not import what holds no such test."
    named = collection_path.suffix != ".py" or collection_path.name in NUMERICS
    return True if config.option.markexpr.startswith("numerics") and not named else None


def pytest_addoption(parser):
    parser.addoption(
        "--record-seconds", action="store_true", help="keep the seconds of each file of tests"
    )


def recorded():
    return json.loads(SECONDS.read_text())["tests"] if SECONDS.exists() else {}


def pytest_collection_modifyitems(items):
    known = recorded()
    for item in items:
        name = item.path.name
        if name in NUMERICS and not item.get_closest_marker("any_kernels"):
            item.add_marker(pytest.mark.numerics)
        if name in SLOW or item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ:  # stable: the order within a file stays
        items.sort(key=lambda item: -known.get(item.path.name, UNKNOWN))


_seconds = defaultdict(float)


def pytest_runtest_logreport(report):
    _seconds[Path(report.fspath).name] += report.duration


def _record():
    kept = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    tests = kept.get("tests", {}) | {name: round(s) for name, s in _seconds.items()}
    kept["tests"] = {n: tests[n] for n in sorted(tests) if (ROOT / "tests" / n).exists()}
    SECONDS.write_text(json.dumps(kept, indent=1) + "\n")


# ------------------------------------------------------------------------- nothing is left behind
_own_folder = None  # the temporary folder of a run with workers, in the process that leads it
_session = None


def _leads_workers(config):
    return bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    global _own_folder
    if not _leads_workers(config):  # one that only leads computes nothing
        import torch

        torch.set_num_threads(1)
    else:
        # a short name: sockets lie in it, and their paths end at 107 characters
        short = "/tmp" if len(tempfile.gettempdir()) > 40 else None
        _own_folder = tempfile.mkdtemp(prefix="minirl-", dir=short)
        os.environ["TMPDIR"] = tempfile.tempdir = _own_folder


def pytest_sessionstart(session):
    global _session
    _session = session


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    "After the workers have ended and before the closing line: what did they leave?"
    if config.option.record_seconds:
        _record()
    if _own_folder is None:
        return
    own = [p for p in os.listdir(_own_folder) if p.startswith("pytest-of-")]
    said = leftovers.tidy(_own_folder, but=own)
    for name in own:
        shutil.rmtree(Path(_own_folder) / name, ignore_errors=True)
    if not said:
        return
    terminalreporter.section("left behind", sep="=", red=True)
    for line in said:
        terminalreporter.write_line(line)
    # counted as an error, so that the closing line says so
    terminalreporter.stats.setdefault("error", []).append(
        pytest.TestReport(
            nodeid="left behind",
            location=("", None, "left behind"),
            keywords={},
            outcome="failed",
            longrepr="; ".join(said),
            when="teardown",
        )
    )
    _session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config):
    global _own_folder
    if _own_folder is not None:
        shutil.rmtree(_own_folder, ignore_errors=True)
        _own_folder = None


# --------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="session", autouse=True)
def no_progress_bars():
    'Of libraries ("Loading weights", "Writing model shards"), in this process.'
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def process_as_found():
    """A file of tests leaves its process as the next one expects it: no process group, no thread
    setting of its own, and nothing that the processes of later tests would inherit."""
    import torch

    inherited = (
        "LD_",
        "OMP_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "TMPDIR",
        "TORCHINDUCTOR_CACHE",
    )

    def state():
        variables = {k: v for k, v in os.environ.items() if k.startswith(inherited)}
        return variables, torch.get_num_threads(), torch.distributed.is_initialized()

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="module")
def vllm_functions(process_as_found):
    "vLLM can be imported; OpenCV, which comes with it, changes a variable of this process."
    pytest.importorskip("vllm")
    before = os.environ.get("LD_LIBRARY_PATH")
    import vllm.model_executor.layers.quantization.online.fp8  # noqa: F401

    os.environ.pop("LD_LIBRARY_PATH", None)
    if before is not None:
        os.environ["LD_LIBRARY_PATH"] = before


def tiny_qwen3_moe(seed=0, **changes):
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = dict(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=15,
        bos_token_id=None,
        initializer_range=0.2,
    )
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(config | changes))).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.fixture
def moe():
    return tiny_qwen3_moe()


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory):
    """The tiny model on disk, with the arithmetic task's tokenizer.

    Random weights: about 1 response in 200 is right.
    """
    from minirl_nb import tasks

    folder = tmp_path_factory.mktemp("model")
    tiny_qwen3_moe().save_pretrained(folder)
    tasks.arithmetic_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coldstart():
    return ROOT / "data" / "coldstart"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, coldstart):
    "A run of `small_runs.small` from the shipped cold start, for the tests that only look."
    from small_runs import small

    from minirl_nb.train import train

    return train(small(tmp_path_factory.mktemp("finished") / "run", coldstart))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    "The folder of a small mixture for plans: a config and no weights."
    from plan_models import THIN

    folder = tmp_path_factory.mktemp("mixture")
    THIN.save_pretrained(folder)
    return str(folder)
