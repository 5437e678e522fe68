"""Shared fixtures: a tiny Qwen3-MoE with random weights, and the built-in task's tokenizer beside it.

The tests run in a temporary folder of their own. What they leave there, and a process that outlives them, fails the run."""
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "MINIRL_TESTS_FOLDER" not in os.environ:          # the first process; workers of pytest-xdist inherit the folder
    # short: names of sockets are made from it, and they may have 107 bytes
    os.environ["MINIRL_TESTS_FOLDER"] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="minirl-")
    tempfile.tempdir = None

import psutil
import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)


def tiny_qwen3_moe(seed=0, **changes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = dict(vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                  num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, tie_word_embeddings=False,
                  max_position_embeddings=64, pad_token_id=0, eos_token_id=15, bos_token_id=None, initializer_range=0.2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(config | changes))).eval()
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.fixture
def moe():
    return tiny_qwen3_moe()


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory):
    "The tiny model on disk, with the arithmetic task's tokenizer. Random weights: about 1 response in 200 is right."
    from minirl_nb import tasks

    folder = tmp_path_factory.mktemp("model")
    tiny_qwen3_moe().save_pretrained(folder)
    tasks.arithmetic_tokenizer().save_pretrained(folder)
    return folder


# What libraries keep between runs on purpose: pytest's folder of the last runs, torch's cache of compiled kernels
KEPT = ("pytest-of-", "torchinductor_")


def left_behind(folder):
    "Files in the tests' temporary folder that nobody took away, and processes that were started by a test and still run."
    files = [path.name for path in sorted(Path(folder).iterdir()) if not path.name.startswith(KEPT)]
    family = {process.pid for process in [psutil.Process(), *psutil.Process().parents()]}
    running = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("MINIRL_TESTS_FOLDER") == folder and process.status() != psutil.STATUS_ZOMBIE
            if ours and process.pid not in family:
                running.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
        except psutil.Error:                         # it has ended meanwhile, or belongs to somebody else
            continue
    return files + running


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    folder = os.environ["MINIRL_TESTS_FOLDER"]
    if hasattr(session.config, "workerinput"):
        return
    deadline = time.time() + 20                      # workers and engines may still be on their way out
    while (left := left_behind(folder)) and time.time() < deadline:
        time.sleep(0.5)
    if left:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line("")
        for line in left:
            reporter.write_line(f"left behind: {line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(folder, ignore_errors=True)
