"""Engineering tests of `values`: verdicts on single answers, rules, and the two-stage parser."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minirl_nb.answers import Problem, Rules
from minirl_nb.verification import MathVerifier, Pool, verify_math


@pytest.fixture(scope="module")
def checker():
    pool = Pool(workers=2)
    yield pool
    pool.close()


def verdicts_of_the_table():
    "(kind, verdict, gold answer, response) of each line of verdicts.tsv."
    kind, out = "", []
    for line in (Path(__file__).parent / "verdicts.tsv").read_text("utf-8").splitlines():
        if line.startswith("#"):
            kind = line.lstrip("# ")
            continue
        verdict, gold, given = line.split("\t")
        whole = re.search(r"\\(?:boxed|fbox|framebox)|think>", given)
        out.append((kind, int(verdict), gold, given if whole else rf"\boxed{{{given}}}"))
    return out


TABLE = verdicts_of_the_table() + [
    ("blanks", 1, "12345", "\\boxed{12\u202f345}"),
    ("blanks", 1, "12345", "\\boxed{12\u00a0345}"),
    ("blanks", 1, "42", "\\boxed{\n42\n}"),
    ("blanks", 0, "34", "\\boxed{3\n4}"),
    ("blanks", 0, "5", "\\boxed{5\n\n5}"),
    ("long", 0, "5", r"so \boxed{7}" + " x" * 2500 + " 5"),
    ("long", 1, "5", r"\boxed{5}" + " and so on." * 1000),
    ("long", 1, "5", r"\boxed{5}" + " 6" * 5000),
    ("long", 1, "5", "\\boxed{5}\n" * 500),
    ("long", 0, "5", r"\boxed{" * 2000),
    ("long", 1, "1" * 200, r"\boxed{" + "1" * 200 + "}"),
    ("long", 0, "7", r"\boxed{8}" + "x" * 10_000),
    ("characters", 0, "7", "\x00\ud800"),
    ("characters", 1, "7", "\\boxed{\u0667}"),
    ("characters", 1, "7", r"\boxed{7" + "}" * 3000),
]


@pytest.fixture(scope="module")
def table_verdicts():
    problems = [Problem(str(i), "?", gold) for i, (_, _, gold, _) in enumerate(TABLE)]
    return verify_math(problems, [text for _, _, _, text in TABLE])


@pytest.mark.parametrize(
    "i", range(len(TABLE)), ids=[f"{k}: {v} {g[:30]} <- {t[:40]!a}" for k, v, g, t in TABLE]
)
def test_verdict(table_verdicts, i):
    assert table_verdicts[i] == TABLE[i][1]


def test_the_table_can_fail():
    "Both verdicts, many kinds, no pair twice."
    assert sum(v == 0 for _, v, _, _ in TABLE) > 250 and sum(v == 1 for _, v, _, _ in TABLE) > 400
    assert len({k for k, _, _, _ in TABLE}) > 20
    assert len({(g, t) for _, _, g, t in TABLE}) == len(TABLE)


@pytest.mark.parametrize(
    "rules, gold, text, strict",
    [
        (Rules(unboxed="accept"), "72", "#### 72", 0),
        (Rules(unboxed="accept"), r"$\sqrt{8}$", r"$2\sqrt{2}$", 0),
        (Rules(unboxed="accept"), "12.5", "The answer is $12.5$.", 0),
        (Rules(unboxed="accept"), r"50\%", "The answer is 50%.", 0),
        (Rules(percent="either"), "50", r"\boxed{50\%}", 0),
        (Rules(percent="either"), "0.5", r"\boxed{50\%}", 1),
        (Rules(unevaluated="accept"), "27", r"\boxed{20+7}", 0),
        (Rules(unevaluated="accept"), "9900", r"\boxed{\frac{100!}{98!}}", 0),
        (Rules(unevaluated="accept"), "5050", r"\boxed{\sum_{k=1}^{100} k}", 0),
        (Rules(after="</think>"), "5", r"\boxed{4}</think>\boxed{5}", 1),
    ],
)
def test_what_a_rule_lets_pass(rules, gold, text, strict):
    problem = Problem("p", "?", gold)
    assert MathVerifier(rules)([problem], [text]) == [1.0]
    assert verify_math([problem], [text]) == [strict]


@pytest.mark.parametrize(
    "rules, gold, text",
    [
        (Rules(unboxed="accept"), "10", r"The answer is 10. \boxed{11"),  # cut off
        (Rules(unboxed="accept"), "10", r"It is 10. \boxed{11}"),
        (Rules(percent="either"), "0.5", r"\boxed{50}"),
        (Rules(unevaluated="accept"), "27", r"\boxed{20+8}"),
        (Rules(after="</think>"), "5", r"\boxed{5}"),
    ],
)
def test_what_no_rule_lets_pass(rules, gold, text):
    assert MathVerifier(rules)([Problem("p", "?", gold)], [text]) == [0.0]


def test_an_answer_is_right_for_itself(checker):
    "Each gold answer of the table, in a box, and right under the strict rules."
    golds = list(dict.fromkeys(gold for _, _, gold, _ in TABLE if gold != "1/0"))
    verdicts = checker.check([("math", gold, rf"\boxed{{{gold}}}") for gold in golds])
    assert [g for g, v in zip(golds, verdicts) if not v] == []


EXPRESSIONS = r"""x^2+3x-4 | (1,2) | \frac{3}{4} | 2\sqrt{3} | -17 | \{1,2,3\} | [0,1) | x\in(1,2]
    | \begin{pmatrix}1&2\\3&4\end{pmatrix} | \log_2 5
    | \sin x+\cos^2 x | 3\cdot 10^5 | \int_0^1 x dx | \sum_{i=1}^n i
    | x=3,y=4 | f(x)=2x | \binom{5}{2} | 2^{n+1}-1 | 5! | a_{n}=n^2
    | 1\frac{1}{2} | 90^\circ | 12,345 | \text{east} | x<y<z
    | (-\infty, 3)\cup[5,\infty) | e^{i\pi} | \frac{x^2-1}{x+1}+xy | 2(x+1)(x-3)
    | \pm 3 | \overline{AB} | 3\% | \$5 | 1{,}000 | x^2+y^2=1 | \frac{ | x^ | )(""".split("|")


def test_two_stage_parsing_changes_no_tree(tmp_path):
    code = """if True:
        import json, logging, sys
        from math_verify import parse
        from minirl_nb import equality
        logging.disable(50)
        boxes = ["\\\\boxed{" + e.strip() + "}" for e in json.load(open(sys.argv[1]))]
        trees = lambda: [[repr(x) for x in parse(box, parsing_timeout=None)] for box in boxes]
        plain = trees(); equality.two_stage_parsing(); assert len(plain) > 30
        print([(a, b) for a, b in zip(plain, trees()) if a != b])"""
    (tmp_path / "e.json").write_text(json.dumps(EXPRESSIONS))
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "e.json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_strange_golden_answers(checker):
    golds = ["", "Evelyn", "$$", "\\boxed{", "1", "\\frac{", r"\boxed{9^{9^{9^9}}}"]
    assert checker.check([("math", gold, r"\boxed{1}") for gold in golds]) == [0, 0, 0, 0, 1, 0, 0]


def test_golden_answers_that_cannot_be_judged_by(checker):
    good = ["5", r"\frac{1}{2}", "x+1", "(1,2)", r"\text{east}", "101_2", r"50\%", r"\$5", "1,2"]
    good += [r"1,2,\ldots,n", r"\emptyset", "0<x<1", r"10\text{ a.m.}", "x=5"]
    bad = ["", r"\frac{1}{", r"\boxed{", "$$", "9^{9^{9^9}}", r"\sqrt{", "(", r"\text{}"]
    verdicts = checker.check([("gold", gold) for gold in good + bad])
    assert verdicts == [1.0] * len(good) + [0.0] * len(bad)
