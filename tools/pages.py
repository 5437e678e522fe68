"""The pages' tool: build, check and export the notebooks.

`make test` runs its checks, `make page` its builder.

    python tools/pages.py text 02_weights     # write nbs/02_weights.py, to edit outside Jupyter
    python tools/pages.py build 02_weights    # text (if any) -> notebook -> exported, executed,
                                              # outputs stored, cleaned
    python tools/pages.py clean --check       # are all notebooks clean, in nbdev's sense?
    python tools/pages.py export --check      # do the notebooks export just these modules?
    python tools/pages.py readme --check      # is README.md what nbs/index.ipynb gives?
    python tools/pages.py run [names]         # each page in a process of its own, outputs compared
    python tools/pages.py run 11_vllm --flags vllm    # its cells that need vLLM too
    python tools/pages.py run --numerics      # only pages that hang on a processor's kernels;
                                              # figures are made, and no pictures of them
    python tools/pages.py run --quick         # all but the slow ones; `--slow` runs those

How outputs are compared, and the directives that allow a difference, stand in `outputs.py`. Text on
stderr and pictures are never compared.
"""

import argparse
import atexit
import copy
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import leftovers
from outputs import difference, directives
from pictures import with_palettes

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB, PROC = ROOT / "nbs", ROOT / "minirl_nb", ROOT / "_proc"
WIDTH = 100
PAGE_TIMEOUT = 600  # seconds; a page takes about a minute, on a loaded machine more
SECONDS = ROOT / "tools" / "seconds.json"
PAGE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "agg",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of pyarrow; a fork would lose the thread
    "PYTHONWARNINGS": "ignore::DeprecationWarning",
    "TORCHINDUCTOR_CACHE_DIR": str(PROC / "inductor"),  # torch's default is the temporary folder
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # they lie there in any case
}
# What takes seconds to import and what many pages import. The process that starts the pages imports
# it once, and pages are forks of that process. Nothing of this package is among it.
LIBRARIES = """
    nbdev.test execnb.nbio torch torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint
    torch.distributed.tensor transformers accelerate datasets pandas scipy.stats seaborn
    matplotlib.pyplot matplotlib_inline.backend_inline sympy tyro
""".split()
# Pages that start many processes or plan for many GPUs, one to two minutes of processor time each.
# `run --quick` leaves them out, `run --slow` runs them alone
SLOW = ["14d_parallel", "15g_ahead", "16g_plan", "16h_rehearsal", "23_full_run"]
# Pages whose numbers cannot hang on a processor's kernels, and why; `run --numerics` skips them
NO_NUMERICS = {
    "04c_ragged": "indices and bytes",
    "05_batch": "indices and bytes",
    "09_answers": "text and exact verdicts",
    "09_equality": "exact verdicts",
    "09_notation": "text",
    "09_values": "text and exact verdicts",
    "09_verification": "text and exact verdicts",
    "09a_arithmetic": "text and exact verdicts",
    "09ab_problem_files": "text and files",
    "09ac_sums": "text and files",
    "09b_tasks": "text and files",
    "09c_benchmarks": "text and files",
    "09d_selection": "text and files",
    "09e_verdicts": "text and files",
    "11b_vllm_names": "names of another package",
    "11c_vllm_emulation": "settings and messages",
    "11d_vllm_worker": "settings and messages",
    "11i_vllm_server": "processes and messages",
    "12b_pretrained": "files and messages",
    "12d_replay_at_depth": "recorded numbers",
    "14_config": "messages",
    "14ea_metrics": "names and text",
    "14b_checks": "messages",
    "14e_checkpoint": "files, and bits of one process",
    "14fa_ahead": "processes, and bits that two of them share",
    "15a_study": "files, and bits of one process",
    "15b_results": "recorded numbers",
    "15c_logs": "text and files",
    "15d_diagnose": "recorded numbers",
    "15f_dashboard": "text, and numbers as a log holds them",
    "16a_case": "shapes without numbers",
    "16b_ledger": "shapes without numbers",
    "16c_step": "shapes without numbers",
    "16d_time": "shapes without numbers",
    "16e_memory": "shapes without numbers",
    "16f_report": "shapes without numbers",
    "16g_plan": "shapes without numbers",
    "16h_rehearsal": "bytes",
    "23_full_run": "a plan without numbers, and runs as pages 13 and 15 hold them",
    "24_real_model": "recorded numbers",
    "index": "no code",
}


