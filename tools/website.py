"""The book as a website: `make site`.

    python tools/website.py            # the site, in _proc/site
    python tools/website.py --pages    # only the pages that MkDocs reads, in _proc/book

Nothing is executed: text, tables and pictures are the stored outputs. Each notebook becomes a page
of Markdown, so that MkDocs checks every link and anchor, and its theme lays out code, formulas and
pictures in light and dark. (A notebook that arrives as HTML, as plugins for Jupyter give it, passes
MkDocs by unchecked.) The parts of the book are those of the map in nbs/index.ipynb.
"""

import argparse
import ast
import base64
import importlib.util
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import floors
from outputs import directives
from pages import notebook_cells as cells
from pages import notebooks

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", "minirl_nb"
BOOK, SITE = ROOT / "_proc" / "book", ROOT / "_proc" / "site"
# documents outside of nbs/ that pages link to: their place in the repository, and their title
DOCUMENTS = {
    "CONTRIBUTING.md": "Contributing",
    "LOG.md": "Log",
    "data/README.md": "Data",
    "data/routing_conformance.md": "Replay by model family",
}
FILES = ("CITATION.cff", "LICENSE")  # linked to, and served as they are
WIDE = 100  # characters of code that a laptop shows in one line
_FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.M | re.S)
_CODE = re.compile(r"(`+[^`]+`+)")


# ------------------------------------------------------------------------------------- the notebooks
def pages():
    "{stem: file} of all notebooks."
    return {path.stem: path for path in notebooks()}


def source(cell):
    return "".join(cell["source"])


def title(path):
    return source(cells(path)[0]).partition("\n")[0].lstrip("# ").strip()


def parts():
    """The parts of the book, from the map: {part: {subject: [stems of pages]}}.

    A row names pages one by one, or a range `[11_vllm] to [11j_vllm_served]`.
    """
    order = list(pages())
    text = "\n".join(source(c) for c in cells(NBS / "index.ipynb"))
    _, _, text = text.partition("## Map of the book\n")
    found = {}
    for part in re.split(r"^### ", re.split(r"^## ", text, flags=re.M)[0], flags=re.M)[1:]:
        rows = found[part.partition("\n")[0].strip()] = {}
        for line in part.splitlines():
            cut = [field.strip() for field in line.strip("|").split("|")]
            if not line.startswith("|") or not re.search(r"\]\(\w+\.ipynb\)", line):
                continue
            stems = []
            for first, last in re.findall(
                r"\]\((\w+)\.ipynb\)(?: to \[\w+\]\((\w+)\.ipynb\))?", cut[1]
            ):
                stems += order[order.index(first) : order.index(last or first) + 1]
            rows[cut[0]] = stems
    return found


# ------------------------------------------------------------------------------------------ the prose
def known_names():
    """What words in backticks may link to: {name: page of the site}.

    Pages by their stem and modules by their dotted name. What a module defines stands below a
    heading of its page of the reference, and its value is None.
    """
    names = {stem: f"{stem}.md" for stem in pages()}
    names |= {module: f"api/{module}.md" for module in floors.module_pages()}
    return names | dict.fromkeys(_definitions())


def _definitions():
    "Dotted names of the public functions, classes, methods and constants of all modules."
    names = set()
    for module, path in floors.module_files().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined = [node.name]
            elif isinstance(node, ast.Assign):
                defined = [t.id for t in node.targets if isinstance(t, ast.Name)]
            else:
                defined = []
            names.update(f"{module}.{name}" for name in defined if not name.startswith("_"))
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.update(
                    f"{module}.{node.name}.{inner.name}"
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
                )
    return names


def _outside(pattern, change, text):
    "`text`, with `change` made to what the pattern (one group) does not match."
    return "".join(part if i % 2 else change(part) for i, part in enumerate(pattern.split(text)))


