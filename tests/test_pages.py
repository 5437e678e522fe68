"""Pages run in forks of one process, which has imported what they need: each has a temporary folder
and an end of its own, and whatever its end is, it is said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGES = {
    "tidy": """
import atexit, os, shutil, sys, tempfile, threading
folder = os.environ["TMPDIR"]
assert os.path.basename(folder).startswith("page-") and tempfile.gettempdir() == folder
assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["PYTHONHASHSEED"] == "0"
assert os.environ["ATEN_CPU_CAPABILITY"] == "default"
assert "xmlrpc.client" in sys.modules or sys.platform == "darwin"
assert "minirl_nb" not in sys.modules
atexit.register(shutil.rmtree, tempfile.mkdtemp())
threading.Thread(target=lambda: open(os.path.join(folder, "late"), "w").close()).start()
_ = atexit.register(os.remove, os.path.join(folder, "late"))""",
    "raises": "raise ValueError('the reason')",
    "crashes": "import os, sys\nos.write(2, b'last words')\nos.kill(os.getpid(), 11)",
    "differs": "print(6 * 7)",
    "leaves": "import os, time\nif not os.fork():\n    time.sleep(60)\n    os._exit(0)",
}

RUN = """
import functools, sys
from pathlib import Path
import leftovers, pages

if __name__ == "__main__":
    pages._with_page_environment()
    pages.NBS, pages.LIBRARIES = Path(sys.argv[1]), ["nbdev.test", "xmlrpc.client"]
    leftovers.tidy = functools.partial(leftovers.tidy, patience=0.5)
    pages.run([], 2)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    "What was said of each page, and of all."
    folder = tmp_path_factory.mktemp("pages")
    for name, source in PAGES.items():
        cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source}
        page = {"cells": [cell | {"outputs": [], "execution_count": None}]}
        page |= {"nbformat": 4, "nbformat_minor": 5, "metadata": {}}
        (folder / f"{name}.ipynb").write_text(json.dumps(page))
    script = folder / "script.py"
    script.write_text(RUN)
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "ATEN_CPU_CAPABILITY": "default"}
    env["OMP_NUM_THREADS"] = "2"  # pages have one thread, whatever their parent began with
    words = [sys.executable, script, folder]
    run = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    page = r"^  (?:ok  |FAIL) (\S+)\.ipynb(.*?)(?=^  (?:ok  |FAIL) |\Z)"
    found = dict(re.findall(page, run.stdout, re.M | re.S))
    return run, found


def test_a_page_finds_its_environment_and_the_end_of_a_process(said):
    run, found = said
    assert found["tidy"].strip().count("\n") == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "name, words",
    {
        "raises": ["exit status 1", "ValueError: the reason"],
        "crashes": ["exit status -11", "last words"],
        "differs": ["cell 0 (a)", "printed: '42'"],
        "leaves": ["left behind, process"],
    }.items(),
)
def test_what_a_page_does_wrong_is_said(name, words, said):
    for word in words:
        assert word in said[1][name], said[0].stdout


def test_the_pages_that_failed_are_named_at_the_end(said):
    run, _ = said
    assert run.returncode == 1
    named = run.stderr.strip().splitlines()[-1].removeprefix("pages failed: ")
    assert sorted(named.split(", ")) == [
        "crashes.ipynb",
        "differs.ipynb",
        "leaves.ipynb",
        "raises.ipynb",
    ]


def test_every_page_is_either_quick_or_slow():
    import pages

    every, quick = pages.selected([]), pages.selected([], quick=True)
    assert set(pages.SLOW) == set(every) - set(quick) == set(pages.selected([], slow=True))
    assert pages.selected(["02_weights", "23_full_run"], quick=True) == ["02_weights"]
    both = pages.selected([], numerics=True, quick=True)
    assert set(both) == set(quick) - set(pages.NO_NUMERICS)