def notebooks(names=()):
    found = {p.stem: p for p in sorted(NBS.glob("*.ipynb"))}
    wanted = [
        n.removesuffix(".ipynb").removesuffix(".py").removeprefix("nbs/") for n in names
    ] or list(found)
    for name in wanted:
        if name not in found:
            sys.exit(f"no page nbs/{name}.ipynb; the pages are: {', '.join(found)}")
    return [found[n] for n in wanted]


def notebook_cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


# -------------------------------------------------------------------------------------------- clean
def cleaned(text):
    """The notebook `text` as nbdev_clean writes it."""
    from execnb.nbio import dict2nb, nb2str
    from nbdev.clean import clean_nb

    nb = dict2nb(json.loads(text))
    clean_nb(nb)
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
        if (
            cell["cell_type"] == "code"
        ):  # progress bars and warnings of libraries are no part of a page
            cell["outputs"] = [
                o
                for o in cell["outputs"]
                if not (o["output_type"] == "stream" and o.get("name") == "stderr")
            ]
    return nb2str(nb)


def clean(names, check):
    dirty = []
    for path in notebooks(names):
        before = path.read_text(encoding="utf-8")
        after = cleaned(before)
        if before != after:
            dirty.append(path.name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if check and dirty:
        sys.exit(f"not clean: {', '.join(dirty)}; run `python tools/pages.py clean`")
    print(
        f"clean: {len(notebooks(names))} notebooks, {len(dirty)} rewritten"
        if not check
        else "clean: all notebooks"
    )


# ------------------------------------------------------------------------------------------- export
@contextmanager
def _locked():
    """One export at a time: they share `_modidx.py`."""
    PROC.mkdir(exist_ok=True)
    with open(PROC / "export.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _generated():
    return {str(p.relative_to(LIB)): p.read_bytes() for p in sorted(LIB.rglob("*.py"))}


def _wrapped(block, indent):
    """A paragraph, or the items of a list, within `WIDTH` columns behind `indent`."""
    lines = []
    for item in re.split(r"\n(?=[-*] |\d+\. )", block):
        marker = re.match(r"[-*] |\d+\. |", item).group()
        lines += textwrap.wrap(
            " ".join(item.split()),
            WIDTH,
            initial_indent="" if lines else indent,
            subsequent_indent=" " * len(marker),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines).removeprefix(indent)


def docstring(source):
    """The docstring of a module, from the first cell of its page.

    That is the whole claim (every quoted line), then the paragraphs and lists below it up to the
    first heading, table, block of code or displayed formula; links keep their words only.
    """
    body = re.sub(r"(?<!!)\[([^\]]+)\]\([^)]+\)", r"\1", source.partition("\n")[2].strip("\n"))
    claim, blocks = [], []
    for block in re.split(r"\n\s*\n", body):
        if block.startswith(
            ">"
        ):  # a line without the sign goes on with the quotation, as in Markdown
            claim.append(re.sub(r"^> ?", "", block, flags=re.M))
        elif re.match(r"#|\||```|\$\$|!\[", block.strip()):
            break
        else:
            blocks.append(block)
    if not claim:
        return ""
    claim = [part for block in claim for part in re.split(r"\n\s*\n", block)]
    if blocks and not blocks[-1].rstrip().endswith((".", "?", "!", "`")):
        del blocks[-1]  # it introduces what stands only on the page
    text = claim + blocks
    opening = 'r"""' if any("\\" in block for block in text) else '"""'
    text = "\n\n".join(
        _wrapped(block, "" if i else " " * len(opening)) for i, block in enumerate(text)
    )
    if '"""' in text:
        sys.exit(
            f"a page's first cell becomes a docstring and cannot contain three quotes: {text!r}"
        )
    end = "\n" if "\n" in text or text.endswith('"') else ""
    return f'{opening}{text}{end}"""\n\n'


class _BehindAll(textwrap.TextWrapper):
    """Breaks a list of names that nbdev writes behind `__all__ = `: its first line has less room."""

    def wrap(self, text):
        front = "__all__ = "
        first, *more = super().wrap(front + text)
        return [first.removeprefix(front), *more]


@contextmanager
def _nbdev_docstrings():
    """nbdev, but a module's docstring is the whole claim and `__all__` keeps to our width."""
    import nbdev.maker as maker

    kept = maker._retr_mdoc, maker.TextWrapper

    def retrieved(cells):
        first = next((c.source for c in cells if c.cell_type == "markdown"), "")
        return docstring(first)

    maker._retr_mdoc = retrieved
    maker.TextWrapper = lambda width, **options: _BehindAll(width=WIDTH, **options)
    try:
        yield
    finally:
        maker._retr_mdoc, maker.TextWrapper = kept


def _write_package_files():
    """Give each subpackage that no page writes an `__init__.py` which lists its modules."""
    pages = {name: path for path in notebooks() for name in exported_modules(path)}
    for folder in sorted({name.rpartition("/")[0] for name in pages} - {""}):
        target = LIB / folder / "__init__.py"
        if f"{folder}/__init__.py" in pages:
            continue
        lines = [f'"""The modules of `{folder.replace("/", ".")}`.', ""]
        for name, path in sorted(pages.items(), key=lambda entry: entry[1].name):
            if name.rpartition("/")[0] == folder:
                title = "".join(notebook_cells(path)[0]["source"]).splitlines()[0].lstrip("# ")
                lines.append(f"- `{Path(name).stem}`: {title} (page `{path.stem}`)")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines + ['"""', ""]), encoding="utf-8")


