"""The website's pages, without building it: `make site-check` opens it in a browser."""

import json
import re

import pytest
import website

PAGE = "04_objective.md"


def flat(entries):
    "Places of all pages in a navigation."
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else flat(value)


@pytest.fixture(scope="module")
def known():
    return website.known_names()


def test_the_navigation_lists_every_page_once():
    modules = website.floors.module_pages()
    places = list(flat(website.navigation(modules)))
    assert len(places) == len(set(places)), "a page stands in two rows of the map"
    book = {place for place in places if "/" not in place} - set(website.DOCUMENTS)
    assert book == {f"{stem}.md" for stem in website.pages()}
    assert {p for p in places if p.startswith("api/")} == (
        {f"api/{module}.md" for module in modules} | {"api/index.md"}
    )


def test_parts_follow_the_map_and_ranges_are_whole():
    parts = website.parts()
    assert [name.partition(":")[0] for name in parts] == (
        ["Start here", "Part I", "Part II", "Part III", "Part IV"]
    )
    vllm = parts["Part II: pieces"]["vLLM"]
    assert vllm[0] == "11_vllm" and vllm[-1] == "11j_vllm_served"
    assert vllm == [stem for stem in website.pages() if stem.startswith("11")]


@pytest.mark.parametrize(
    "text, here, expected",
    [
        ("[a](02_weights.ipynb)", PAGE, "[a](02_weights.md)"),
        ("[a](02_weights.ipynb#kl)", PAGE, "[a](02_weights.md#kl)"),
        ("[a](../LOG.md)", PAGE, "[a](LOG.md)"),
        (
            "![a](../data/demo/curves.png)",
            "index.md",
            "[![a](data/demo/curves.png)](data/demo/curves.png)",
        ),
        ("[a](nbs/02_weights.ipynb)", "LOG.md", "[a](02_weights.md)"),
        ("[a](https://arxiv.org/abs/2512.01374)", PAGE, "[a](https://arxiv.org/abs/2512.01374)"),
        ("`x[a](b.ipynb)`", PAGE, "`x[a](b.ipynb)`"),
        ("```\n[a](b.ipynb)\n```", PAGE, "```\n[a](b.ipynb)\n```"),
    ],
)
def test_links_lead_to_pages_of_the_site(text, here, expected):
    assert website.prose(text, here) == expected


def test_names_in_backticks_become_links(known):
    text = "`02_weights`, `routing.replay`, `routing`, `logp`, [`02_weights`](02_weights.ipynb)"
    assert website.prose(text, PAGE, known) == (
        "[`02_weights`](02_weights.md), [`routing.replay`][minirl_nb.routing.replay], "
        "[`routing`](api/routing.md), `logp`, [`02_weights`](02_weights.md)"
    )
    assert (
        website.prose("`02_weights`", "api/weights.md", known) == "[`02_weights`](../02_weights.md)"
    )


def test_displayed_formulas_stand_alone():
    text = "so\n$$a\n  + b$$\nand $c$\n"
    assert website.prose(text, PAGE) == "so\n\n$$\na\n+ b\n$$\n\nand $c$\n"
    item = "1. so\n   $$a$$\n   of $c$\n"
    assert website.prose(item, PAGE) == "1. so\n\n    $$\n    a\n    $$\n\n    of $c$\n"


def test_a_claim_is_taken_whole():
    text = "# T\n\n> **Claim.** One.\n>\n> Two $x_1$.\n\nBelow.\n\nMore."
    assert website.claim(text) == ("One.\n\nTwo $x_1$.", "Below.\n\nMore.")
    assert website.description("**One** [two](a.md) $x$.") == "One two x."


def test_arguments_line_by_line_become_a_list():
    text = "What.\n\nlow: the bound\n    below\nhigh, top: above.\n\nNote: no list, one line."
    assert website.docstring(text, "api/clipping.md") == (
        "What.\n\n- `low`: the bound below\n- `high, top`: above.\n\nNote: no list, one line."
    )


@pytest.mark.parametrize("stem", website.pages())
def test_a_page_keeps_all_that_its_notebook_shows(stem, tmp_path, known):
    path = website.pages()[stem]
    text = website.page(path, "weights", known, tmp_path)
    cells = website.cells(path)
    outputs = [o for c in cells for o in c.get("outputs", [])]
    drawn = sum("image/png" in o.get("data", {}) for o in outputs)
    assert len(list(tmp_path.rglob("*.png"))) == drawn == text.count("{ .figure }")
    assert ".ipynb)" not in text.replace(f"]({stem}.ipynb)", "")
    assert not re.search(r"^#\|", text, re.M)
    for cell in cells:
        for line in website.source(cell).splitlines():
            if cell["cell_type"] == "code" and "echo" not in website.directives(cell):
                assert line.startswith("#|") or line in text
    for output in outputs:
        for line in "".join(output.get("text", "")).splitlines():
            assert line.rstrip() in text


def test_the_mark_of_exported_code_names_its_file():
    cell = {"cell_type": "code", "source": "#| export\nx = 1"}
    assert website.code_block(cell, "vllm.engine") == (
        '``` { .python title="minirl_nb/vllm/engine.py" }\nx = 1\n```'.replace("``` {", "```{")
    )
    plain = {"cell_type": "code", "source": json.loads('"x = 1"')}
    assert website.code_block(plain, "vllm.engine") == "```python\nx = 1\n```"


def test_long_lines_are_broken_in_prose_and_kept_in_tables():
    words, table = "to be " * 30, "1    2  " * 30
    assert website.printed(f"short  table\n{words}").startswith("```{ .text .output .wrap }")
    assert website.printed(f"{words}\n{table}").startswith("```{ .text .output }")
    assert website.printed("a word").startswith("```{ .text .output }")


def test_what_unfolds_is_markdown():
    text = "<details><summary>Answer</summary>\n\n`02_weights` says\n\n</details>"
    assert website.prose(text, "00_exact.md").startswith('<details markdown="1"><summary>')
