"""Engineering tests of `tasks`: names, options, prompts, and lists that share no problem."""

import subprocess
import sys

import pytest
import torch

from minirl_nb import tasks
from minirl_nb.tasks import Problem, load


def test_encode_decode_of_the_task():
    task = load("arithmetic")
    p = task.benchmarks["hard"][0]
    assert task.decode(task.encode(p)) == task.prompt(p) == p.problem + "="
    with pytest.raises(ValueError, match="no symbol for 'a' 'b'"):
        task.encode(Problem("x", "b*a", "1"))


def test_chat_template_is_used():
    class Chat:
        chat_template = "something"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
            assert add_generation_prompt and tokenize and not return_dict
            return [len(messages), len(messages[0]["content"])]

    task = load("arithmetic")
    assert task.encode(task.problems[0], Chat()) == [1, 6]


def test_verify_many_shape_and_mismatch():
    task = load("arithmetic")
    ps = task.problems[:3]
    r = task.verify_many(ps, [ps[0].answer + ".", "1.", None])
    assert (
        r.dtype == torch.float32
        and r.tolist() == [1.0, 0.0, 0.0]
        and task.verify_many([], []).shape == (0,)
    )
    with pytest.raises(ValueError, match="3 problems, but 2 responses"):
        task.verify_many(ps, ["", ""])


def test_jsonl_of_ones_own(tmp_path):
    f = tmp_path / "mine.jsonl"
    lines = [
        '\ufeff{"problem": "1+1?", "answer": 2}',
        "",
        '{"problem": "x", "answer": "\\\\frac12", "id": "half", "level": 3}',
        "",
    ]
    f.write_text("\n".join(lines), encoding="utf-8")
    task = load(f)
    assert task.problems == [Problem("mine.jsonl:1", "1+1?", "2"), Problem("half", "x", r"\frac12")]
    assert task.prompt(task.problems[0]).startswith("1+1?\n") and r"\boxed{}" in task.prompt(
        task.problems[0]
    )
    texts = [r"\boxed{2.0}", "It is $0.5$."]
    assert task.verify_many(task.problems, texts).tolist() == [1.0, 0.0]
    unboxed = load(f"{f}?unboxed=accept")
    assert unboxed.verify_many(task.problems, texts).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no tokenizer of its own"):
        task.encode(task.problems[0])
    numbers = tmp_path / "numbers.jsonl"
    tasks.write_jsonl(numbers, [Problem("a", "12*12", "144")])
    own = load(f"{numbers}?verifier=arithmetic")
    assert own.encode(own.problems[0]) and own.verify(own.problems[0], "100+44=144.") == 1.0
    assert (
        load(f"{numbers}?verifier=exact&template=Q: {{problem}}").prompt(own.problems[0])
        == "Q: 12*12"
    )
    tasks.write_jsonl(numbers, [Problem("a", "123*45", "5535")])
    assert load(
        "arithmetic", benchmarks={"mine": f"{numbers}?verifier=arithmetic"}
    ).benchmarks.keys() == {"easy", "medium", "hard", "mine"}


def test_wrong_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.jsonl"):
        load("nowhere.jsonl")
    with pytest.raises(ValueError, match="unknown task 'arithmetics'"):
        load("arithmetics")
    with pytest.raises(ValueError, match="unknown option 'sead'; the options are seed"):
        load("arithmetic?sead=1")
    with pytest.raises(ValueError, match="hf:"):
        load(tmp_path)
    with pytest.raises(ValueError, match="cannot make 'no_such'"):
        load("reasoning_gym:no_such")
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="no verifier 'maths'; there are math, arithmetic, exact"):
        load(f"{tmp_path}/p.jsonl?verifier=maths")
    with pytest.raises(ValueError, match="no {problem}"):
        load(f"{tmp_path}/p.jsonl?template=hello")


def test_rules_of_judging(tmp_path):
    write = (tmp_path / "p.jsonl").write_text
    write('{"problem": "20+7?", "answer": "27"}\n{"problem": "half of 100?", "answer": 50}\n')
    texts = [r"\boxed{20+7}", r"\boxed{50\%}"]

    def rewards(query=""):
        task = load(f"{tmp_path}/p.jsonl{query}")
        return task.verify_many(task.problems, texts).tolist()

    assert rewards() == [0, 0]
    assert rewards("?unevaluated=accept") == [1, 0]
    assert rewards("?percent=either") == [0, 1]
    assert rewards("?percent=either&unevaluated=accept") == [1, 1]
    assert rewards("?after=</think>&unevaluated=accept") == [0, 0]
    with pytest.raises(ValueError, match="percent is 'yes'; it must be number or either"):
        rewards("?percent=yes")
    with pytest.raises(ValueError, match="unboxed is a rule of the verifier math alone"):
        rewards("?verifier=exact&unboxed=accept")


def test_a_benchmark_is_judged_by_the_rules_of_its_task(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": "27"}\n')
    (tmp_path / "q.jsonl").write_text('{"problem": "c", "answer": "27"}\n')
    name = f"{tmp_path}/p.jsonl?unevaluated=accept"
    task = load(name, benchmarks={"q": f"{tmp_path}/q.jsonl"})
    assert task.verify(task.benchmarks["q"][0], r"\boxed{20+7}") == 1.0
    with pytest.raises(ValueError, match="names 'unboxed', but it is put to the model and judged"):
        load(name, benchmarks={"q": f"{tmp_path}/q.jsonl?unboxed=accept"})
    with pytest.raises(ValueError, match="need one verifier"):
        load(name, benchmarks={"q": f"{tmp_path}/q.jsonl?verifier=exact"})


def test_contamination_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"problem": "a", "answer": "b"}\n{"problem": "c", "answer": "b"}\n'
    )
    (tmp_path / "q.jsonl").write_text('{"problem": " c ", "answer": "b"}\n')
    with pytest.raises(ValueError, match="1 of 1 problems of the benchmark 'q' are training"):
        load(tmp_path / "p.jsonl", benchmarks={"q": f"{tmp_path}/q.jsonl"})


def test_reasoning_gym():
    task = load("reasoning_gym:chain_sum?size=50&seed=3&min_terms=2&max_terms=3")
    assert len(task.problems) == 50 and len(task.benchmarks["heldout"]) == 30
    p, q = task.problems[0], task.benchmarks["heldout"][0]
    texts = [
        f"<answer>{p.answer}</answer>",
        f"<answer>{p.answer}0</answer>",
        p.answer + " is it",
        None,
        f"so <answer> {q.answer} </answer>",
    ]
    assert task.verify_many([p, p, p, p, q], texts).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert "<answer>" in task.prompt(p)


def test_importing_tasks_is_light():
    heavy = "'torch', 'transformers', 'datasets', 'numpy'"
    code = f"import sys, minirl_nb.tasks; print(*[m for m in ({heavy}) if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        ).stdout.strip()
        == ""
    )