def export(names=(), check=False):
    """Export pages to modules.

    With `check`, delete every generated module first and require the same bytes back.
    """
    os.chdir(ROOT)
    from nbdev.config import add_init
    from nbdev.doclinks import _build_modidx
    from nbdev.export import nb_export

    with _locked(), _nbdev_docstrings():
        before = _generated()
        if check:
            for name in before:
                (LIB / name).unlink()
        for path in notebooks(names):
            nb_export(path)
        add_init()
        _write_package_files()
        if not names:
            # nbdev never deletes a module whose page is gone
            exported = {name for path in notebooks() for name in exported_modules(path)}
            packages = {f"{name.rpartition('/')[0]}/__init__.py".lstrip("/") for name in exported}
            for name in set(_generated()) - exported - packages - {"_modidx.py", "__init__.py"}:
                (LIB / name).unlink()
            for folder in [p for p in LIB.rglob("*") if p.is_dir() and p.name != "__pycache__"]:
                if not [
                    p for p in folder.rglob("*") if p.name != "__pycache__" and p.suffix != ".pyc"
                ]:
                    shutil.rmtree(folder)
        (LIB / "_modidx.py").unlink(missing_ok=True)
        _build_modidx()
        after = _generated()
    if check and before != after:
        changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        sys.exit(
            f"the package is not what the notebooks export: {', '.join(changed)}; "
            "run `python tools/pages.py export`"
        )
    print(f"export: {len(after)} modules" + (", unchanged" if check else ""))


def exported_modules(path):
    """Files of the package that a page writes: by `default_exp`, and by `#| export MODULE`."""
    names = set()
    for cell in notebook_cells(path):
        for name in re.findall(
            r"^#\|\s*(?:default_exp|exporti?)[ \t]+([\w.]+)", "".join(cell["source"]), re.M
        ):
            names.add(name.replace(".", "/") + ".py")
    return names


