"""A run that leaves a file or a process behind is found out."""

import os
import subprocess
import sys
from pathlib import Path

import leftovers

ROOT = Path(__file__).resolve().parent.parent
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_file_a_folder_and_a_process_are_named_and_the_process_is_ended(tmp_path):
    (tmp_path / "engine.sock").write_text("")
    (tmp_path / "torchelastic_x").mkdir()
    (tmp_path / "kept").mkdir()
    process = subprocess.Popen(SLEEP, env=os.environ | {"TMPDIR": str(tmp_path)})
    said = leftovers.tidy(tmp_path, but=["kept"], patience=0)
    assert process.wait(10) != 0
    assert len(said) == 2 and f"process {process.pid}" in said[0]
    assert said[1].endswith("engine.sock, torchelastic_x")


def test_a_process_that_ends_in_time_and_an_empty_folder_are_nothing(tmp_path):
    words = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    process = subprocess.Popen(words, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert leftovers.tidy(tmp_path) == []
    process.wait(10)


def run_with_a_worker(folder, body):
    "Exit status and last line of a run with this conftest of one test in `folder`."
    (folder / "test_it.py").write_text(
        f"import subprocess, sys, tempfile\ndef test_it():\n    {body}\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")])
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    words = ["pytest", "-n", "1", "--dist", "loadgroup", "-p", "conftest", "-c", "/dev/null"]
    run = subprocess.run(
        [sys.executable, "-m", *words, "--rootdir", str(folder), "test_it.py"],
        cwd=folder,
        env=env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout.strip().splitlines()[-1]


def test_the_closing_line_of_a_run_counts_what_was_left(tmp_path):
    status, line = run_with_a_worker(tmp_path, "tempfile.mkstemp()")
    assert status == 1 and "1 passed" in line and "1 error" in line


def test_a_tidy_run_passes(tmp_path):
    status, line = run_with_a_worker(tmp_path, "tempfile.TemporaryDirectory().cleanup()")
    assert status == 0 and "1 passed" in line and "error" not in line
