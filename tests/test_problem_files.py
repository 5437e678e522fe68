"""Engineering tests of `problem_files`: malformed files, data sets, what the package ships."""

import csv
import json
import re
import warnings
from pathlib import Path

import pytest

from minirl_nb.problem_files import ProblemsWarning, data_path
from minirl_nb.tasks import Problem, load

DATA = Path(__file__).resolve().parent.parent / "data"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r":1: the file is empty"),
        (b"\n \n", r":1: the file is empty"),
        (b'{"problem": "a", "answer": "b"}\n{"problem": "a", "answer"', r":2: not a JSON object"),
        (b'{"problem": "a", "answer": "b"}\n[1]\n', r":2: a JSON list"),
        (
            b'{"question": "a", "answer": "b"}\n',
            r":1: no 'problem'; it has 'question', 'answer'; .* is '\?problem=question'",
        ),
        (
            b'{"problem": "a", "Solution": "b"}\n',
            r":1: no 'answer'; it has 'problem', 'Solution'; .* is '\?answer=Solution'",
        ),
        (b'{"problem": "a", "answer": "6*7\\n#### "}\n', r":1: 'answer' has nothing behind '####'"),
        (b'{"problem": [], "answer": "b"}\n', r":1: 'problem' is a chat of the turns none"),
        (b'{"problem": ["a"], "answer": "b"}\n', r":1: 'problem' must be a text that is not empty"),
        (
            b'{"problem": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],'
            b' "answer": "b"}\n',
            r":1: 'problem' is a chat of the turns system, user, .*\?problem=problem.1.content",
        ),
        (b'{"problem": "a"}\n', r":1: no 'answer'"),
        (
            b'{"problem": " ", "answer": "b"}\n',
            r":1: 'problem' must be a text that is not empty, not ' '",
        ),
        (
            b'{"problem": "a", "answer": true}\n',
            r":1: 'answer' must be a text that is not empty or a number, not True",
        ),
        (b'{"problem": "a", "answer": null}\n', r":1: 'answer' must be"),
        (b'{"problem": "a", "answer": "b"}\n\xff\xfe\n', r":2: not"),
        (
            b'{"problem": "a", "answer": "b", "id": 1}\n{"problem": "c", "answer": "b", "id": 1}\n',
            r":2: the id '1' was taken at .*:1",
        ),
        (b'{"problem": ' + b"[" * 100_000, r":1: not a JSON object"),
    ],
)
def test_malformed_files_name_file_and_line(tmp_path, content, message):
    f = tmp_path / "bad.jsonl"
    f.write_bytes(content)
    with pytest.raises(ValueError, match="bad.jsonl" + message):
        load(f)


def test_shipped_data_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/coldstart", Path("data/arithmetic/hard.jsonl"), "./data/coldstart/"):
        found = Path(data_path(name))
        assert found.is_absolute() and found.resolve().relative_to(DATA.parent.resolve()) == Path(
            name
        )
    assert len(load("data/arithmetic/hard.jsonl?verifier=arithmetic").problems) == 30
    for name in (
        "Qwen/Qwen3-30B-A3B",
        "runs/x",
        "data",
        "",
        "data/../../x",
        str(tmp_path / "data" / "x"),
    ):
        assert data_path(name) == name  # nothing of ours: as it was given
    (tmp_path / "data" / "coldstart").mkdir(parents=True)
    assert data_path("data/coldstart") == "data/coldstart"  # one's own comes first
    with pytest.raises(
        FileNotFoundError,
        match="there is no data/colstart in .*, and the package ships no data of that name",
    ):
        data_path("data/colstart")


def test_installed_data_comes_before_the_checkouts(tmp_path, monkeypatch):
    """In a wheel the data lies inside the package; the folder beside the package is the
    environment's."""
    import importlib.resources

    for place in ("minirl_nb/data/arithmetic", "data/arithmetic", "data/elsewhere"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(importlib.resources, "files", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path / "minirl_nb" / "data" / "arithmetic")
    assert data_path("data/arithmetic") == str(tmp_path / "minirl_nb" / "data" / "arithmetic")
    assert data_path("data/elsewhere") == str(tmp_path / "data" / "elsewhere")


ROWS = [
    {"question": 'What is 1,5 + "2"?\nSay.', "answer": "007", "level": "NA"},
    {"question": "Round 3/2.", "answer": "1.50", "level": "2"},
    {"question": "What is there?", "answer": "NA", "level": ""},
]


def write_rows(folder: Path, name: str) -> Path:
    "ROWS in a file of the kind that the name says."
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = folder / name
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "A.CSV"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, name):
    """Cells stay as they were typed, line breaks, quotes, leading zeros and NA included; the error
    for other names says how to name them."""
    path = write_rows(tmp_path, name) if name != "A.CSV" else None
    if path is None:
        path = write_rows(tmp_path, "a.csv").rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*no 'problem'; .*'\?problem=question'"):
        load(path)
    task = load(f"{path}?problem=question")
    assert [(p.problem, p.answer) for p in task.problems] == [
        (row["question"], row["answer"]) for row in ROWS
    ]
    assert len({p.id for p in task.problems}) == 3