# ------------------------------------------------------------------------------------------- readme
def readme(check):
    """README.md from nbs/index.ipynb: nbdev's processors, then nbconvert; no Quarto."""
    os.chdir(ROOT)
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main as process

    out = ROOT / "_proc" / "readme"
    out.mkdir(parents=True, exist_ok=True)
    process(
        (NBS / "index.ipynb", out / "index.ipynb", FilterDefaults)
    )  # what nbdev.serve.proc_nbs does with one page
    page = json.loads((out / "index.ipynb").read_text(encoding="utf-8"))
    for cell in page["cells"]:  # Quarto would leave the code of these out: keep what they show
        if cell["cell_type"] == "code" and "echo" in directives(cell):
            shown = "\n".join(
                "".join(o["data"]["text/markdown"])
                for o in cell.pop("outputs")
                if "text/markdown" in o.get("data", {})
            )
            cell.update(cell_type="markdown", source=shown)
            cell.pop("execution_count", None)
    (out / "index.ipynb").write_text(json.dumps(page), encoding="utf-8")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "jupyter",
            "nbconvert",
            "--to",
            "markdown",
            "--log-level",
            "ERROR",
            "--output-dir",
            str(out),
            "--output",
            "README",
            str(out / "index.ipynb"),
        ],
        check=True,
    )
    text = (out / "README.md").read_text(encoding="utf-8")
    title = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"][0][
        "source"
    ]  # nbdev makes front matter of it
    text = "".join(title) + "\n\n" + re.sub(r"^---\n.*?\n---\n", "", text, count=1, flags=re.S)
    text = text.replace("<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->", "")
    text = re.sub(r"\n{3,}", "\n\n", text)
    # links are written from nbs/; the README stands one folder higher
    text = re.sub(r"\]\(\.\./", "](", re.sub(r"\]\((\w+\.ipynb)", r"](nbs/\1", text))
    text = (
        "<!-- Made from nbs/index.ipynb by `python tools/pages.py readme`; edit that page. -->\n\n"
        + text.strip()
        + "\n"
    )
    shutil.rmtree(out, ignore_errors=True)
    target = ROOT / "README.md"
    same = target.exists() and target.read_text(encoding="utf-8") == text
    if check and not same:
        sys.exit("README.md is not what nbs/index.ipynb gives; run `python tools/pages.py readme`")
    if not check:
        target.write_text(text, encoding="utf-8")
    print("readme: " + ("as nbs/index.ipynb gives it" if same else "rewritten"))


# ---------------------------------------------------------------------------------------------- run
def _with_page_environment():
    """Begin anew with the environment of pages: libraries read much of it when they are imported,
    Python its own part when it starts."""
    if any(os.environ.get(name) != value for name, value in PAGE_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PAGE_ENVIRONMENT)


def _import_libraries():
    """Import what pages import, before the first fork.

    Nothing is computed here, because a fork keeps memory and loses threads. Apple's libraries do
    not survive a fork, so on macOS each page imports for itself.
    """
    if sys.platform == "darwin":
        return
    for name in LIBRARIES:
        import_module(name)
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    if len(threads) > 1:
        sys.exit(f"a page cannot be a fork of a process with threads: {', '.join(threads)}")


def _fork(path, result, folder):
    """Number of a new process that runs one page and has `folder` as its temporary folder.

    It leads a session of its own, by which its descendants are found.
    """
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        log = os.open(result.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
        status = _execute_here(path, result)
    except BaseException:
        traceback.print_exc()
    finally:  # the end of a process, without what the parent has yet to do
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_pictures = True  # pages draw theirs; pictures are compared with nothing, so one pass is enough


def _execute_here(path, result):
    """Run one page in this process by nbdev's own test; `result` gets it with its new outputs."""
    os.chdir(ROOT)
    import nbdev.test
    from execnb.nbio import nb2str
    from matplotlib.figure import Figure
    from nbdev.config import get_config

    kept = []

    class KeepingShell(nbdev.test.CaptureShell):
        def run_all(self, nb, **kwargs):
            kept.append(nb)
            if not _pictures:
                self.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: "")
            return super().run_all(nb, **kwargs)

    nbdev.test.CaptureShell = KeepingShell
    raw = json.loads(path.read_text(encoding="utf-8"))
    skip = [
        f
        for f in get_config().tst_flags.split()
        if f not in os.environ.get("PAGES_FLAGS", "").split()
    ]
    ok, _ = nbdev.test.test_nb(path, skip_flags=skip, basepath=ROOT)
    ran = json.loads(nb2str(kept[0]))["cells"] if kept else []
    fresh = {c["id"]: c.get("outputs", []) for c in ran if c["cell_type"] == "code"}
    for cell in raw["cells"]:
        if cell["cell_type"] == "code" and not directives(cell) & set(skip):
            cell["outputs"] = fresh.get(cell["id"], [])
    result.write_text(cleaned(json.dumps(raw)), encoding="utf-8")
    return 0 if ok else 1