def _displayed(text):
    "Formulas between $$ as blocks of their own, as Python-Markdown wants them."

    def block(match):
        inset = "    " if match[1].startswith("  ") else ""  # in an item of a list
        lines = [piece.strip() for piece in match[2].strip().splitlines()]
        return "\n\n" + "\n".join(f"{inset}{piece}" for piece in ["$$", *lines, "$$"]) + "\n\n"

    text = re.sub(r"([ \t]*)\$\$(.+?)\$\$[ \t]*\n?", block, text, flags=re.S)
    return re.sub(r"\n{3,}", "\n\n", text)


def _resolved(target, here):
    """Where a link of the repository leads on the site, relative to the page `here`.

    `target` is relative to the folder of the file that holds it.
    """
    target, _, anchor = target.partition("#")
    folder = posixpath.dirname(here) if here in DOCUMENTS else "nbs"
    place = posixpath.normpath(posixpath.join(folder, target))
    if place.startswith("nbs/") and place.endswith(".ipynb"):
        place = place.removeprefix("nbs/").removesuffix(".ipynb") + ".md"
    start = posixpath.dirname(here) or "."
    return posixpath.relpath(place, start) + (f"#{anchor}" if anchor else "")


def prose(text, here, known=types.MappingProxyType({})):
    """Markdown of Jupyter or GitHub as Python-Markdown reads it.

    here: the page on the site that holds the text, such as `00_exact.md`.
    known: what a word in backticks may link to, as `known_names` gives it.
    """

    def links(part):
        return re.sub(
            r"(?<=\]\()(?!https?:|mailto:|#)([^)\s]+)", lambda m: _resolved(m[1], here), part
        )

    def code(match):
        before, name = match[1], match[2]
        if before == "[" or name not in known:
            return match[0]
        if known[name] is None:  # a heading of the reference, which finds it by its name
            return f"{before}[`{name}`][{PACKAGE}.{name}]"
        return (
            f"{before}[`{name}`]({posixpath.relpath(known[name], posixpath.dirname(here) or '.')})"
        )

    def paragraph(part):
        part = _displayed(_outside(_CODE, links, part))
        # elsewhere a list may follow a paragraph without an empty line, and an item's second
        # paragraph is inset by less
        part = re.sub(r"^((?![-*|>#\s]).+\n)(?=[-*] )", r"\1\n", part, flags=re.M)
        part = re.sub(r"(?<=\n\n) {2,3}(?=\S)", "    ", part)
        # a picture leads to itself: a wide one is small on a phone
        part = re.sub(r"^(!\[[^\]]*\]\((.+)\))$", r"[\1](\2)", part, flags=re.M)
        # GitHub wants a bar inside of a table's code escaped, Python-Markdown shows the escape
        part = re.sub(r"`[^`\n]*\\\|[^`\n]*`", lambda m: m[0].replace("\\|", "|"), part)
        return re.sub(r"(^|.)`([\w.]+)`", code, part, flags=re.M)

    # what unfolds is Markdown, too: Jupyter and GitHub need no mark for that
    text = text.replace("<details>", '<details markdown="1">')
    return _outside(_FENCE, paragraph, text)


def claim(text):
    "The claim at the top of a page, without its marks, and the text without title and claim."
    body = text.partition("\n")[2].strip("\n")
    quoted, _, following = body.partition("\n\n")
    if not quoted.startswith(">"):
        return "", body
    while following.startswith(">"):
        block, _, following = following.partition("\n\n")
        quoted += "\n\n" + block
    quoted = re.sub(r"^> ?", "", quoted, flags=re.M)
    return quoted.removeprefix("**Claim.** "), following


def description(text, room=200):
    "A claim as plain words for search engines, cut behind a sentence or a word."
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(text.split()))
    plain = re.sub(r"[*`$\\{}]", "", plain)
    return textwrap.shorten(plain, room, placeholder=" ...")


