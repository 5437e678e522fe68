"""The package as others get it: a wheel and a source distribution, far from the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("coldstart", "arithmetic")
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "_proc", "_docs", "build", "dist", "runs")


def quiet(command, **options):
    "Run a command that has to succeed; returns what it prints."
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert not done.returncode, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def outside():
    "The environment of a process that knows nothing of the repository."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PYTEST"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def build(source, output, what):
    "Build with the setuptools of this environment, so that no network is needed."
    words = ["build", f"--{what}", "--no-isolation", "--outdir", str(output), str(source)]
    quiet([sys.executable, "-m", *words], cwd=output, env=outside())
    return next(output.glob("*.whl" if what == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    "A source distribution and a wheel of a copy of the repository, and a wheel of the former."
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for name in ("sdist", "wheel", "again", "unpacked"):
        (folder / name).mkdir()
    sdist, wheel = (
        build(source, folder / "sdist", "sdist"),
        build(source, folder / "wheel", "wheel"),
    )
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    unpacked = next((folder / "unpacked").iterdir())
    return sdist, wheel, build(unpacked, folder / "again", "wheel")


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """Command `minirl` of a fresh environment with the wheel in it.

    The packages it needs are those of the running environment, which stand behind the fresh one's
    own on the path; the hook of an editable install does not work there.
    """
    folder = tmp_path_factory.mktemp("environment")
    quiet([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(binaries / "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(quiet([python, "-c", where], env=outside()).strip())
    behind = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "behind.pth").write_text("\n".join(sorted(behind)) + "\n")
    words = ["-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--ignore-installed"]
    quiet([sys.executable, *words, *options, str(distributions[1])], env=outside())
    return binaries / "minirl"


@pytest.fixture
def minirl(installed, tmp_path):
    "Runs a command of the installed package in an empty folder; returns what it prints."
    return lambda *words: quiet([str(installed), *words], cwd=tmp_path, env=outside())


def names(distribution):
    "Files of a distribution, without its own folder and the metadata."
    if distribution.suffix == ".whl":
        found = zipfile.ZipFile(distribution).namelist()
    else:
        with tarfile.open(distribution) as archive:
            found = [m.name.partition("/")[2] for m in archive if m.isfile()]
    return {n for n in found if ".dist-info/" not in n and ".egg-info/" not in n}


def files_below(folder):
    return {p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.is_file()}


def package_files():
    code = {n for n in files_below(ROOT / "minirl_nb") if n.endswith((".py", ".yaml"))}
    data = set().union(*(files_below(ROOT / "data" / name) for name in SHIPPED))
    return code, data


@pytest.mark.slow
class TestDistributions:
    def test_the_wheel_holds_the_package_and_what_the_demo_needs(self, distributions):
        code, data = package_files()
        assert names(distributions[1]) == code | {f"minirl_nb/{name}" for name in data}

    def test_the_wheel_of_the_source_distribution_is_the_same(self, distributions):
        first, again = (zipfile.ZipFile(path) for path in distributions[1:])
        assert names(distributions[1]) == names(distributions[2])
        for name in names(distributions[1]):
            assert first.read(name) == again.read(name), name

    def test_the_source_distribution_holds_the_pages_and_one_copy_of_the_data(self, distributions):
        code, data = package_files()
        found = names(distributions[0])
        pages = {f"nbs/{p.name}" for p in (ROOT / "nbs").glob("*.ipynb")}
        assert code | data | pages | {"setup.py", "settings.ini", "pyproject.toml"} <= found
        assert not [n for n in found if n.startswith("minirl_nb/data")]
        assert not [n for n in found if n.endswith(".pyc") or re.match(r"nbs/.*\.py$", n)]


@pytest.mark.slow
class TestInstalled:
    def test_the_repository_is_not_on_the_path(self, installed, tmp_path):
        show = "import minirl_nb; print(minirl_nb.__file__)"
        python = str(installed.with_name("python"))
        found = Path(quiet([python, "-c", show], cwd=tmp_path, env=outside()).strip())
        assert found.is_relative_to(installed.parent.parent)

    def test_the_demo_trains(self, minirl, tmp_path):
        sizes = ["--steps", "4", "--evaluation.samples", "1", "--output.folder", "run"]
        minirl("train", "demo", *sizes)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [row for row in map(json.loads, lines) if "loss" in row]
        assert len(steps) == 4

    def test_evaluate(self, minirl):
        words = ["--samples", "1", "--max_new_tokens", "16"]
        said = minirl("evaluate", "data/coldstart", *words)
        assert all(name in said for name in ("easy", "medium", "hard"))

    def test_plan(self, minirl):
        assert "GB" in minirl("plan", "demo")

    def test_recipes(self, minirl):
        said = minirl("recipes")
        assert all(p.stem in said for p in (ROOT / "minirl_nb" / "recipes").glob("*.yaml"))

    def test_problems(self, minirl):
        assert "dapo_math_17k" in minirl("problems")
