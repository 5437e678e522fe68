"""What a reader is told to open, and what a symbol or term is said to be called, exists."""

import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from minirl_nb.config import RunConfig
from minirl_nb.objective import GRPO, MINIRL
from minirl_nb.weights import TIS, WEIGHTS, ratio_stats

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in sorted((ROOT / "nbs").glob("*.ipynb"))}


def prose(page):
    "The text of a page's markdown cells."
    cells = json.loads(PAGES[page].read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def named_pages(text):
    "Pages that a text links to or names in backticks."
    links = re.findall(r"\]\((?:nbs/)?(\w+)\.ipynb\)", text)
    return links + re.findall(r"`(\d\d[a-z]*_\w+)`", text)


def resolves(name):
    "Is a dotted name part of the package, or a setting of a run?"
    settings = RunConfig()
    try:
        for part in name.split("."):
            settings = getattr(settings, part)
        return True
    except AttributeError:
        pass
    words = name.split(".")
    for n in range(len(words), 0, -1):
        module = ".".join(["minirl_nb", *words[:n]])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found:
            thing = importlib.import_module(module)
            for part in words[n:]:
                if not hasattr(thing, part):
                    return False
                thing = getattr(thing, part)
            return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_every_page_that_a_page_names_exists(page):
    missing = set(named_pages(prose(page))) - set(PAGES)
    assert not missing, f"{page} names {missing}"


def test_the_front_page_lists_every_page():
    "By name, or inside a range `[11_vllm] to [11j_vllm_served]`."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(named_pages(text))
    assert listed <= set(PAGES)
    order = list(PAGES)
    for first, last in re.findall(r"\]\(nbs/(\w+)\.ipynb\) to \[\w+\]\(nbs/(\w+)\.ipynb\)", text):
        listed.update(order[order.index(first) : order.index(last) + 1])
    assert set(PAGES) - listed == {"index"}


def test_names_of_the_notation_exist():
    names = set(re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", prose("00_reading")))
    assert len(names) > 10
    unknown = {name for name in names if not resolves(name)}
    assert not unknown, unknown
    assert not resolves("objective.MINIRK") and not resolves("batch.updatez")


def test_the_notation_has_every_weight_and_every_statistic():
    text = prose("00_reading")
    kinds = set(re.findall(r'`"([\w/]+)"`', text))
    assert kinds == set(WEIGHTS) - {"none"}
    section = text[text.index("## Statistics of a ratio") : text.index("## Glossary")]
    keys = set(re.findall(r"`(\w+)`", section))
    assert set(ratio_stats(torch.zeros(1, 2), mask=torch.ones(1, 2))) <= keys


def test_the_glossary_is_in_order_and_says_each_term_once():
    text = prose("00_reading")
    glossary = text[text.index("## Glossary") : text.index("## Exercises")]
    terms = re.findall(r"^\*\*(.+?)\.\*\* ", glossary, re.M)
    assert len(terms) > 20 and terms == sorted(terms, key=str.lower)
    assert len(set(terms)) == len(terms)


def test_the_ladder_of_the_bridge_changes_one_setting_at_a_time():
    "From GRPO to the preset that trains; R3 changes no setting of the objective."
    cells = json.loads(PAGES["04d_bridge"].read_text(encoding="utf-8"))["cells"]
    (ladder,) = ["".join(c["source"]) for c in cells if "LADDER = {" in "".join(c["source"])]
    names = {"replace": dataclasses.replace, "GRPO": GRPO, "MINIRL": MINIRL, "TIS": TIS}
    exec(ladder.partition("\n\n\n")[0], names)
    rows = [objective for objective, _ in names["LADDER"].values()]
    assert rows[0] == rows[1] == GRPO and rows[-2] == rows[-1] == MINIRL
    changed = [
        [f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)]
        for a, b in zip(rows[1:-1], rows[2:-1])
    ]
    assert changed == [["weight"], ["truncation"], ["advantage"], ["normalizer"]]