# ----------------------------------------------------------------------------------- code and outputs
def fenced(text, head):
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`{3,}", text)), default=0))
    return f"{ticks}{head}\n{text}\n{ticks}"


def code_block(cell, module):
    "The code of a cell without its directives; exported code says which file has it."
    marks = directives(cell)
    text = re.sub(r"^#\|.*\n?", "", source(cell), flags=re.M).strip("\n")
    if not text or "echo" in marks:
        return ""
    files = f"{PACKAGE}/{module.replace('.', '/')}.py" if module else ""
    exported = marks & {"export", "exporti"} and files
    return fenced(text, f'{{ .python title="{files}" }}' if exported else "python")


def printed(text):
    "What a cell printed. Long lines of prose are broken; a table keeps its lines, and scrolls."
    long = [line.strip() for line in text.splitlines() if len(line) > WIDE]
    prose_only = long and not any("  " in line for line in long)
    return fenced(text, "{ .text .output .wrap }" if prose_only else "{ .text .output }")


def output_blocks(cell, picture):
    """What a cell shows, as blocks of Markdown.

    picture: a function that keeps an image, given its bytes, and returns its address.
    """
    blocks = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output["output_type"] == "stream":
            blocks.append(printed("".join(output["text"]).rstrip()))
        elif "text/markdown" in data:
            blocks.append("".join(data["text/markdown"]))
        elif "image/png" in data:
            png = base64.b64decode("".join(data["image/png"]))
            name = picture(png)  # a link to it, because wide ones are small on a phone
            blocks.append(f"[![What the code above draws]({name}){{ .figure }}]({name})")
        elif "text/html" in data:
            table = re.sub(r"<style.*?</style>|\n\s*", "", "".join(data["text/html"]), flags=re.S)
            blocks.append(f'<div class="frame">{table}</div>')
        elif "text/plain" in data:
            blocks.append(printed("".join(data["text/plain"]).rstrip()))
    return blocks


def page(path, module, known, folder):
    """The Markdown of a notebook; its pictures are written to `folder`/images."""
    here = f"{path.stem}.md"
    drawn = []

    def picture(png):
        name = f"images/{path.stem}-{len(drawn) + 1}.png"
        drawn.append(name)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png)
        return name

    first, *others = cells(path)
    lead, text = claim(source(first))
    front = f"description: {json.dumps(description(lead), ensure_ascii=False)}"
    front += "\nhide: [navigation]" if path.stem == "index" else ""
    blocks = [f"---\n{front}\n---", f"# {title(path)}"]
    head = "" if path.stem == "index" else "Claim"
    blocks.append(f'!!! abstract "{head}"\n\n' + textwrap.indent(prose(lead, here, known), "    "))
    links = [f"[`{PACKAGE}.{module}`](api/{module}.md)"] if module else []
    if path.stem != "index":
        links.append(f"[this page as a notebook]({path.name}){{ download }}")
        blocks.append(" · ".join(links) + "\n{ .origin }")
    blocks.append(prose(text, here, known))
    for cell in others:
        if cell["cell_type"] == "markdown":
            blocks.append(prose(source(cell), here, known))
        elif cell["cell_type"] == "code":
            blocks.append(code_block(cell, module))
            blocks += output_blocks(cell, picture)
    return "\n\n".join(block for block in blocks if block) + "\n"


# ------------------------------------------------------------------------------------- the reference
def docstring(text, here, known=types.MappingProxyType({})):
    """A docstring as Markdown.

    Paragraphs of two or more lines `name: meaning`, continued by indented lines, become lists.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        items = re.split(r"\n(?=\S)", block)
        cut = [re.match(r"([\w.]+(?:, [\w.]+)*): +(.+)", item, flags=re.S) for item in items]
        if len(items) > 1 and all(cut):
            block = "\n".join(f"- `{m[1]}`: {' '.join(m[2].split())}" for m in cut)
        blocks.append(block)
    return prose("\n\n".join(blocks), here, known)


def api_page(module, stem):
    return (
        f"---\ntitle: {module}\n---\n\n# `{PACKAGE}.{module}`\n\n"
        f"Page [{title(NBS / f'{stem}.ipynb')}](../{stem}.md).\n\n::: {PACKAGE}.{module}\n"
    )


def api_index(modules):
    rows = [
        f"| [`{name}`]({name}.md) | [{stem}](../{stem}.md) | {title(NBS / f'{stem}.ipynb')} |"
        for name, stem in modules.items()
    ]
    lines = [
        "# Reference",
        "",
        "Every public name with its signature and docstring: shapes, units, errors, source. A page",
        "of the book derives and checks what a module defines.",
        "",
        "| module | page | title |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ the site
def navigation(modules):
    "The order of pages, as MkDocs takes it."

    def entry(stem):
        number = stem.partition("_")[0]
        return {f"{number} {title(NBS / f'{stem}.ipynb')}".replace("`", ""): f"{stem}.md"}

    order = [{"Home": "index.md"}]
    for part, rows in parts().items():
        entries = []
        for subject, stems in rows.items():
            here = [entry(stem) for stem in stems]
            entries += here if len(here) == 1 else [{subject: here}]
        order.append({part: entries})
    reference = ["api/index.md"] + [{name: f"api/{name}.md"} for name in modules]
    order.append({"Reference": reference})
    order.append({"Project": [{name: place} for place, name in DOCUMENTS.items()]})
    return order


