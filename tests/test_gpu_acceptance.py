"""The script for a graphics card runs here at its small sizes, in an environment that has what the
card's has and no more."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu import acceptance

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "gpu" / "acceptance.py"
# the wheels that the script names
WHEELS = ["pydantic", "pydantic_core", "annotated_types", "typing_inspection", "scipy", "psutil"]
# imported first in each process, because it is the `sitecustomize` nearest on the path
ONLY = """
import os, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
KNOWN = set(os.environ["KNOWN"].split()) | set(sys.stdlib_module_names) | {"tests", "minirl_nb"}
class Only:
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in KNOWN or top.startswith("_"):
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only]
"""


def brought_along(*names):
    "Importable names of these distributions and of all that they require here."
    wanted, seen = list(names), set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue  # of another system
        wanted += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    distributions_of = metadata.packages_distributions()
    return [
        top
        for top, dists in distributions_of.items()
        if any(canonicalize_name(d) in seen for d in dists)
    ]


# which of the wheels come along too depends on the versions: they are named so as not to
BASE = set(brought_along("torch", "transformers", "triton", "safetensors")) - set(WHEELS)


def run(folder, known, *words):
    "The script in an environment that knows these packages: exit status, results, output."
    (folder / "sitecustomize.py").write_text(ONLY)
    output = folder / "found.json"
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "KNOWN": " ".join(known), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output), *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=580,
    )
    said = done.stdout + done.stderr
    return done.returncode, json.loads(output.read_text()) if output.exists() else None, said


def test_every_section_passes_with_nothing_but_what_is_named(tmp_path):
    status, found, said = run(tmp_path, [*BASE, *WHEELS])
    assert status == 0 and found["passed"], said
    assert [s["section"] for s in found["sections"]] == list(acceptance.SECTIONS)
    assert all(s["checks"] and s["seconds"] > 0 for s in found["sections"])
    names = {c["name"] for s in found["sections"] for c in s["checks"]}
    for family in ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"):
        for way in ("eager", "grouped_mm", "batched_mm"):
            assert f"{family}, {way}: own routes replayed, largest change" in names
    assert found["machine"]["torch"] and found["machine"]["transformers"]


def test_a_section_without_its_package_fails_alone_and_says_what_is_missing(tmp_path):
    status, found, _ = run(tmp_path, BASE, "fp8", "demo", "memory")
    assert status == 1 and not found["passed"]
    fp8, demo, memory = found["sections"]
    assert fp8["passed"] and memory["passed"] and not demo["passed"]
    assert "pydantic" in demo["error"]


def test_a_section_that_fails_hangs_or_dies_is_told_with_what_it_found(monkeypatch):
    from tests.gpu import sections

    def fails(place, note):
        note("one", 1.0, passed=True)
        raise ValueError("broken kernel")

    def hangs(place, note):
        note("one", 1.0, passed=True)
        import time

        time.sleep(60)

    def dies(place, note):
        note("one", 1.0, passed=True)
        os._exit(7)

    def says_nothing(place, note):
        note("one", 1.0)

    for f in (fails, hangs, dies, says_nothing):
        monkeypatch.setattr(sections, f.__name__, f, raising=False)
    results = {name: acceptance.run_section(name, 3) for name in ("fails", "hangs", "dies")}
    assert not any(r.passed for r in results.values())
    assert all(len(r.checks) == 1 for r in results.values())
    assert "broken kernel" in results["fails"].error and "ValueError" in results["fails"].error
    assert results["hangs"].error == "was stopped after 3 s"
    assert results["dies"].error == "its process ended with status 7"
    nothing = acceptance.run_section("says_nothing", 30)
    assert not nothing.error and not nothing.passed  # a section without a goal has shown nothing
    text = acceptance.table([*results.values(), nothing])
    assert text.count("FAIL") == 4


def test_where_a_fork_sees_no_card_and_a_fresh_process_does_sections_start_fresh(monkeypatch):
    import torch

    seen = {"fork": {"device": "x86_64"}, "spawn": {"device": "H100", "memory": 8e10}}
    monkeypatch.setattr(acceptance, "machine_of", seen.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert acceptance.look_around() == (seen["spawn"], "spawn")
    seen["fork"] = seen["spawn"]
    assert acceptance.look_around() == (seen["fork"], "fork")
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for processors has no card to see
    seen["fork"] = {"device": "x86_64"}
    assert acceptance.look_around() == (seen["fork"], "fork")


def test_a_fresh_process_can_run_a_section(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = acceptance.run_section("fp8", 120, "spawn")
    assert found.passed, found


def test_wheels_are_unpacked_and_a_folder_without_any_is_refused(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    with zipfile.ZipFile(tmp_path / "found_it-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("found_it.py", "x = 5")
    acceptance.unpack(tmp_path, tmp_path / "into")
    assert __import__("found_it").x == 5
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "into"), "before"])
    with pytest.raises(SystemExit, match="no wheel"):
        acceptance.unpack(tmp_path / "into", tmp_path)