def test_a_json_file_may_hold_lines(tmp_path):
    (tmp_path / "a.json").write_text('{"problem": "a", "answer": "b"}\n')
    assert load(tmp_path / "a.json").problems == [Problem("a.json:1", "a", "b")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("b.csv", b"problem,answer\na,1\nb\n", r"b.csv:3: 1 cells under 2 names"),
        ("b.csv", b'problem,answer\n"a\nb",1\nc,\n', r"b.csv:4: 'answer' must be a text"),
        ("b.csv", b'problem,answer\n"a,1\n', r"b.csv:\d: not CSV"),
        ("b.csv", b"problem,answer\n\xff\xfe,1\n", r"b.csv: not UTF-8 text"),
        ("b.csv", b"", r"b.csv: the file has no rows"),
        ("b.csv", b"problem,answer\n", r"b.csv: the file has no rows"),
        ("b.json", b"[]", r"b.json: the file has no rows"),
        ("b.json", b'[{"problem": "a", "answer": "b"}, 7]', r"b.json\[1\]: a JSON int"),
        ("b.json", b'[{"problem": "a"', r"b.json: not a JSON array"),
        ("b.parquet", b"PAR1 no", r"b.parquet: not a Parquet file"),
    ],
)
def test_malformed_tables_name_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_a_chat_of_one_turn_and_a_worked_answer(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "What is 6*7?"}],
        "solution": "6*7 = <<6*7=42>>42\n#### 42",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    task = load(f"{tmp_path}/a.jsonl?problem=prompt&answer=solution")
    assert task.problems == [Problem("a.jsonl:1", "What is 6*7?", "42")]
    row["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    task = load(f"{tmp_path}/b.jsonl?problem=prompt.1.content&answer=solution&system=Be brief.")
    assert task.problems[0].problem == "What is 6*7?" and task.system == "Be brief."


def test_copies_are_counted_once(tmp_path):
    rows = [("a", 1), ("b", 2), (" a ", 1), ("a", 3), ("c", 4)]
    lines = [json.dumps({"problem": p, "answer": a}) for p, a in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.warns(ProblemsWarning) as said:
        assert len(load(tmp_path / "a.jsonl").problems) == 5
    (message,) = (str(w.message) for w in said)
    assert "2 of 5 problems repeat an earlier one, 1 of them with another answer" in message
    assert re.search(r"the first is \S+a.jsonl:3, a copy of \S+a.jsonl:1$", message)


def test_golds_that_cannot_be_read_are_named(tmp_path):
    golds = ["5", r"\frac{1}{", r"\sqrt{2}", "(1,2)", r"\text{east}", r"\frac{1}{"]
    lines = [
        json.dumps({"id": f"p{i}", "problem": f"{i}?", "answer": g}) for i, g in enumerate(golds)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.warns(ProblemsWarning) as said:
        load(tmp_path / "a.jsonl")
    (message,) = (str(w.message) for w in said)
    assert "no response can be right for 1 of the answers" in message
    assert repr(golds[1]) in message and "a.jsonl:2)" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(f"{tmp_path}/a.jsonl?verifier=exact")  # compared as text: any answer will do


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("hub")
    train = datasets.Dataset.from_list(
        [
            {
                "Question": f"What is {i}/7?",
                "solution": f"so ... #### \\frac{{{i}}}{{7}}",
                "reward_model": {"ground_truth": str(i)},
                "prompt": [{"role": "user", "content": f"P{i}"}],
            }
            for i in range(1, 4)
        ]
    )
    test = datasets.Dataset.from_list(
        [
            {
                "Question": "Solve x^2=4 for x>0",
                "solution": "2",
                "reward_model": {"ground_truth": "2"},
                "prompt": [{"role": "user", "content": "P"}],
            }
        ]
    )
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "dict")
    train.save_to_disk(folder / "plain")
    train.to_parquet(folder / "files" / "train.parquet")
    return folder


def test_local_data_sets(dataset_folder):
    task = load(
        f"hf:{dataset_folder}/dict?problem=Question",
        benchmarks={"test": f"hf:{dataset_folder}/dict:test"},
    )
    assert [p.answer for p in task.problems] == [rf"\frac{{{i}}}{{7}}" for i in (1, 2, 3)]
    assert task.verify(task.problems[1], r"It is \boxed{\dfrac{4}{14}}.") == 1.0
    assert [p.problem for p in task.benchmarks["test"]] == ["Solve x^2=4 for x>0"]
    nested = load(
        f"hf:{dataset_folder}/plain?problem=prompt.0.content&answer=reward_model.ground_truth"
    )
    assert nested.problems[2] == Problem("plain:2", "P3", "3")
    assert load(f"hf:{dataset_folder}/files:train").problems[0].problem == "What is 1/7?"


def test_data_set_errors(dataset_folder):
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        load(f"hf:{dataset_folder}/dict:dev")
    with pytest.raises(ValueError, match="no 'Frage'; it has 'Question'"):
        load(f"hf:{dataset_folder}/dict?problem=Frage")


def test_a_hub_name_without_a_network_is_one_clear_error(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError,
        match="'no-one/no-such-set' could not be loaded from the hub .*it takes a network",
    ):
        load("hf:no-one/no-such-set")