def mathjax():
    "The folder of MathJax's files, from the package that carries them."
    spec = importlib.util.find_spec("mathjax")
    if spec is None:
        sys.exit("the website needs its requirements: make site, or pip install 'minirl_nb[site]'")
    return Path(list(spec.submodule_search_locations)[0]) / "static" / "mathjax" / "es5"


def write_pages(folder):
    "All that MkDocs reads, and its settings, in `folder`. Returns the file of the settings."
    docs = folder / "docs"
    shutil.rmtree(folder, ignore_errors=True)
    docs.mkdir(parents=True)
    written = floors.module_pages()
    modules = {name: written[name] for name in sorted(written)}
    by_page = {stem: name for name, stem in written.items()}
    known = known_names()
    for stem, path in pages().items():
        text = page(path, by_page.get(stem), known, docs)
        (docs / f"{stem}.md").write_text(text, encoding="utf-8")
        if stem != "index":
            shutil.copy(path, docs)
    (docs / "api").mkdir()
    (docs / "api" / "index.md").write_text(api_index(modules), encoding="utf-8")
    for name, stem in modules.items():
        (docs / "api" / f"{name}.md").write_text(api_page(name, stem), encoding="utf-8")
    for place in DOCUMENTS:
        text = prose((ROOT / place).read_text(encoding="utf-8"), place, known)
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        (docs / place).write_text(text, encoding="utf-8")
    for place in (*FILES, "data/idea.svg", "data/demo/curves.png"):
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, docs / place)
    shutil.copytree(ROOT / "tools" / "website_files", docs / "assets")
    settings = folder / "mkdocs.yml"
    inherited = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": str(docs),
        "nav": navigation(modules),
    }
    settings.write_text(json.dumps(inherited, indent=1), encoding="utf-8")  # JSON is YAML
    return settings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--output", type=Path, default=SITE)
    args = parser.parse_args()
    settings = write_pages(BOOK)
    if args.pages:
        return
    files = mathjax()
    target = BOOK / "docs" / "assets" / "mathjax"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(files / fonts, target / fonts)
    shutil.copy(files / "tex-chtml.js", target)
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    words += ["--config-file", str(settings), "--site-dir", str(args.output.resolve())]
    # the package of this folder is documented, and website_docstrings found
    where = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    changes = {"PYTHONPATH": where, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | changes)
    if done.returncode:
        sys.exit(done.returncode)
    print(f"site: {args.output}; python -m http.server -d {args.output} shows it")


if __name__ == "__main__":
    main()
