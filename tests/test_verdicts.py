"""Engineering tests of `verdicts` and of `minirl verify`."""

import json

import pytest

from minirl_nb import cli, tasks
from minirl_nb.verdicts import extracted, read_responses, verdicts

ROWS = [
    {"id": "half", "response": [r"\boxed{\frac{1}{2}}", "It is 0.5"]},
    {"id": "sum", "response": r"It is \boxed{27.}"},
    {"id": "half", "response": r"<think>\boxed{0.5}"},
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"id": "half", "problem": "2/4?", "answer": "0.5"}\n'
        '{"id": "sum", "problem": "20+7?", "answer": "27"}\n'
    )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_verify_prints_what_a_run_rewards(files, capsys):
    assert cli.main(["verify", f"{files}/p.jsonl", f"{files}/r.jsonl"]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == "verdict gold answer taken for the answer problem".split()
    assert [line.split() for line in lines] == [
        ["right", "0.5", r"\frac{1}{2}", "half"],
        ["wrong", "0.5", "-", "half"],
        ["right", "27", "27.", "sum"],
        ["wrong", "0.5", "-", "half"],
    ]
    assert last == "2 of 4 right; 2 without an answer"


def test_verify_takes_the_rules_of_the_task(files, capsys):
    assert cli.main(["verify", f"{files}/p.jsonl?unboxed=accept", f"{files}/r.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 right; 1 without an answer" in said and "It is 0.5" in said


def test_other_verifiers_and_columns(tmp_path):
    task = tasks.load("arithmetic")
    problem = task.problems[0]
    rows = [{"name": problem.id, "text": f"1={problem.answer}."}, {"name": problem.id, "text": "7"}]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    pairs = read_responses(f"{tmp_path}/r.json?response=text&id=name", task.problems)
    found = verdicts(task, pairs)
    assert [v.reward for v in found] == [1.0, 0.0] and found[1].answer == "7"
    assert extracted(task, "") is None


def test_rows_without_an_id_answer_in_order(files):
    task = tasks.load(files / "p.jsonl")
    (files / "r.csv").write_text("response\n\\boxed{1/2}\n\\boxed{28}\n")
    found = verdicts(task, read_responses(files / "r.csv", task.problems))
    assert [(v.id, v.answer, v.reward) for v in found] == [("half", "1/2", 1.0), ("sum", "28", 0.0)]


@pytest.mark.parametrize(
    "words, content, message",
    [
        (["nowhere.jsonl"], "", "there is no file nowhere.jsonl"),
        (["r.txt"], "", "responses are read from files (.jsonl"),
        (["r.jsonl"], '{"response": "a"}', "1 rows for 2 problems; a column 'id' says which"),
        (
            ["r.jsonl"],
            '{"id": "hall", "response": "a"}',
            "no problem has the id 'hall'; one is 'half'",
        ),
        (
            ["r.jsonl"],
            '{"id": "sum", "text": "a"}',
            "a column of another name is '?response=COLUMN'",
        ),
        (["r.jsonl"], '{"id": "sum", "response": 7}', "must be a text or a list of texts"),
        (["r.jsonl"], '{"id": "sum", "respo', "r.jsonl:1: not a JSON object"),
        (["r.jsonl?reply=x"], "{}", "unknown option 'reply'; the options are response, id"),
        ([], "", "verify wants a task and a file of responses"),
        (["r.jsonl", "--all"], "{}", "verify wants a task and a file of responses"),
    ],
)
def test_what_is_wrong_is_one_sentence(files, capsys, monkeypatch, words, content, message):
    monkeypatch.chdir(files)
    (files / "r.txt").write_text(content)
    (files / "r.jsonl").write_text(content)
    assert cli.main(["verify", "p.jsonl", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and len(said.err.splitlines()) == 1


def test_help_lists_the_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "verify PROBLEMS RESPONSES" in capsys.readouterr().out
