"""The command line: one sentence for what is wrong, help that can be read, output that may go unread."""

import json
import os
import re
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass, replace

import pytest

from minirl_nb import plan
from minirl_nb.cli import COMMANDS, NOBODY_READS, _texts, main


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "nope"], "there is no recipe nope"),
        (["evaluate", "nowhere"], "no folder nowhere"),
        (["train", "--optimizer.lrate", "1"], "did you mean 'optimizer.lr'?"),
        (["evaluate", "--sample", "3"], "did you mean 'samples'?"),
    ],
)
def test_cli_errors(words, sentence, capsys):
    assert main(words) == 2
    out = capsys.readouterr()
    assert sentence in out.err and out.err.count("\n") == 1


# -------------------------------------------------------------------------------------------- help
def described(cls):
    "Every dataclass in a config, sections included."
    yield cls
    for kind in typing.get_type_hints(cls).values():
        if is_dataclass(kind):
            yield from described(kind)


@pytest.mark.parametrize("name", [name for name, c in COMMANDS.items() if c.config])
def test_every_option_has_a_text(name):
    for cls in described(COMMANDS[name].config()):
        for f in fields(cls):
            kind = typing.get_type_hints(cls)[f.name]
            assert is_dataclass(kind) or f.metadata.get("help") or _texts(cls)[f.name], f.name


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_readable_at_100_columns(name, monkeypatch, capsys):
    """No line is longer, and no line of a text ends while the next word had room: the texts are
    broken for the reader's screen and not where the source breaks them."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main([name, "--help"] if name else ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: minirl ")
    assert max(map(len, lines)) <= 100
    inside = [line[1:-1] for line in lines if line.startswith("│")]
    for line, following in zip(inside, inside[1:]):
        indent = len(following) - len(following.lstrip())
        goes_on = indent > 1 and len(line) - len(line.lstrip()) == indent
        if goes_on:
            word = following.split()[0]
            assert len(line.rstrip()) + 1 + len(word) > 97, (line, following)


def test_help_names_options_as_recipes_do(capsys):
    assert main(["train", "--help"]) == 0
    assert "--model.gradient_checkpointing" in capsys.readouterr().out


def test_help_of_a_plan_names_gpus_and_assumptions(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\b{re.escape(name)}\b", text) for name in plan.GPUS)
    assert "--gpu " in text and "--assume.mean_length" in text


# ------------------------------------------------------------------------------------ what is read
@pytest.mark.parametrize(
    "words, unbuffered",
    [(["recipes"], ""), (["recipes"], "1"), (["--help"], ""), (["export", "--help"], "1")],
)
def test_output_that_nobody_reads_is_no_error(words, unbuffered):
    "The reader has gone before anything is printed: nothing is said, and the status is SIGPIPE's."
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "minirl_nb.cli", *words]
    p = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (p.returncode, p.stderr) == (NOBODY_READS, "")


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch, capsys):
    def run(positional, options):
        raise BrokenPipeError("the worker is gone")

    monkeypatch.setitem(COMMANDS, "recipes", replace(COMMANDS["recipes"], run=run))
    assert main(["recipes"]) == 2
    assert "the worker is gone" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize(
    "words, found",
    [
        (["--gpus-per-node", "4"], ("h100", 8, 4)),
        (["--gpus_per_node=4"], ("h100", 8, 4)),
        (["--gpu", "h200"], ("h200", 8, 8)),
        (["--gpus", "2"], ("h100", 2, 2)),
        ([], ("here", 1, 1)),
    ],
)
def test_one_word_of_a_cluster_asks_for_another_than_this(words, found, monkeypatch):
    asked = []

    def planned(config, cluster, assume):
        asked.append((cluster.gpu, cluster.gpus, cluster.gpus_per_node))
        raise ValueError("enough")

    here = replace(plan.Cluster.with_gpus("h100", 1), gpu="here")
    monkeypatch.setattr(plan.Cluster, "here", classmethod(lambda cls, processes=None: here))
    monkeypatch.setattr(plan, "plan", planned)
    assert main(["plan", *words]) == 2 and asked == [found]


def test_plan_prints_a_table_or_numbers(mixture, capsys):
    words = [
        "plan",
        "--model.path",
        mixture,
        "--rollout.engine",
        "vllm",
        "--gpus",
        "8",
        "--gpu",
        "h200",
        "--gpus_per_node=4",
        "--assume.mean_length",
        "0.3",
    ]
    assert main(words) == 0
    assert "8 x h200 (2 nodes)" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["gpus_per_node"] == 4 and found["assumptions"]["mean_length"] == 0.3


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpu", "h1000"], "known are"),
        (["--gpus", "many"], "gpus cannot be 'many'"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus"], "--gpus needs a value"),
        (["--gpus", "8", "--assume.mean_lenght", "0.3"], "did you mean 'assume.mean_length'"),
        (["nothing"], "there is no recipe nothing"),
        (["demo", "--gpus", "6", "--parallel.shard", "4"], "does not divide the 6"),
        (["demo", "--model.path", "data/nothing"], "there is no folder"),
    ],
)
def test_mistakes_in_a_plan_are_one_sentence_and_status_two(words, said, capsys):
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("minirl: ")


def test_the_page_of_the_command_line_has_a_row_for_every_command():
    from pathlib import Path

    page = Path(__file__).parent.parent / "nbs" / "17_cli.ipynb"
    first = "".join(json.loads(page.read_text())["cells"][0]["source"])
    assert set(re.findall(r"^\| `minirl (\w+)", first, re.M)) == set(COMMANDS)
