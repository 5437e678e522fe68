"""Engineering tests of `problem_files`: malformed files, data sets, what the package ships."""

from pathlib import Path

import pytest

from minirl_nb.problem_files import data_path
from minirl_nb.tasks import Problem, load

DATA = Path(__file__).resolve().parent.parent / "data"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r":1: the file is empty"),
        (b"\n \n", r":1: the file is empty"),
        (b'{"problem": "a", "answer": "b"}\n{"problem": "a", "answer"', r":2: not a JSON object"),
        (b'{"problem": "a", "answer": "b"}\n[1]\n', r":2: a JSON list"),
        (b'{"question": "a", "answer": "b"}\n', r":1: no 'problem'; it has 'question', 'answer'"),
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
