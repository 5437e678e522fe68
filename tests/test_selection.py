"""Engineering tests of `selection`: the filter of problem sets, and the command that applies it."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import AIME24, Stub, cache, exam, mirror, no_mirror, tokenizer  # noqa: F401

from minirl_nb import selection, tasks
from minirl_nb.benchmarks import SETS
from minirl_nb.rollout import Sampling
from minirl_nb.selection import (
    Overlap,
    ProblemsConfig,
    filter_problems,
    guessable,
    verifiable,
    words,
)
from minirl_nb.tasks import Problem, load


def test_words_ignore_typing_and_keep_mathematics():
    same = [
        r"Let $x^{2}+\dfrac{1}{2}=\left(y\right)$.",
        r"let \(x^2 + \frac{1}{2} = (y)\)",
        "LET  $x^2+\\tfrac12=(y)$ .",
    ]
    assert (
        words(same[0])
        == words(same[1])
        == ["let", "x", "^", "2", "+", "frac", "1", "2", "=", "(", "y", ")"]
    )
    assert (
        words("Find x-1") != words("Find x+1")
        and words("1.5") != words("15")
        and words("x_1 < 2") != words("x_1 > 2")
    )
    assert words("求出所有的质数。") == list("求出所有的质数") and words("ﬁnd １２") == [
        "find",
        "12",
    ]
    assert words("") == []


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from("alpha beta gamma 12 7 + = ( ) find the number of".split()), max_size=40
    ),
    st.integers(1, 10),
)
def test_overlap_of_a_text_with_itself_is_one(tokens, n):
    text = " ".join(tokens)
    share, where = Overlap({"b": [Problem("0", text, "1")]}, n)(f"$$ {text.upper()} $$")
    assert (share, where) == ((1.0, ("b", "0")) if tokens else (0.0, None))


def test_overlap_counts_runs():
    text = "one two three four five six seven eight nine ten"
    shared = Overlap({"b": [Problem("p", text, "1"), Problem("short", "compute it", "1")]}, 4)
    assert shared("preface " + text + " and more") == (1.0, ("b", "p"))
    assert shared("one two three four five other") == (
        pytest.approx(2 / 7),
        ("b", "p"),
    )  # runs of four: 7 in all, 2 here
    assert shared("please compute it now") == (1.0, ("b", "short"))  # shorter than a run
    assert shared("entirely different words stand in this text") == (0.0, None)
    with pytest.raises(ValueError, match="at least 1"):
        Overlap({}, 0)


def test_guessable_answers():
    assert all(
        map(guessable, ["A", "(B)", "C.", r"\text{D}", "Yes", "$\\text{no}$", "(c)", "True"])
    )
    assert not any(
        map(guessable, ["e", "1", "x", "AB", r"\frac{1}{2}", "No solution for n", "e^2", "a"])
    )


def test_answers_in_words():
    assert all(
        map(
            selection.in_words,
            [
                r"\text{see the figure}",
                "Alice",
                "12 inches",
                r"\text{odd}",
                "x = 3 where x is prime",
            ],
        )
    )
    fine = [
        "x^2",
        r"\sin x",
        "12 cm",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        "1 and 2",
        "sin(x)",
        "ab",
        r"\dfrac{1}{2}",
    ]
    assert not any(map(selection.in_words, fine))


def test_verifiable_and_its_memory(tmp_path, monkeypatch):
    answers = [
        "12",
        "-7",
        r"\frac{3}{4}",
        "2\\sqrt{3}",
        "(1, 2)",
        "x^2+1",
        "",
        "AB \\parallel CD",
        r"9^{9^{9^9}}",
        "12",
    ]
    memory = tmp_path / "verdicts.jsonl"
    verdicts = verifiable(answers, memory)
    assert {a for a, ok in verdicts.items() if ok} >= {
        "12",
        "-7",
        r"\frac{3}{4}",
        "2\\sqrt{3}",
        "(1, 2)",
        "x^2+1",
    }
    assert not any(verdicts[a] for a in ("", "AB \\parallel CD", r"9^{9^{9^9}}"))
    stored = memory.read_text().splitlines()
    assert (
        "math-verify" in json.loads(stored[0]) and len(stored) == 1 + 7
    )  # integers need no memory

    class Never:
        def check(self, requests):
            raise AssertionError(f"asked again for {requests}")

    monkeypatch.setattr(selection, "pool", Never)
    assert verifiable(answers, memory) == verdicts
    memory.write_text(
        stored[0].replace(json.loads(stored[0])["math-verify"], "0.0")
        + "\n"
        + "\n".join(stored[1:])
        + "\n"
    )
    with pytest.raises(AssertionError, match="asked again"):
        verifiable(answers, memory)


def pile():
    held_out = {
        "exam": [
            Problem(
                "e0",
                "Find the number of positive integers $n$ less than 1000 such that "
                "$n^2+n+41$ is prime.",
                "581",
            )
        ]
    }
    problems = [
        *(
            Problem(
                f"good{i}", f"Compute ${i}$ times seventeen, then add {i * i}.", str(17 * i + i * i)
            )
            for i in range(6)
        ),
        Problem("copy", r"compute \( 3 \) times seventeen, then add 9", "60"),
        Problem("torn1", "How many sides has a square?", "4"),
        Problem("torn2", "How many sides has a square?", "5"),
        Problem("equal1", "What is half of one?", r"\frac{1}{2}"),
        Problem("equal2", "What is half of one?", "0.5"),
        Problem(
            "leak",
            "Find the number of positive integers n < 1000 such that $n^{2}+n+41$ is a prime.",
            "581",
        ),
        Problem("choice", "Which of these is odd?", "B"),
        Problem("proof", "Show that it holds.", r"\text{see the proof above}"),
        Problem("tower", "How large is it?", r"9^{9^{9^9}}"),
    ]
    return problems, held_out


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "Verdicts on the pile's answers, kept between tests: its power tower costs a second each time."
    return tmp_path_factory.mktemp("judged") / "verdicts.jsonl"


def test_the_filter_step_by_step(judged):
    problems, held_out = pile()
    result = filter_problems(problems, held_out, verdicts=judged)
    why = {i: step for i, step, _ in result.dropped}
    assert {"copy", "good3"} & why.keys() and not {
        "copy",
        "good3",
    } <= why.keys()  # either copy may stay
    assert {i for i, s in why.items() if s == "two answers"} == {"torn1", "torn2"}
    assert {"equal1", "equal2"} & why.keys() and not {"equal1", "equal2"} <= why.keys()
    assert why["proof"] == "answer in words"
    assert (
        why["leak"] == "in a benchmark"
        and why["choice"] == "answer can be guessed"
        and why["tower"] == "answer cannot be verified"
    )
    left = {p.id for p in result.problems}
    assert len(left) == len(problems) - len(result.dropped) and left.isdisjoint(
        i for i, _, _ in result.dropped
    )
    assert [n for _, _, n in result.steps] == sorted((n for _, _, n in result.steps), reverse=True)
    assert all(
        before[2] - after[1] == after[2] for before, after in zip(result.steps, result.steps[1:])
    )
    assert "choice" in {
        p.id for p in filter_problems(problems, held_out, choices=True, verdicts=judged).problems
    }
    assert "leak" in {p.id for p in filter_problems(problems, verdicts=judged).problems}
    assert "leak" in {
        p.id for p in filter_problems(problems, held_out, overlap=1.0, verdicts=judged).problems
    }


def test_the_choice_does_not_depend_on_the_order_of_the_input(judged):
    problems, held_out = pile()
    chosen = filter_problems(problems, held_out, count=5, verdicts=judged)
    shuffled = problems[:]
    random.Random(1).shuffle(shuffled)
    assert (
        filter_problems(shuffled, held_out, count=5, verdicts=judged).problems == chosen.problems
        and len(chosen.problems) == 5
    )
    assert (
        filter_problems(problems, held_out, count=5, seed=1, verdicts=judged).problems
        != chosen.problems
    )
    more = filter_problems(problems, held_out, count=6, verdicts=judged).problems
    assert more[:5] == chosen.problems  # a larger choice contains the smaller one
    with pytest.raises(
        ValueError, match=r"(?s)7 problems are left where 8 are wanted:.*two answers"
    ):
        filter_problems(problems, held_out, count=8, verdicts=judged)


def test_pass_rates_select(tmp_path, judged):
    problems, held_out = pile()
    rates = {f"good{i}": i / 5 for i in range(6)} | {"copy": 0.6}
    result = filter_problems(problems, held_out, rates=rates, verdicts=judged)
    assert {rates[p.id] for p in result.problems} == {0.2, 0.4, 0.6, 0.8}
    assert {
        p.id
        for p in filter_problems(
            problems, held_out, rates=rates, low=0.3, high=0.5, verdicts=judged
        ).problems
    } == {"good2"}
    path = tmp_path / "rates.jsonl"
    path.write_text('{"id": "a", "rate": 0.5}\n{"id": "b", "rate": 2}\n')
    with pytest.raises(ValueError, match=r"rates.jsonl:2: a pass rate is"):
        selection.read_rates(path)


def test_pass_rates_from_an_engine_go_on_where_they_ended(tmp_path):
    train, tok, path = tmp_path / "train.jsonl", tokenizer(), tmp_path / "rates.jsonl"
    tasks.write_jsonl(train, [Problem(str(i), f"What is {i}+1?", str(i + 1)) for i in range(10)])
    task = load(train)
    engine = Stub(task, tok, lambda p: int(p.id) / 8 if int(p.id) <= 8 else 0)
    sample = selection.sampler(engine, task, Sampling(n=8, max_new_tokens=99, seed=3), tok)
    assert selection.pass_rates(sample, task, task.problems[:5], path, chunk=2) == {
        str(i): i / 8 for i in range(5)
    }
    assert [s.first for s in engine.calls] == [0, 16, 32] and all(s.seed == 3 for s in engine.calls)
    path.write_text("".join(path.read_text().splitlines(True)[:4]))  # stopped after four
    rates = selection.pass_rates(sample, task, path=path, chunk=4)
    assert len(engine.calls) == 5 and rates == {
        str(i): (i if i <= 8 else 0) / 8 for i in range(10)
    } == selection.read_rates(path)


def test_make_problems_writes_a_task_a_report_and_the_reasons(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIRL_DATA", str(tmp_path / "copies"))
    mirror(tmp_path / "copies", "aime24", exam(AIME24), SETS["aime24"].revision)
    problems, _ = pile()
    big = tmp_path / "big.jsonl"
    tasks.write_jsonl(
        big, [*problems, Problem("exam", "Also: " + exam(AIME24)[4]["problem"], "104")]
    )
    config = ProblemsConfig(str(big), str(tmp_path / "out" / "math5.jsonl"), 5, ("aime24",))
    result = selection.make_problems(config)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        f"math5.{x}" for x in ("jsonl", "report.json", "dropped.jsonl", "verdicts.jsonl")
    }
    assert load(out / "math5.jsonl").problems == result.problems and len(result.problems) == 5
    report = json.loads((out / "math5.report.json").read_text())
    assert (
        report["sha256"] == tasks.fingerprint(result.problems) and report["settings"]["ngram"] == 5
    )
    assert report["file_sha256"] == hashlib.sha256((out / "math5.jsonl").read_bytes()).hexdigest()
    assert SETS["aime24"].revision in report["benchmarks"]["aime24"]["source"] and report["source"][
        "source"
    ] == str(big)
    dropped = [json.loads(line) for line in (out / "math5.dropped.jsonl").read_text().splitlines()]
    assert {"id": "exam", "step": "in a benchmark", "why": "1.00 of aime24:aime24:4"} in dropped
    assert sum(s["dropped"] for s in report["steps"]) == len(dropped) == len(problems) + 1 - 5
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert (
        str(selection.make_problems(config)) == str(result)
        and {p.name: p.read_bytes() for p in out.iterdir()} == before
    )
    with pytest.raises(ValueError, match="must be a .jsonl file"):
        selection.make_problems(replace(config, output="out.json"))
    with pytest.raises(ValueError, match="has none; big_math has"):
        selection.make_problems(replace(config, rates="published"))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["alpha", "Alpha ", "$alpha$", "beta", "gamma 1", "gamma-1", "delta"]),
            st.integers(0, 2),
        ),
        max_size=12,
    )
)
def test_no_problem_survives_twice_or_with_two_answers(pairs):
    problems = [Problem(str(i), text, str(answer)) for i, (text, answer) in enumerate(pairs)]
    result = filter_problems(problems)
    keys = [tuple(words(p.problem)) for p in result.problems]
    assert len(set(keys)) == len(keys)
    answers = {}
    for p in problems:
        answers.setdefault(tuple(words(p.problem)), set()).add(p.answer)
    assert set(keys) == {k for k, a in answers.items() if len(a) == 1}
