"""Engineering tests of `benchmarks`: published sets on local copies of their format."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
from published import AIME24, AIME25, Stub, cache, exam, mirror, no_mirror, tokenizer  # noqa: F401

from minirl_nb import benchmarks, evaluate, tasks
from minirl_nb.benchmarks import SETS, ContentError
from minirl_nb.tasks import Problem, load

DAPO = SETS["dapo_math_17k_raw"].wrapped


def test_entries_are_pinned_and_complete():
    for name, entry in SETS.items():
        assert re.fullmatch(r"[0-9a-f]{40}", entry.revision), name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.path), name
        if entry.benchmark:
            assert entry.rows, name
        assert not (entry.answers and not entry.benchmark), name
    assert {n for n, s in SETS.items() if s.benchmark} >= {"aime24", "aime25", "hmmt25"}
    assert [SETS[n].rows for n in ("aime24", "aime25", "hmmt25")] == [30, 30, 30]
    for name in SETS:
        assert name in benchmarks.catalog() and SETS[name].revision[:12] in benchmarks.catalog()


def test_keys_of_the_exams():

    def key(answers):
        return hashlib.sha256("\n".join(sorted(map(str, answers))).encode()).hexdigest()

    assert key(AIME24) == SETS["aime24"].answers and key(AIME25) == SETS["aime25"].answers
    wrong = [AIME24[0] + 1, *AIME24[1:]]
    assert key(wrong) != SETS["aime24"].answers and key(AIME24) == key(AIME24[::-1])


@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_a_benchmark_by_name_from_a_local_copy(tmp_path, monkeypatch, form):
    mirror(tmp_path, "aime24", exam(AIME24, lambda a: f"{a:03d}"), SETS["aime24"].revision, form)
    mirror(tmp_path, "aime25", exam(AIME25, int), form=form)
    monkeypatch.setenv("MINIRL_DATA", str(tmp_path))
    task = load("aime24")
    assert [p.answer for p in task.problems] == list(map(str, AIME24)) and task.problems[
        1
    ].id == "aime24:1"
    assert task.template == tasks.BOXED and task.verifier is tasks.verify_math
    assert (
        task.verify(task.problems[1], r"so \boxed{025}") == 1.0
        and task.verify(task.problems[1], "25") == 0.0  # an exam's prompt asks for a box
    )
    assert task.verify(task.problems[1], r"\boxed{26}") == 0.0
    pinned, unknown = load("aime24").sources["training"], load("aime25").sources["training"]
    assert (SETS["aime24"].revision in pinned) == (
        form == "parquet"
    ) and "does not know its commit" in unknown
    assert "30 problems of 30 rows" in pinned
    monkeypatch.delenv("MINIRL_DATA")
    assert load(f"aime25?root={tmp_path}").problems[0].answer == "70"


def test_a_benchmark_that_is_not_what_its_name_says(tmp_path):
    def refused(rows, match, commit=None, name="aime24", error=ContentError):
        folder = mirror(tmp_path / str(len(list(tmp_path.iterdir()))), name, rows, commit)
        with pytest.raises(error, match=match):
            load(f"{name}?root={folder.parent.parent}")

    good = exam(AIME24)
    refused(good[:-1], "29 rows where there must be 30")
    refused(
        [*good[:-1], good[-1] | {"answer": "1000"}],
        "row 29: the answer is '1000'; it must be an integer from 0 to 999",
    )
    refused([*good[:-1], good[-1] | {"answer": r"\frac12"}], r"row 29: the answer is")
    refused([*good[:-1], good[-1] | {"answer": "316"}], "the answers are not the exam's")
    refused([*good[:-1], good[0]], "1 of 30 rows repeat another")
    refused([*good[:-1], good[0] | {"answer": "315"}], "row 29: a problem with two answers")
    refused([*good[:-1], good[-1] | {"answer": ""}], "without an answer")
    refused([{"text": "a", "answer": "1"}] * 30, "no column 'problem'; it has text, answer")
    refused(
        good,
        f"is of commit {'b' * 40}, the name stands for {SETS['aime24'].revision}.*\\?revision=",
        "b" * 40,
    )
    with pytest.raises(
        FileNotFoundError, match="hf download HuggingFaceH4/aime_2024 .*--revision 2fe88a2f"
    ):
        load(f"aime24?root={tmp_path}/no")
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        load("aime24?revision=main")
    with pytest.raises(ValueError, match="unknown option 'rooot'"):
        load("aime24?rooot=x")
    with pytest.raises(ValueError, match="did you mean 'hmmt25'"):
        load("hmmt_25")
    assert issubclass(ContentError, ValueError)


def test_another_revision_on_request(tmp_path):
    other = "c" * 40
    mirror(tmp_path, "aime24", exam(AIME24), other)
    assert other in load(f"aime24?root={tmp_path}&revision={other}").sources["training"]


def test_the_hub_is_asked_for_the_pinned_commit(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, config=None, split=None, revision=None):
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(exam(AIME25, int))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("aime25").problems) == 30
    assert asked == [("MathArena/aime_2025", None, "train", SETS["aime25"].revision)]

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConnectionError,
        match=r"no network at all\); without a network copy it once, `hf download "
        r"MathArena/aime_2025",
    ):
        load("aime25")


def test_hmmt_takes_answers_as_they_are(tmp_path):
    answers = [r"\frac{1}{576}", "103", r"\sqrt{23}-2 \sqrt{3}", "3^{9} \\cdot 2"]
    rows = [
        {
            "problem_idx": i + 1,
            "problem": f"Problem {i}",
            "answer": answers[i % 4],
            "problem_type": ["Algebra"],
        }
        for i in range(30)
    ]
    mirror(tmp_path, "hmmt25", rows)
    task = load(f"hmmt25?root={tmp_path}")
    assert [p.answer for p in task.problems[:4]] == answers
    texts = [r"\boxed{1/576}", r"\boxed{103.0}", r"\boxed{-2\sqrt3+\sqrt{23}}", r"\boxed{39366}"]
    assert task.verify_many(task.problems[:4], texts).tolist() == [1, 1, 1, 1]
    assert task.verify_many(task.problems[:4], texts[::-1]).tolist() == [0, 0, 0, 0]


def dapo_row(problem, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO[0] + problem + DAPO[1], "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "x"},
    }


def test_the_raw_dapo_file_is_unwrapped_and_merged(tmp_path, monkeypatch):
    monkeypatch.setitem(SETS, "dapo_math_17k_raw", replace(SETS["dapo_math_17k_raw"], rows=None))
    distinct = [
        ("Find $a$.", "1"),
        ("Find $b$.", "-3"),
        ("Find $c$.", "5"),
        ("Find $c$.", "6"),
        ("求 $d$。", "40320"),
    ]
    bare = dapo_row("x", "1") | {"prompt": [{"content": "bare", "role": "user"}]}
    rows = [dapo_row(*pair) for _ in range(100) for pair in distinct] + [bare]
    mirror(tmp_path, "dapo_math_17k_raw", rows)
    task = load(f"dapo_math_17k_raw?root={tmp_path}")
    assert [(p.problem, p.answer) for p in task.problems] == [distinct[0], distinct[1], distinct[4]]
    assert [p.id for p in task.problems] == [
        "dapo_math_17k_raw:0",
        "dapo_math_17k_raw:1",
        "dapo_math_17k_raw:4",
    ]
    assert task.sources["training"].endswith(
        "3 problems of 501 rows, 1 in an unknown wrapping, 2 with two answers"
    )
    assert "Answer:" not in task.prompt(task.problems[0]) and r"\boxed{}" in task.prompt(
        task.problems[0]
    )


def test_a_pinned_training_set_has_its_rows(tmp_path):
    mirror(tmp_path, "dapo_math_17k", [{"prompt": "p", "solution": "1"}])
    with pytest.raises(ContentError, match="1 rows where there must be 17398"):
        load(f"dapo_math_17k?root={tmp_path}")


@pytest.mark.parametrize(
    "name, row, answers",
    [
        (
            "dapo_math_17k",
            lambda i: {
                "prompt": f"p{i}",
                "solution": str(i),
                "source_prompt": [{"content": "wrapped", "role": "user"}],
            },
            "012",
        ),
        (
            "deepmath",
            lambda i: {
                "question": f"p{i}",
                "final_answer": str(i),
                "difficulty": 5.0,
                "r1_solution_1": "...",
            },
            "012",
        ),
        (
            "openr1_math",
            lambda i: {
                "problem": f"p{i}",
                "answer": str(i),
                "solution": "...",
                "generations": ["a"],
            },
            "012",
        ),
        ("polaris", lambda i: {"problem": f"p{i}", "answer": str(i), "difficulty": "3/8"}, "012"),
        ("deepscaler", lambda i: {"problem": f"p{i}", "answer": str(i), "solution": "..."}, "012"),
        (
            "gsm8k",
            lambda i: {"question": f"p{i}", "answer": f"Long way.\n#### {i},000"},
            ["0000", "1000", "2000"],
        ),
        (
            "skywork_math",
            lambda i: {
                "prompt": [{"content": f"p{i}", "role": "user"}],
                "data_source": "x",
                "reward_model": {
                    "ground_truth": json.dumps([str(i)] * (2 if i == 1 else 1)),
                    "style": "rule",
                },
            },
            "02",
        ),
        (
            "big_math",
            lambda i: {
                "problem": f"p{i}",
                "answer": str(i),
                "source": "cn_k12",
                "llama8b_solve_rate": i / 4 if i else None,
            },
            "012",
        ),
    ],
)
def test_columns_of_the_published_formats(tmp_path, monkeypatch, name, row, answers):
    monkeypatch.setitem(SETS, name, replace(SETS[name], rows=None))
    mirror(tmp_path, name, [row(i) for i in range(3)])
    task = load(f"{name}?root={tmp_path}")
    assert [p.answer for p in task.problems] == list(answers)
    assert {p.problem for p in task.problems} <= {"p0", "p1", "p2"}
    if name == "skywork_math":
        assert "1 without an answer" in task.sources["training"]
    if name == "big_math":
        assert benchmarks._read(name, tmp_path).rates == {"big_math:1": 0.25, "big_math:2": 0.5}


def test_prompts_through_a_real_chat_template(tmp_path):
    mirror(tmp_path, "aime24", exam(AIME24))
    text = tasks.BOXED.replace("{problem}", exam(AIME24)[0]["problem"])
    tok, bare = tokenizer(), tokenizer(None)

    def prompt(options="", tok=tok):
        task = load(f"aime24?root={tmp_path}{options}")
        return tok.decode(task.encode(task.problems[0], tok))

    assert (
        prompt() == prompt("&chat=true") == prompt("&thinking=true") == f"<user>{text}<assistant>"
    )
    assert prompt("&thinking=false") == f"<user>{text}<assistant><think></think>"
    assert prompt("&system=Be brief.") == f"<system>Be brief.<user>{text}<assistant>"
    assert prompt("&chat=false") == prompt("", bare) == text
    assert prompt("&template=Q: {problem}") == f"<user>Q: {exam(AIME24)[0]['problem']}<assistant>"
    with pytest.raises(ValueError, match="has no chat template"):
        prompt("&chat=true", bare)
    with pytest.raises(ValueError, match="system=be brief needs a chat template"):
        prompt("&system=Be brief", bare)
    with pytest.raises(ValueError, match="thinking=true needs a chat template"):
        prompt("&chat=false&thinking=true")
    with pytest.raises(ValueError, match="does not know enable_thinking"):
        prompt("&thinking=true", tokenizer("{{ messages[0].content }}"))
    with pytest.raises(ValueError, match="thinking is 'yes'; it must be true or false"):
        prompt("&thinking=yes")


def test_a_benchmark_is_asked_and_judged_as_the_task_is(tmp_path, monkeypatch):
    mirror(tmp_path, "aime24", exam(AIME24))
    monkeypatch.setenv("MINIRL_DATA", str(tmp_path))
    train = tmp_path / "train.jsonl"
    tasks.write_jsonl(train, [Problem("a", "What is 1+1?", "2")])
    task = load(f"{train}?chat=false", benchmarks={"aime24": "aime24"})
    assert task.chat is False and len(task.benchmarks["aime24"]) == 30
    proof = task.provenance()
    assert (
        set(proof) == {"training", "aime24"}
        and proof["aime24"]["problems"] == 30
        and "aime_2024" in proof["aime24"]["source"]
    )
    assert (
        proof["aime24"]["sha256"]
        == tasks.fingerprint(task.benchmarks["aime24"][::-1])
        != proof["training"]["sha256"]
    )
    with pytest.raises(ValueError, match="not judged as the task arithmetic is"):
        load("arithmetic", benchmarks={"aime24": "aime24"})
    with pytest.raises(ValueError, match="names 'chat'.*say it in the task's name"):
        load(train, benchmarks={"aime24": "aime24?chat=true"})


def test_mean_of_32_on_local_copies(tmp_path, monkeypatch):
    for name, key, column in (("aime24", AIME24, str), ("aime25", AIME25, int)):
        mirror(
            tmp_path,
            name,
            [row | {"problem": f"{name}: {row['problem']}"} for row in exam(key, column)],
        )
    monkeypatch.setenv("MINIRL_DATA", str(tmp_path))
    train, tok = tmp_path / "train.jsonl", tokenizer()
    tasks.write_jsonl(train, [Problem("a", "What is 1+1?", "2")])
    task = load(train, benchmarks={"aime24": "aime24", "aime25": "aime25"})

    def share(p):
        return (
            0.25
            if p.id.startswith("aime24")
            else (0.5 if p.id in {f"aime25:{i}" for i in range(10)} else 0.0)
        )

    result = evaluate.evaluate(Stub(task, tok, share), task, tokenizer=tok)
    assert result.sampling.n == 32 and {k: tuple(r.shape) for k, r in result.rewards.items()} == {
        "aime24": (30, 32),
        "aime25": (30, 32),
    }
    assert result.accuracy("aime24") == 0.25 and abs(result.accuracy("aime25") - 0.5 / 3) < 1e-6
    low, high = result.interval("aime25")
    assert low < result.accuracy("aime25") < high
    assert result.interval("aime24") == pytest.approx(
        (0.25, 0.25)
    )  # all problems alike: nothing to resample
    assert result.ids["aime24"][7] == "aime24:7"
