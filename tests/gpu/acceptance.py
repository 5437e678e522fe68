"""Does everything work on this graphics card, and how near is it to what the card can do?

    python tests/gpu/acceptance.py --output acceptance.json [--wheels FOLDER] [SECTION ...]

One command of at most ten minutes for one card of 80 GB. It needs torch (2.11 or newer),
transformers (5.17 or newer), triton and safetensors, with what they require. The sections that
train need three things more, which may come as wheels in FOLDER; they are unpacked into a temporary
folder, so nothing is installed. For Python 3.12 on Linux (40 MB in all):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --dest FOLDER \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        pydantic==2.14.3 pydantic_core==2.50.4 annotated_types==0.8.0 typing_inspection==0.4.5 \\
        scipy==1.17.1 psutil==7.2.2

pydantic checks a run's settings, scipy has Student's quantile for the intervals of an evaluation,
psutil says how much memory the host has. Where they are missing, the sections that need them fail
with the name of what is missing, and the others run.

Each section is a process of its own with a time limit: neither an error on the card nor one that
hangs takes the others down, and none finds another's memory taken. Without a card the same sections
run on the processor at small sizes, with gloo in place of NCCL, so that the script is known to work
before it meets a card; what they then say of speed means nothing. The table is printed and written
to FILE as JSON, with the versions and the device; the exit status is 1 if a section fails."""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 600.0  # seconds of the whole
# Seconds of each section, in the order in which they run: the cheap and the certain first
SECTIONS = {
    "fp8": 40,
    "memory": 40,
    "families": 200,
    "training": 100,
    "fsdp": 60,
    "demo": 120,
    "plan": 150,
}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # cuBLAS repeats its bits only with a workspace of its own
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # looking for a card must not start CUDA: a section is a fork of this process
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@dataclass
class Check:
    "One number of a section. `passed` is None where it is only told."

    name: str
    value: float
    unit: str = ""
    goal: str = ""
    passed: bool | None = None


@dataclass
class Result:
    "What a section found."

    section: str
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        "Did it end, with every goal met, and with at least one goal?"
        judged = [c.passed for c in self.checks if c.passed is not None]
        return not self.error and bool(judged) and all(judged)


def unpack(folder: Path, target: Path) -> None:
    "Put the packages of all wheels of a folder on the path, of this process and of its children."
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels: there is no wheel in {folder}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(target)
    sys.path.insert(0, str(target))
    add_to_path(target)


def add_to_path(folder: Path) -> None:
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def warm_up() -> None:
    """Import once what every section imports; a section then starts as a fork. No tensor is made,
    so no thread of torch's and no CUDA context goes into the forks."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    import minirl_nb.policy  # noqa: F401
    import minirl_nb.routing  # noqa: F401

    try:
        importlib.import_module("minirl_nb.train")
    except ImportError:
        pass  # the sections that need it will say so


def _run_section(name: str, pipe) -> None:
    "In a process of its own: sends each check as it is made, and at the end the error, or ''."
    try:
        import warnings

        from transformers.utils import logging

        from tests.gpu import sections

        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()

        def note(*args, **kwargs) -> None:
            pipe.send(Check(*args, **kwargs))

        getattr(sections, name)(sections.Place.here(), note)
        pipe.send("")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        said = " ".join(str(error).split())[:400]
        pipe.send(f"{type(error).__name__} at {place}: {said}")
    finally:
        pipe.close()


def run_section(name: str, limit: float, method: str = "fork") -> Result:
    "One section, stopped after `limit` seconds."
    result, started = Result(name), time.monotonic()
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_section, args=(name, sender))
    process.start()
    sender.close()
    result.error = f"was stopped after {limit:.0f} s"
    try:
        while receiver.poll(max(0.0, limit - (time.monotonic() - started))):
            said = receiver.recv()
            if isinstance(said, str):
                result.error = said
                break
            result.checks.append(said)
    except EOFError:
        process.join(10)
        result.error = f"its process ended with status {process.exitcode}"
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    result.seconds = time.monotonic() - started
    return result


def describe_machine() -> dict[str, Any]:
    "Versions and device. It asks CUDA, so it runs in a process of its own."
    import torch
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "device": platform.processor() or platform.machine(),
    }
    for name in ("triton", "pydantic", "scipy", "psutil"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["device"] = card.name
        found["memory"] = card.total_memory
        found["capability"] = f"{card.major}.{card.minor}"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _send_machine(pipe) -> None:
    try:
        pipe.send(describe_machine())
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def machine_of(method: str) -> dict[str, Any]:
    "`describe_machine` in a process of its own."
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_machine, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def look_around() -> tuple[dict[str, Any], str]:
    """The machine, and how sections start: as forks, or, where a fork cannot see a card that a
    fresh process sees, as fresh processes, which costs each of them some seconds."""
    import torch

    machine = machine_of("fork")
    if torch.version.cuda and "memory" not in machine:
        fresh = machine_of("spawn")
        if "memory" in fresh:
            return fresh, "spawn"
    return machine, "fork"


def number(x: float) -> str:
    "Four digits, without an exponent where that is short."
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.4g}"


def table(results: list[Result]) -> str:
    "Sections and their checks, as text."
    said = {True: "pass", False: "FAIL", None: ""}
    lines = []
    for r in results:
        lines.append(f"{said[r.passed]:5s} {r.section:10s} {r.seconds:6.1f} s  {r.error}")
        for c in r.checks:
            goal = f"{c.unit:9s} {c.goal:18s} {said[c.passed]}".rstrip()
            lines.append(f"      {c.name:66s} {number(c.value):>12s} {goal}")
    return "\n".join(lines)


def as_json(machine: dict[str, Any], results: list[Result]) -> str:
    rows = [
        {
            "section": r.section,
            "passed": r.passed,
            "seconds": round(r.seconds, 2),
            "error": r.error,
            # JSON has no numbers that are not finite
            "checks": [
                vars(c) | {"value": c.value if math.isfinite(c.value) else None} for c in r.checks
            ],
        }
        for r in results
    ]
    passed = all(r.passed for r in results)
    return json.dumps({"machine": machine, "passed": passed, "sections": rows}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)}; there are {', '.join(SECTIONS)}")
    os.environ |= SETTINGS
    sys.path.insert(0, str(ROOT))
    add_to_path(ROOT)
    deadline, results = time.monotonic() + LIMIT - 10, []
    with tempfile.TemporaryDirectory() as folder:
        # what a section leaves behind goes with this folder, also where it was stopped
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        if args.wheels:
            (Path(folder) / "wheels").mkdir()
            unpack(args.wheels, Path(folder) / "wheels")
        warm_up()
        machine, method = look_around()
        print(json.dumps(machine), flush=True)
        for name in args.sections or SECTIONS:
            limit = min(SECTIONS[name], deadline - time.monotonic())
            results.append(run_section(name, limit, method))
            print(table(results[-1:]), flush=True)
            args.output.write_text(as_json(machine, results), encoding="utf-8")
    passed = all(r.passed for r in results)
    print(f"{'pass' if passed else 'FAIL'}: {sum(r.passed for r in results)} of {len(results)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
