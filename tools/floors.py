"""The floors of the package, read from its imports.

    python tools/floors.py            # print the map
    python tools/floors.py --write    # put it, and the counts of directives, into CONTRIBUTING.md
    python tools/floors.py --check    # does CONTRIBUTING.md hold what this tool would write?

A module stands one floor above the highest module that it imports, wherever in its file the import
stands. The ground floor imports nothing of the package.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from outputs import band, directives, printed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's reader of imports, installed or not
from minirl_nb import sources  # noqa: E402

LIB, NBS, TARGET = ROOT / sources.PACKAGE, ROOT / "nbs", ROOT / "CONTRIBUTING.md"


def module_files(lib=LIB):
    """{module: file} of this checkout."""
    return sources.module_files(lib)


def module_pages():
    """{module: stem of the page that writes it}."""
    pages = {}
    for path in sorted(NBS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            for name in re.findall(r"^#\|\s*default_exp[ \t]+([\w.]+)", source, re.M):
                pages[name.removesuffix(".__init__")] = path.stem
    return pages


def graph():
    """{module: set of modules that it imports}, of this checkout."""
    return sources.graph(module_files())


def circle(edges):
    """A list of modules that import one another in a ring, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :] + [name]
        if name in done:
            return None
        path.append(name)
        for target in sorted(edges[name]):
            if ring := visit(target):
                return ring
        done.add(path.pop())
        return None

    for name in sorted(edges):
        if ring := visit(name):
            return ring
    return None


def levels(edges):
    """{module: its floor}, 0 for a module that imports none."""
    if ring := circle(edges):
        sys.exit(f"no floors: the imports run in a circle, {' -> '.join(ring)}")
    floor = {}

    def height(name):
        if name not in floor:
            floor[name] = 1 + max((height(target) for target in edges[name]), default=-1)
        return floor[name]

    for name in edges:
        height(name)
    return floor


def table():
    """The map as a Markdown table, the highest floor first."""
    edges, pages = graph(), module_pages()
    floor = levels(edges)
    lines = ["| floor | module | page | stands on |", "|---|---|---|---|"]
    names = [n for n in edges if n in pages]
    for name in sorted(names, key=lambda n: (-floor[n], pages[n])):
        # what it imports, without what one of these imports already stands on
        direct = edges[name] - sources.reached(edges[name], edges)
        rests = ", ".join(f"`{t}`" for t in sorted(direct, key=lambda t: (-floor[t], t)))
        page = f"[{pages[name]}](nbs/{pages[name]}.ipynb)"
        lines.append(f"| {floor[name]} | `{name}` | {page} | {rests} |")
    return "\n".join(lines)


def text_cells():
    """How the cells that print text are compared: counts of `exact`, `within` and `volatile`.

    Cells that `make test` does not run (flags of accelerators and vLLM) are counted as `not run`.
    """
    counts = Counter(dict.fromkeys(("exact", "within", "volatile", "not run"), 0))
    for path in sorted(NBS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code" or not printed(cell).strip():
                continue
            flags = directives(cell)
            if flags & {"notest", "slow", "gpu", "vllm"}:
                counts["not run"] += 1
            elif "volatile" in flags:
                counts["volatile"] += 1
            else:
                counts["within" if band(cell) else "exact"] += 1
    return counts


def counted():
    counts = text_cells()
    meaning = {
        "exact": "no directive: compared as text",
        "within": "`#\\| within`: numbers compared within the band, words as text",
        "volatile": "`#\\| volatile`: not compared (times and sizes)",
        "not run": "`#\\| vllm`, `gpu`, `slow`, `notest`: not run by `make test`",
    }
    lines = ["| cells that print text | |", "|---|---|"]
    return "\n".join(lines + [f"| {meaning[kind]} | {counts[kind]} |" for kind in meaning])


def filled(text):
    """`text` with each block between `<!-- NAME -->` and `<!-- end NAME -->` made anew."""
    for name, make in {"floors": table, "directives": counted}.items():
        marks = re.compile(rf"<!-- {name} -->\n.*?<!-- end {name} -->", re.S)
        if not marks.search(text):
            sys.exit(f"{TARGET.name} has no block <!-- {name} --> ... <!-- end {name} -->")
        made = make()
        opening, closing = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
        text = marks.sub(lambda m, block=opening + made + closing: block, text)
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not args.write and not args.check:
        print(table())
        return
    before = TARGET.read_text(encoding="utf-8")
    after = filled(before)
    if args.check and before != after:
        sys.exit(f"{TARGET.name} is not current; run `python tools/floors.py --write`")
    if args.write:
        TARGET.write_text(after, encoding="utf-8")
    print(f"floors: {TARGET.name} " + ("is current" if before == after else "rewritten"))


if __name__ == "__main__":
    main()
