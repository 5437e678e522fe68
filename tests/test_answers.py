"""Engineering tests of `answers`: verdicts on single answers, and the two-stage parser."""

import json
import subprocess
import sys

import pytest

from minirl_nb.verification import Pool


@pytest.fixture(scope="module")
def checker():
    pool = Pool(workers=2)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "gold, text, expected",
    [
        (r"\frac{1}{2}", r"\boxed{0.5}", 1),
        ("0.5", r"\boxed{\frac12}", 1),
        ("72", "#### 72", 1),
        ("x^2-1", r"\boxed{(x-1)(x+1)}", 1),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1),
        ("7", r"First \boxed{3}, then \boxed{7}", 1),
        ("7", r"First \boxed{7}, then \boxed{3}", 0),
        (r"\{1,2\}", r"\boxed{1} and \boxed{2}", 1),
        ("7", "", 0),
        ("7", r"\boxed{", 0),
        ("7", "\x00\ud800", 0),
        ("(1,2)", r"\boxed{(1, 2)}", 1),
        ("Evelyn", r"\boxed{Evelyn}", 1),
        ("$x + 1$", r"\boxed{x+1}", 1),
        ("7", r"\boxed{ }", 0),
        ("7", r"\boxed{٧}", 1),
        ("12", r"\boxed{1 2}", 1),
        ("1" * 200, r"\boxed{" + "1" * 200 + "}", 1),
        ("7", r"\boxed{7.0}", 1),
        ("007", r"\boxed{7}", 1),
        ("7", r"\boxed{-7}", 0),
        ("-7", r"$\boxed{-7}$.", 1),
        ("50\\%", r"\boxed{0.5}", 1),
        ("7", r"\boxed{7" + "}" * 3000, 1),
        ("7", r"\boxed{8}" + "x" * 10_000, 0),
    ],
)
def test_math_verdicts(checker, gold, text, expected):
    assert checker.check([("math", gold, text)]) == [expected]


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
        from minirl_nb import answers
        logging.disable(50)
        boxes = ["\\\\boxed{" + e.strip() + "}" for e in json.load(open(sys.argv[1]))]
        trees = lambda: [[repr(x) for x in parse(box, parsing_timeout=None)] for box in boxes]
        plain = trees(); answers.two_stage_parsing(); assert len(plain) > 30
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
