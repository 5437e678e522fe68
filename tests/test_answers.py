"""Engineering tests of `answers`: which text of a response answers."""

import time

import pytest

from minirl_nb.answers import TAIL, Rules, answer_text, final_answer

FINAL = [
    (r"\boxed{5}", "5"),
    (r"First \boxed{3}, then \boxed{7}", "7"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),
    (r"\boxed{1}, \boxed{2}, or $\boxed{3}$", "1, 2, 3"),
    (r"\boxed{1} \quad \text{and} \quad \boxed{2}", "1, 2"),
    (r"\boxed{5} \boxed{5}", "5"),
    (r"\boxed{5}. I put it in \boxed{}.", "5"),
    (r"\boxed{5}. The sign is \boxed{\ldots}.", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),  # an escaped brace is text
    (r"\boxed{\boxed{5}}", r"\boxed{5}"),
    (r"\fbox{5}", "5"),
    (r"\framebox{5}", "5"),
    (r"\boxed 5.", "5"),
    (r"\boxed{4} then \fbox{5}", "5"),
    (r"a {stray brace and \boxed{5}", "5"),
    (r"a stray} brace and \boxed{5}", "5"),
    (r"\boxed{5", None),
    (r"\boxed{5} and, no, \boxed{12", None),
    (r"use \boxed{ for it: \boxed{5}", "5"),
    (r"\boxed{\phantom{5}}", None),
    ("<think>maybe \\boxed{5}", None),
    (r"<think>\boxed{4}</think> \boxed{5}", "5"),
    (r"<think>\boxed{5}</think> So it is.", None),
    (r"\boxed{4}</think> \boxed{5}", "5"),
    (r"<think>a</think> \boxed{5} <think> \boxed{6}", None),
    (r"\boxed{5}" + " and so on" * 3000, "5"),
    (r"\boxed{5}" + " 6" * 10_000, "5"),
    (r"\boxed{" + "5" * (TAIL + 1) + "}", None),
    ("no box, 5", None),
    ("", None),
]


@pytest.mark.parametrize("text, expected", FINAL, ids=[repr(t[:40]) for t, _ in FINAL])
def test_final_answer(text, expected):
    assert final_answer(text) == expected


def test_what_is_judged():
    long = r"\boxed{5}" + " x" * TAIL
    assert answer_text(long) == r"\boxed{5}"
    accept = Rules(unboxed="accept")
    assert answer_text("It is 5.") == "" and answer_text("It is 5.", accept) == "It is 5."
    assert (
        answer_text("x" * 3 * TAIL + " It is 5.", accept) == ("x" * 3 * TAIL + " It is 5.")[-TAIL:]
    )
    assert answer_text(r"It is 5. \boxed{6", accept) == ""  # cut off in its box
    assert answer_text("<think>It is 5.", accept) == ""
    marked = Rules(after="</think>")
    assert answer_text(r"is it \boxed{5}?", marked) == ""  # never left its thinking
    assert answer_text(r"is it \boxed{4}?</think>\boxed{5}", marked) == r"\boxed{5}"
    for text in (None, 5, b"5", ["5"]):
        assert answer_text(text, accept) == ""


def test_what_is_judged_is_found_again():
    "The processes that judge look for the answer once more, in what they are sent."
    for text, expected in FINAL:
        sent = answer_text(text)
        assert (final_answer(sent) if sent else None) == expected


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 20_000, r"\boxed{}" * 20_000, "{" * 200_000, "\\" * 200_001, "<think>" * 30_000]
    + [r"\boxed{1}, " * 10_000, r"\boxed" + " " * 200_000, r"\boxed{" * 9_000 + "}" * 9_000],
    ids=str.__len__,
)
def test_one_pass_finds_the_answer_of_a_hostile_response(text):
    start = time.process_time()
    answer_text(text, Rules(unboxed="accept"))
    assert time.process_time() - start < 1.0  # a few hundredths; a quadratic search takes minutes


def test_rules_are_checked():
    with pytest.raises(ValueError, match="percent is 'yes'; it must be number or either"):
        Rules(percent="yes")
    with pytest.raises(ValueError, match="unboxed is 'no'; it must be refuse or accept"):
        Rules(unboxed="no")
