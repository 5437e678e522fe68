"""What must hold for the repository as a whole: floors, rooms, comparison, safety, form, data."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import floors
import outputs
import pytest

from minirl_nb import sources

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = list(floors.module_files().values())
TOOLS = sorted((ROOT / "tools").glob("*.py")) + [ROOT / "setup.py"]
SOURCES = MODULES + sorted((ROOT / "tests").rglob("*.py")) + TOOLS


def module_name(path):
    "The name of a module's file: `vllm.engine`."
    return next(name for name, file in floors.module_files().items() if file == path)


def cells(page):
    return json.loads(page.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


# ------------------------------------------------------------------------------------------ floors
def test_each_module_has_one_page_and_every_page_a_number_or_is_the_index():
    pages, files = floors.module_pages(), floors.module_files()
    listing = {name for name, path in files.items() if path.name == "__init__.py"} - pages.keys()
    assert sorted(pages) == sorted(files.keys() - listing)
    for name in listing:  # a package file that no page writes holds its list of modules and no code
        assert len(ast.parse(files[name].read_text()).body) == 1, f"{files[name]} holds code"
    assert all(re.match(r"\d\d[a-z]*_\w+\.ipynb|index\.ipynb", p.name) for p in PAGES)


@pytest.mark.parametrize("module", floors.module_files())
def test_a_module_imports_only_modules_of_lower_pages(module):
    "Wherever the import stands: inside functions too."
    pages, files = floors.module_pages(), floors.module_files()
    for target, line in sources.imports(module, files):
        own_page, target_page = pages.get(module, ""), pages.get(target, "")
        said = f"{module} (page {own_page}), line {line}, imports {target} (page {target_page})"
        assert target_page < own_page, said


def test_no_imports_in_a_circle():
    assert floors.circle(floors.graph()) is None


def test_the_reader_of_imports_sees_every_form(tmp_path):
    for name in ("low", "mid", "high", "pack/__init__", "pack/inner", "user"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / "user.py").write_text(
        "from minirl_nb import low\n"
        "def f():\n"
        "    import minirl_nb.mid as m\n"
        "    from .pack import inner, something\n"
        "    importlib.import_module('minirl_nb.high')\n"
    )
    (tmp_path / "pack" / "inner.py").write_text("from ..low import x\nfrom . import y\n")
    files = floors.module_files(tmp_path)
    assert {t for t, _ in sources.imports("user", files)} == {
        "low",
        "mid",
        "high",
        "pack",
        "pack.inner",
    }
    assert {t for t, _ in sources.imports("pack.inner", files)} == {"low", "pack"}
    assert floors.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert floors.levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}


def test_the_map_and_the_counts_in_contributing_are_current():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert guide == floors.filled(guide), "run `python tools/floors.py --write`"


# ------------------------------------------------------------------------------------------- rooms
# A module, a function and a cell should be read in one go. Modules and cells have a tenth of grace.
MODULE_LINES, FUNCTION_LINES, CELL_LINES, GRACE = 450, 60, 40, 1.1


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_and_functions_are_rooms(path):
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    assert lines <= MODULE_LINES * GRACE, f"{lines} lines: split the page"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES * GRACE, f"{node.name} has {lines} lines"


def code_lines(source):
    "Lines of code of a cell: no blank line, comment or docstring counts."
    lines = set()
    for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if hasattr(node, "lineno") and not docstring and not isinstance(node, ast.Constant):
            lines.update(
                (node.lineno, node.end_lineno)
                if hasattr(node, "body")
                else range(node.lineno, node.end_lineno + 1)
            )
    return len(lines)


# Cells that hold more than they should: classes whose methods need one another, and tables. New ones
# are to be divided; take the number down when some are.
LONG_CELLS_CEILING = 14


def test_long_cells_become_fewer():
    found = [
        f"{page.stem} cell {number}: {code_lines(text(cell))} lines"
        for page in PAGES
        for number, cell in enumerate(cells(page))
        if cell["cell_type"] == "code" and code_lines(text(cell)) > CELL_LINES * GRACE
    ]
    assert len(found) <= LONG_CELLS_CEILING, "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_lines_of_a_module_have_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [n for n, line in enumerate(lines, 1) if len(line) > 100]
    assert not long, f"lines {long}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_opens_with_its_claim(path):
    page = floors.module_pages().get(module_name(path))
    if page:
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert said.startswith("**Claim.**") and said.rstrip().endswith((".", "?", "!", "`", ")"))


# ------------------------------------------------------------------------------------------- names
# Words that had to be looked up at their definition; what they name has a word of its own.
NAMES_THAT_SAY_NOTHING = set(
    "alarm beside chain held into many most need neighbours of owners rest there touched wide "
    "_even _foresee _half _meet _wrong".split()
)


def names_given(tree):
    "(name, line) of all that a module defines: variables, attributes, parameters, definitions."
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_names_say_what_they_name(path):
    given = names_given(ast.parse(path.read_text(encoding="utf-8")))
    found = [f"{name}, line {line}" for name, line in given if name in NAMES_THAT_SAY_NOTHING]
    assert not found, found


# "chain" is allowed: page 02b's Markov chain, and a written multiplication


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.name)
def test_names_of_pages_and_tests_say_what_they_name(path):
    if path.suffix == ".py":
        sources = [path.read_text(encoding="utf-8")]
    else:
        sources = [text(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    trees = [ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)) for source in sources]
    given = {name for tree in trees for name, _ in names_given(tree)}
    assert not given & (NAMES_THAT_SAY_NOTHING - {"chain"})


def test_the_reader_of_names_sees_every_form():
    source = "class A:\n def b(self, c, *d, e=0):\n  f, *g = c\n  self.h = [i for i in d]\n  x(j=e)"
    assert {name for name, _ in names_given(ast.parse(source))} == set("Abcdefghi") | {"self"}


# ------------------------------------------------------------------------------------------- words
# Words and turns for which plain English has others: predict, show, "per token". Quotations of other
# people's texts would be exempt; there are none.
ODD_WORDS = re.compile(
    r"\b(foret(ell|ells|elling|old)|foresee(n|s)?|convict(s|ed)?|witness(es|ed)?"
    r"|(bits|bytes|experts|nats|samples|choices|flips|operations|parameters|responses) a "
    r"(token|weight|problem|matrix|rank|row|step|gradient step|mini-batch|arm|layer)"
    r"|without a word|nobody takes)\b"
)


def sentences(path):
    "What a file says to a reader: a page's cells, a module's comments, docstrings and messages."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n".join(text(cell) for cell in cells(path))


@pytest.mark.parametrize(
    "path", [*PAGES, *MODULES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_sentences_use_plain_words(path):
    found = [" ".join(match[0].split()) for match in ODD_WORDS.finditer(sentences(path))]
    assert not found, found


# -------------------------------------------------------------------------------- the way through
def test_a_rollout_step_takes_one_module_per_phase_below_the_loop():
    "The path that the front page names: every phase of the loop, one module each, in lower pages."
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (path,) = re.findall(r"Each phase of a rollout step has its own module, .*?: (.*?)\. ", text)
    named = re.findall(r"(\w+) in `([\w.]+)`", path)
    assert len(named) == path.count("`") // 2  # nothing but a phase and its room
    assert [phase for phase, _ in named] == ["sample", "verify", "recompute", "update", "transfer"]
    pages, below = floors.module_pages(), floors.graph()
    reached, todo = set(), ["train"]
    while todo:
        todo += (found := below[todo.pop()] - reached)
        reached |= found
    for _, module in named:
        assert module in reached and pages[module] < pages["train"], module


# ------------------------------------------------------------------------------- what is compared
# Cells whose text no run compares: times and memory sizes. New ones need a better idea.
VOLATILE_CEILING = 10


def test_every_band_parses_and_has_a_reason():
    for page in PAGES:
        for number, cell in enumerate(cells(page)):
            if cell["cell_type"] == "code":
                try:
                    outputs.band(cell)
                except ValueError as e:
                    pytest.fail(f"{page.name}, cell {number} ({cell['id']}): {e}")


def test_few_cells_are_not_compared():
    counts = floors.text_cells()
    assert counts["volatile"] <= VOLATILE_CEILING, f"{counts['volatile']} volatile cells print text"


# ---------------------------------------------------------------------------------- safety and form
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_star_imports_pickle_or_remote_code(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != "*" for a in node.names), f"star import, line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom) and path in MODULES:
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            bad = {n.split(".")[0] for n in names} & {
                "pickle",
                "dill",
                "cloudpickle",
                "nbdev",
                "fastcore",
                "shelve",
            }
            assert not bad, f"imports {bad}, line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if path in MODULES:
                assert called not in ("torch.load", "torch.save", "yaml.load", "eval", "exec"), (
                    f"{called}, line {node.lineno}"
                )
            for k in node.keywords:
                assert k.arg != "trust_remote_code", f"trust_remote_code, line {node.lineno}"


# Pages that choose colours or a theme themselves, and may: this one imports nothing of the package.
OWN_LOOK = {"00_one_page"}
LOOK = re.compile(
    r"set_theme|set_style|rcParams|plt\.style|color_palette|palettes|cmap="
    r"""|colou?r=["']|["']#[0-9a-fA-F]{6}["']"""
)


def test_colours_and_sizes_come_from_the_theme():
    own = {
        page.stem
        for page in PAGES
        if page.stem != "00_theme"
        and any(c["cell_type"] == "code" and LOOK.search(text(c)) for c in cells(page))
    }
    assert not own - OWN_LOOK, f"take colours and theme from `theme`: {sorted(own - OWN_LOOK)}"
    assert not OWN_LOOK - own, f"strike them off the list: {sorted(OWN_LOOK - own)}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "index.ipynb"], ids=lambda p: p.stem
)
def test_form_of_a_page(page):
    first = text(cells(page)[0])
    assert first.startswith("# ") and "> **Claim.**" in first, (
        "a page opens with its title and its claim"
    )
    size = page.stat().st_size
    assert size <= 340_000, (
        f"{size} bytes: split the page"
    )  # the guide is 300 kB; a tenth of grace for pictures
    assert len(cells(page)) <= 66
    last = cells(page)[-1]
    assert last["cell_type"] == "markdown"
    assert re.search(r"\bnext\b|page `\d\d[a-z]*_", text(last), re.I), (
        "a page ends with what the next one needs"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_error_or_warning_is_stored(page):
    for c in cells(page):
        for o in c.get("outputs", []):
            assert o["output_type"] != "error"
            assert not (o["output_type"] == "stream" and o.get("name") == "stderr"), "".join(
                o["text"]
            )[:300]


def tracked():
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / f for f in out.stdout.splitlines()]


def test_files_speak_of_the_project_alone():
    words = re.compile(
        r"/work/|/tmp/|/root/|\bissue \d|pypi\.org|download\.pytorch\.org|files\.pythonhosted"
    )
    for path in tracked():
        texts = (
            ".md",
            ".py",
            ".ipynb",
            ".yaml",
            ".yml",
            ".ini",
            ".toml",
            ".txt",
            ".json",
            ".jsonl",
            "",
        )
        if path.suffix not in texts or path == Path(__file__).resolve():
            continue
        found = words.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"


def test_nothing_large_or_foreign_is_tracked():
    for path in tracked():
        assert path.stat().st_size < 3_000_000, path
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".log", ".pyc"), path


def test_data_is_described():
    readme = (ROOT / "data" / "README.md").read_text()
    for path in (ROOT / "data").iterdir():
        if path.name != "README.md":
            assert path.name in readme, f"data/{path.name} is not in data/README.md"


def test_settings_and_setup_agree():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    cfg = config["DEFAULT"]
    assert cfg["tst_flags"] == "notest slow gpu vllm"
    assert cfg["black_formatting"] == cfg["update_pyproject"] == "False"
    version = (ROOT / "minirl_nb" / "__init__.py").read_text().strip()
    assert version == f'__version__ = "{cfg["version"]}"'
    assert {"torch", "transformers", "einops", "seaborn"} <= required(cfg["requirements"])
    assert not {"nbdev", "fastcore", "jupyter"} & required(cfg["requirements"])
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    kinds = ("requirements", "dev_requirements", "vllm_cpu_requirements")
    missing = set().union(*(required(cfg[kind]) for kind in kinds)) - pinned
    assert not missing, f"no tested version of {missing}"


def required(words):
    "Names of the packages in a line of requirements."
    return {re.split(r"[<>=!]", word)[0].lower().replace("_", "-") for word in words.split()}


def test_every_import_of_the_package_is_required():
    "A package that the modules import is one of the requirements, or an optional one."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    optional = {"vllm", "reasoning-gym", "tensorboard", "wandb", "trackio", "bokeh", "minirl-nb"}
    optional |= {"verl", "trl"}
    # two come with math-verify and one with datasets; a notebook, where IPython is used, brings it
    optional |= {"antlr4", "sympy", "requests", "IPython"}
    names = {"yaml": "pyyaml"}
    known = required(config["DEFAULT"]["requirements"]) | optional | set(sys.stdlib_module_names)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            for name in found:
                top = name.partition(".")[0]
                package = names.get(top, top.replace("_", "-"))
                assert package in known or top in known, f"{path.name} imports {name}"
