"""Engineering tests of `arithmetic`: files, tokenizer, a verifier that pays only the answer."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirl_nb import tasks
from minirl_nb.answers import Problem
from minirl_nb.arithmetic import arithmetic_tokenizer, carries, verify_arithmetic
from minirl_nb.tasks import load

DATA = Path(__file__).resolve().parent.parent / "data"


def test_data_files_are_reproduced_byte_for_byte(tmp_path):
    for made in tasks.write_arithmetic(tmp_path):
        assert made.read_bytes() == (DATA / "arithmetic" / made.name).read_bytes(), made.name
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (DATA / "arithmetic").iterdir()}


def test_sizes_answers_and_held_out_problems():
    task = load("arithmetic")
    assert len(task.problems) == 4096 and {k: len(v) for k, v in task.benchmarks.items()} == {
        "easy": 30,
        "medium": 30,
        "hard": 30,
    }
    everything = [*task.problems, *(p for v in task.benchmarks.values() for p in v)]
    assert len({p.id for p in everything}) == 4096 + 90
    pairs = {}
    for p in everything:
        a, b = map(int, p.problem.split("*"))
        assert 10 <= a < 100 and 10 <= b < 100 and int(p.answer) == a * b
        pairs[p.id] = frozenset((a, b))
    held_out = {pairs[p.id] for v in task.benchmarks.values() for p in v}
    assert not held_out & {pairs[p.id] for p in task.problems}, (
        "a problem or its commuted twin is in training and in a benchmark"
    )
    assert len(held_out) == 90, "a problem and its commuted twin are both held out"
    assert task.problems == tasks.read_jsonl(DATA / "arithmetic" / "train.jsonl")


def test_seeds_differ():
    assert load("arithmetic?seed=1").problems[:10] != load("arithmetic").problems[:10]


@pytest.mark.parametrize("a, b", [(47, 36), (99, 99), (10, 10), (25, 40), (19, 91)])
def test_carries_against_digitwise_sums(a, b):
    """The digits of both factors' sums tell the carries: each carry takes 9 off the digit sum of an
    addition; a product of a number and a digit carries out of exactly the places whose prefix
    product reaches a power of ten."""

    def digit_sum(n):
        return sum(map(int, str(n)))

    expected, low, high = 0, a * (b % 10), a * (b // 10) * 10
    for y in (b % 10, b // 10):
        expected += sum(a % 10**k * y >= 10**k for k in (1, 2))
    expected += (digit_sum(low) + digit_sum(high) - digit_sum(low + high)) // 9
    assert carries(a, b) == expected


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tok = arithmetic_tokenizer()
    tok.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "47*36=1410+282-0=1692."
    assert len(again) == 16 == len(tok) and again(text)["input_ids"] == tok(text)["input_ids"]
    assert len(tok(text)["input_ids"]) == len(text) and again.decode(tok(text)["input_ids"]) == text
    assert (again.eos_token, again.eos_token_id, again.pad_token_id, again.bos_token_id) == (
        ".",
        15,
        0,
        None,
    )


@given(
    st.one_of(
        st.text(alphabet="0123456789+-*=.", max_size=30),
        st.text(max_size=30),
        st.none(),
        st.integers(),
        st.binary(),
    )
)
def test_arithmetic_verifier_pays_only_the_answer(text):
    p = Problem("47*36", "47*36", "1692")
    (reward,) = verify_arithmetic([p], [text])
    assert reward in (0.0, 1.0)
    if reward:
        assert text == "1692." or text.endswith("=1692.")


@given(st.integers(10, 99), st.integers(10, 99), st.text(alphabet="0123456789+-*=", max_size=20))
def test_arithmetic_verifier_accepts_any_chain(a, b, chain):
    p = Problem(f"{a}*{b}", f"{a}*{b}", str(a * b))

    def verify(text):
        return verify_arithmetic([p], [text]) == [1.0]

    assert verify(f"{chain}={a * b}.") and not verify(f"{chain}={a * b}")
    assert not verify(f"{chain}={a * b + 1}.") and not verify(f"{chain}=0{a * b}.")


def test_hashes_of_the_data_are_what_the_readme_says():
    readme = (DATA / "README.md").read_text()
    for path in sorted((DATA / "arithmetic").glob("*.jsonl")):
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in readme, path.name
        for line in path.read_text().splitlines():
            assert json.loads(line).keys() == {"id", "problem", "answer"}