def compare(stored, fresh):
    """Messages for the cells of `fresh` whose text is not the one that `stored` holds."""
    messages = []
    for i, (a, b) in enumerate(zip(stored["cells"], fresh["cells"], strict=True)):
        if a["cell_type"] == "code" and (found := difference(a, b)):
            messages.append(f"cell {i} ({a['id']}): {found}")
    return messages


def seconds_of_pages():
    """{page: seconds} as recorded by `run --record`."""
    return json.loads(SECONDS.read_text(encoding="utf-8"))["pages"] if SECONDS.exists() else {}


def record(measured):
    """Keep the seconds of pages, rounded, and forget pages that are gone."""
    kept = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}
    pages = kept.get("pages", {}) | {name: round(s) for name, s in measured.items()}
    kept["pages"] = {p.stem: pages[p.stem] for p in notebooks() if p.stem in pages}
    SECONDS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@dataclass
class _Running:
    """One page that runs in a process of its own, with a temporary folder of its own."""

    path: Path
    result: Path  # where the notebook with fresh outputs will be
    folder: Path
    process: int
    started: float
    status: int | None = None  # the exit status, when the process has ended
    processor: float = 0.0  # seconds of it, its own children's among them, when it has ended

    @classmethod
    def start(cls, path, work):
        result, folder = work / path.name, Path(tempfile.mkdtemp(prefix="page-"))
        return cls(path, result, folder, _fork(path, result, folder), time.time())

    def ended(self):
        if self.status is None:
            process, status, used = os.wait4(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
                self.processor = used.ru_utime + used.ru_stime
        return self.status is not None or self.seconds() > PAGE_TIMEOUT

    def seconds(self):
        return time.time() - self.started

    def kill(self):
        os.kill(self.process, signal.SIGKILL)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def problems(self, write):
        """What is wrong with a page that ended; with `write`, its outputs are stored."""
        found = []
        if self.status is None:
            self.kill()
            found.append(f"still running after {PAGE_TIMEOUT} s")
        if self.status:
            printed = self.result.with_suffix(".out").read_text()[-6000:]
            found.append(f"exit status {self.status}\n{printed}")
        elif write:
            made = with_palettes(self.result.read_text(encoding="utf-8"))
            self.path.write_text(made, encoding="utf-8")
        else:
            stored, fresh = (json.loads(p.read_text()) for p in (self.path, self.result))
            found += compare(stored, fresh)
        left = leftovers.tidy(self.folder, session=self.process)
        found += [f"left behind, {said}" for said in left]
        shutil.rmtree(self.folder, ignore_errors=True)
        return found

    def stop(self):
        if self.status is None:
            self.kill()
        leftovers.tidy(self.folder, session=self.process, patience=0)
        shutil.rmtree(self.folder, ignore_errors=True)


def run(names, jobs, write=False, keep_seconds=False):
    """Run pages, each in a process of its own with one thread, `jobs` at a time, the longest first.

    A page fails if a cell raises, prints what its stored output does not allow, or leaves a file in
    the temporary folder or a process behind.
    """
    work = PROC / f"pages-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    known = seconds_of_pages()
    queue = sorted(notebooks(names), key=lambda p: -known.get(p.stem, PAGE_TIMEOUT))
    count, running, failed, measured, started = len(queue), [], [], {}, time.time()
    _import_libraries()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                running.append(_Running.start(queue.pop(0), work))
            time.sleep(0.05)
            for page in [p for p in running if p.ended()]:
                measured[page.path.stem] = page.seconds()
                problems = page.problems(write)
                running.remove(page)
                mark = "FAIL" if problems else "ok  "
                took = f"{measured[page.path.stem]:.0f} s, {page.processor:.0f} s of the processor"
                print(f"  {mark} {page.path.name}  {took}", flush=True)
                for said in problems:
                    print("    " + said.replace("\n", "\n    "), flush=True)
                if problems:
                    failed.append(page.path.name)
    finally:
        for page in running:
            page.stop()
        shutil.rmtree(work, ignore_errors=True)
    if failed:
        sys.exit(f"pages failed: {', '.join(failed)}")
    if keep_seconds:
        record(measured)
    print(f"run: {count} pages in {time.time() - started:.0f} s")


def selected(names, numerics=False, quick=False, slow=False):
    """Names of the pages to run: those of `names`, or all, and of these only the pages that compute
    with models or sampled numbers, all but the slow ones, or only those."""
    found = [p.stem for p in notebooks(names)]
    if numerics:
        found = [n for n in found if n not in NO_NUMERICS]
    if quick or slow:
        found = [n for n in found if (n in SLOW) == slow]
    return found


# -------------------------------------------------------------------------------- text <-> notebook
def to_text(name):
    import jupytext

    path = NBS / f"{name}.ipynb"
    nb = jupytext.read(path)
    target = NBS / f"{name}.py"
    jupytext.write(nb, target, fmt="py:percent")
    print(f"wrote {target.relative_to(ROOT)}; edit it, then `python tools/pages.py build {name}`")


def from_text(name):
    """Replace the page's cells by those of its text form.

    A cell that did not change keeps its id and outputs.
    """
    import jupytext

    source, target = NBS / f"{name}.py", NBS / f"{name}.ipynb"
    new = jupytext.read(source)
    old = {}
    if target.exists():
        for c in json.loads(target.read_text(encoding="utf-8"))["cells"]:
            old.setdefault("".join(c["source"]), []).append(c)
    cells, seen = [], set()
    for c in new.cells:
        text = c["source"]
        cell = (
            copy.deepcopy(old[text].pop(0))
            if old.get(text)
            else {"cell_type": c["cell_type"], "metadata": {}, "source": text}
        )
        if c["cell_type"] == "code":
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
        if "id" not in cell:
            salt = 0
            while (i := hashlib.sha1(f"{name}{salt}{text}".encode()).hexdigest()[:8]) in seen:
                salt += 1
            cell["id"] = i
        seen.add(cell["id"])
        cells.append(cell)
    nb = {
        "cells": cells,
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        },
    }
    target.write_text(cleaned(json.dumps(nb)), encoding="utf-8")


def build(names, jobs):
    for name in names:
        if (NBS / f"{name}.py").exists():
            from_text(name)
    export(names)  # first, so that a page can import what it exports
    run(names, jobs, write=True)
    for path in notebooks(names):
        size = path.stat().st_size / 1000
        cells = json.loads(path.read_text())["cells"]
        long = [
            i
            for i, c in enumerate(cells)
            if c["cell_type"] == "code" and len("".join(c["source"]).splitlines()) > 40
        ]
        print(
            f"{path.name}: {len(cells)} cells, {size:.0f} kB"
            + (f", long cells {long}" if long else "")
        )


def main():
    global _pictures
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["clean", "export", "readme", "run", "text", "build"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--flags",
        default="",
        help="run cells with these directives too, such as vllm, which are skipped otherwise",
    )
    parser.add_argument(
        "--numerics", action="store_true", help="run the pages that hang on a processor's kernels"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="run all pages but the slow ones")
    part.add_argument("--slow", action="store_true", help="run the slow pages")
    parser.add_argument(
        "--record", action="store_true", help="keep the seconds of pages in tools/seconds.json"
    )
    args = parser.parse_intermixed_args()
    names = [n.removesuffix(".ipynb").removesuffix(".py").removeprefix("nbs/") for n in args.names]
    if args.flags:
        os.environ["PAGES_FLAGS"] = args.flags
    if args.command in ("run", "build"):
        _with_page_environment()
    if args.command == "clean":
        clean(names, args.check)
    elif args.command == "export":
        export(names, args.check)
    elif args.command == "readme":
        readme(args.check)
    elif args.command == "run":
        wanted = selected(names, args.numerics, args.quick, args.slow)
        if not wanted:  # no names would mean all pages
            sys.exit("run: none of these pages belongs to what was asked for")
        _pictures = not args.numerics
        run(wanted, args.jobs, keep_seconds=args.record)
    elif args.command == "text":
        for name in names:
            to_text(name)
    else:
        build(names, args.jobs)


if __name__ == "__main__":
    main()
