"""Engineering tests of `tasks`: the data files, the loaders' errors, and verifiers under hostile input."""
import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb import tasks
from minirl_nb.tasks import Pool, Problem, load

DATA = Path(__file__).resolve().parent.parent / "data"
HOSTILE = [r"\boxed{9^{9^{9^9}}}", r"\boxed{\int_0^\infty e^{x^{x^x}}dx}"]


# ------------------------------------------------------------------------------------------- the built-in task
def test_data_files_are_reproduced_byte_for_byte(tmp_path):
    for made in tasks.write_arithmetic(tmp_path):
        assert made.read_bytes() == (DATA / "arithmetic" / made.name).read_bytes(), made.name
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (DATA / "arithmetic").iterdir()}


def test_sizes_answers_and_held_out_problems():
    task = load("arithmetic")
    assert len(task.problems) == 4096 and {k: len(v) for k, v in task.benchmarks.items()} == {"easy": 30, "medium": 30, "hard": 30}
    everything = [*task.problems, *(p for v in task.benchmarks.values() for p in v)]
    assert len({p.id for p in everything}) == 4096 + 90
    pairs = {}
    for p in everything:
        a, b = map(int, p.problem.split("*"))
        assert 10 <= a < 100 and 10 <= b < 100 and int(p.answer) == a * b
        pairs[p.id] = frozenset((a, b))
    held_out = {pairs[p.id] for v in task.benchmarks.values() for p in v}
    assert not held_out & {pairs[p.id] for p in task.problems}, "a problem or its commuted twin is in training and in a benchmark"
    assert len(held_out) == 90, "a problem and its commuted twin are both held out"
    assert task.problems == tasks.read_jsonl(DATA / "arithmetic" / "train.jsonl")


def test_seeds_differ():
    assert load("arithmetic?seed=1").problems[:10] != load("arithmetic").problems[:10]


@pytest.mark.parametrize("a, b", [(47, 36), (99, 99), (10, 10), (25, 40), (19, 91)])
def test_carries_against_digitwise_sums(a, b):
    """The digits of both factors' sums tell the carries: each carry takes 9 off the digit sum of an addition; a product of a
    number and a digit carries out of exactly the places whose prefix product reaches a power of ten."""
    digit_sum = lambda n: sum(map(int, str(n)))
    expected, low, high = 0, a * (b % 10), a * (b // 10) * 10
    for y in (b % 10, b // 10):
        expected += sum(a % 10**k * y >= 10**k for k in (1, 2))
    expected += (digit_sum(low) + digit_sum(high) - digit_sum(low + high)) // 9
    assert tasks.carries(a, b) == expected


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer
    tok = tasks.arithmetic_tokenizer()
    tok.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "47*36=1410+282-0=1692."
    assert len(again) == 16 == len(tok) and again(text)["input_ids"] == tok(text)["input_ids"]
    assert len(tok(text)["input_ids"]) == len(text) and again.decode(tok(text)["input_ids"]) == text
    assert (again.eos_token, again.eos_token_id, again.pad_token_id, again.bos_token_id) == (".", 15, 0, None)


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


@given(st.one_of(st.text(alphabet="0123456789+-*=.", max_size=30), st.text(max_size=30), st.none(), st.integers(), st.binary()))
def test_arithmetic_verifier_pays_only_the_answer(text):
    p = Problem("47*36", "47*36", "1692")
    reward = load_arithmetic().verify(p, text)
    assert reward in (0.0, 1.0)
    if reward: assert text == "1692." or text.endswith("=1692.")


_TASK = []
def load_arithmetic():
    if not _TASK: _TASK.append(load("arithmetic"))
    return _TASK[0]


@given(st.integers(10, 99), st.integers(10, 99), st.text(alphabet="0123456789+-*=", max_size=20))
def test_arithmetic_verifier_accepts_any_chain(a, b, chain):
    p = Problem(f"{a}*{b}", f"{a}*{b}", str(a * b))
    task = load_arithmetic()
    assert task.verify(p, f"{chain}={a * b}.") == 1.0 and task.verify(p, f"{chain}={a * b}") == 0.0
    assert task.verify(p, f"{chain}={a * b + 1}.") == 0.0 and task.verify(p, f"{chain}=0{a * b}.") == 0.0


def test_verify_many_shape_and_mismatch():
    task = load_arithmetic()
    ps = task.problems[:3]
    r = task.verify_many(ps, [ps[0].answer + ".", "1.", None])
    assert r.dtype == torch.float32 and r.tolist() == [1.0, 0.0, 0.0] and task.verify_many([], []).shape == (0,)
    with pytest.raises(ValueError, match="3 problems, but 2 responses"): task.verify_many(ps, ["", ""])


# ------------------------------------------------------------------------------------------- files of one's own
def test_jsonl_of_ones_own(tmp_path):
    f = tmp_path / "mine.jsonl"
    lines = ['\ufeff{"problem": "1+1?", "answer": 2}', "", '{"problem": "x", "answer": "\\\\frac12", "id": "half", "level": 3}', ""]
    f.write_text("\n".join(lines), encoding="utf-8")
    task = load(f)
    assert task.problems == [Problem("mine.jsonl:1", "1+1?", "2"), Problem("half", "x", r"\frac12")]
    assert task.prompt(task.problems[0]).startswith("1+1?\n") and r"\boxed{}" in task.prompt(task.problems[0])
    assert task.verify_many(task.problems, [r"\boxed{2.0}", "It is $0.5$."]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no tokenizer of its own"): task.encode(task.problems[0])
    numbers = tmp_path / "numbers.jsonl"
    tasks.write_jsonl(numbers, [Problem("a", "12*12", "144")])
    own = load(f"{numbers}?verifier=arithmetic")
    assert own.encode(own.problems[0]) and own.verify(own.problems[0], "100+44=144.") == 1.0
    assert load(f"{numbers}?verifier=exact&template=Q: {{problem}}").prompt(own.problems[0]) == "Q: 12*12"
    tasks.write_jsonl(numbers, [Problem("a", "123*45", "5535")])
    assert load("arithmetic", benchmarks={"mine": f"{numbers}?verifier=arithmetic"}).benchmarks.keys() == {"easy", "medium", "hard", "mine"}


@pytest.mark.parametrize("content, message", [
    (b"", r":1: the file is empty"),
    (b"\n \n", r":1: the file is empty"),
    (b'{"problem": "a", "answer": "b"}\n{"problem": "a", "answer"', r":2: not a JSON object"),
    (b'{"problem": "a", "answer": "b"}\n[1]\n', r":2: a JSON list"),
    (b'{"question": "a", "answer": "b"}\n', r":1: no 'problem'; it has 'question', 'answer'"),
    (b'{"problem": "a"}\n', r":1: no 'answer'"),
    (b'{"problem": " ", "answer": "b"}\n', r":1: 'problem' must be a text that is not empty, not ' '"),
    (b'{"problem": "a", "answer": true}\n', r":1: 'answer' must be a text that is not empty or a number, not True"),
    (b'{"problem": "a", "answer": null}\n', r":1: 'answer' must be"),
    (b'{"problem": "a", "answer": "b"}\n\xff\xfe\n', r":2: not"),
    (b'{"problem": "a", "answer": "b", "id": 1}\n{"problem": "c", "answer": "b", "id": 1}\n', r":2: the id '1' was taken at .*:1"),
    (b'{"problem": ' + b"[" * 100_000, r":1: not a JSON object"),
])
def test_malformed_files_name_file_and_line(tmp_path, content, message):
    f = tmp_path / "bad.jsonl"
    f.write_bytes(content)
    with pytest.raises(ValueError, match="bad.jsonl" + message): load(f)


def test_wrong_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.jsonl"): load("nowhere.jsonl")
    with pytest.raises(ValueError, match="unknown task 'arithmetics'"): load("arithmetics")
    with pytest.raises(ValueError, match="unknown option 'sead'; the options are seed"): load("arithmetic?sead=1")
    with pytest.raises(ValueError, match="hf:"): load(tmp_path)
    with pytest.raises(ValueError, match="cannot make 'no_such'"): load("reasoning_gym:no_such")
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="no verifier 'maths'; there are math, arithmetic, exact"):
        load(f"{tmp_path}/p.jsonl?verifier=maths")
    with pytest.raises(ValueError, match="no {problem}"): load(f"{tmp_path}/p.jsonl?template=hello")


def test_shipped_data_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/coldstart", Path("data/arithmetic/hard.jsonl"), "./data/coldstart/"):
        found = Path(tasks.data_path(name))
        assert found.is_absolute() and found.resolve().relative_to(DATA.parent.resolve()) == Path(name)
    assert len(load("data/arithmetic/hard.jsonl?verifier=arithmetic").problems) == 30
    for name in ("Qwen/Qwen3-30B-A3B", "runs/x", "data", "", "data/../../x", str(tmp_path / "data" / "x")):
        assert tasks.data_path(name) == name                                # nothing of ours: as it was given
    (tmp_path / "data" / "coldstart").mkdir(parents=True)
    assert tasks.data_path("data/coldstart") == "data/coldstart"            # one's own comes first
    with pytest.raises(FileNotFoundError, match="there is no data/colstart in .*, and the package ships no data of that name"):
        tasks.data_path("data/colstart")


def test_installed_data_comes_before_the_checkouts(tmp_path, monkeypatch):
    "In a wheel the data lies inside the package; the folder beside the package is the environment's."
    import importlib.resources
    for place in ("minirl_nb/data/arithmetic", "data/arithmetic", "data/elsewhere"): (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(importlib.resources, "files", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path / "minirl_nb" / "data" / "arithmetic")
    assert tasks.data_path("data/arithmetic") == str(tmp_path / "minirl_nb" / "data" / "arithmetic")
    assert tasks.data_path("data/elsewhere") == str(tmp_path / "data" / "elsewhere")


def test_contamination_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": "b"}\n{"problem": "c", "answer": "b"}\n')
    (tmp_path / "q.jsonl").write_text('{"problem": " c ", "answer": "b"}\n')
    with pytest.raises(ValueError, match="1 of 1 problems of the benchmark 'q' are training"):
        load(tmp_path / "p.jsonl", benchmarks={"q": f"{tmp_path}/q.jsonl"})


# ------------------------------------------------------------------------------------------- Hugging Face data sets
@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    import datasets
    folder = tmp_path_factory.mktemp("hub")
    train = datasets.Dataset.from_list([
        {"Question": f"What is {i}/7?", "solution": f"so ... #### \\frac{{{i}}}{{7}}", "reward_model": {"ground_truth": str(i)},
         "prompt": [{"role": "user", "content": f"P{i}"}]} for i in range(1, 4)])
    test = datasets.Dataset.from_list([{"Question": "Solve x^2=4 for x>0", "solution": "2", "reward_model": {"ground_truth": "2"},
                                        "prompt": [{"role": "user", "content": "P"}]}])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "dict")
    train.save_to_disk(folder / "plain")
    train.to_parquet(folder / "files" / "train.parquet")
    return folder


def test_local_data_sets(dataset_folder):
    task = load(f"hf:{dataset_folder}/dict?problem=Question", benchmarks={"test": f"hf:{dataset_folder}/dict:test"})
    assert [p.answer for p in task.problems] == [rf"\frac{{{i}}}{{7}}" for i in (1, 2, 3)]
    assert task.verify(task.problems[1], r"It is \boxed{\dfrac{4}{14}}.") == 1.0
    assert [p.problem for p in task.benchmarks["test"]] == ["Solve x^2=4 for x>0"]
    nested = load(f"hf:{dataset_folder}/plain?problem=prompt.0.content&answer=reward_model.ground_truth")
    assert nested.problems[2] == Problem("plain:2", "P3", "3")
    assert load(f"hf:{dataset_folder}/files:train").problems[0].problem == "What is 1/7?"


def test_data_set_errors(dataset_folder):
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"): load(f"hf:{dataset_folder}/dict:dev")
    with pytest.raises(ValueError, match="no 'Frage'; it has 'Question'"): load(f"hf:{dataset_folder}/dict?problem=Frage")


def test_a_hub_name_without_a_network_is_one_clear_error(monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'no-one/no-such-set' could not be loaded from the hub .*it takes a network"):
        load("hf:no-one/no-such-set")


# ------------------------------------------------------------------------------------------- reasoning-gym
def test_reasoning_gym():
    task = load("reasoning_gym:chain_sum?size=50&seed=3&min_terms=2&max_terms=3")
    assert len(task.problems) == 50 and len(task.benchmarks["heldout"]) == 30
    p, q = task.problems[0], task.benchmarks["heldout"][0]
    texts = [f"<answer>{p.answer}</answer>", f"<answer>{p.answer}0</answer>", p.answer + " is it", None,
             f"so <answer> {q.answer} </answer>"]
    assert task.verify_many([p, p, p, p, q], texts).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert "<answer>" in task.prompt(p)


# ------------------------------------------------------------------------------------------- math-verify in the pool
def children(worker):
    return psutil.Process(worker.process.pid).children()


@pytest.fixture(scope="module")
def checker():
    pool = Pool(workers=2)
    pool.check([("math", "1", "1")] * 4)
    yield pool
    pool.close()


@pytest.mark.parametrize("gold, text, expected", [
    (r"\frac{1}{2}", r"\boxed{0.5}", 1), ("0.5", r"\boxed{\frac12}", 1), ("72", "#### 72", 1), ("x^2-1", r"\boxed{(x-1)(x+1)}", 1),
    (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1), ("7", r"First \boxed{3}, then \boxed{7}", 1), ("7", r"First \boxed{7}, then \boxed{3}", 0),
    (r"\{1,2\}", r"\boxed{1} and \boxed{2}", 1), ("7", "", 0), ("7", r"\boxed{", 0), ("7", "\x00\ud800", 0),
    ("(1,2)", r"\boxed{(1, 2)}", 1), ("Evelyn", r"\boxed{Evelyn}", 1), ("$x + 1$", r"\boxed{x+1}", 1), ("7", r"\boxed{ }", 0),
    ("7", r"\boxed{٧}", 1), ("12", r"\boxed{1 2}", 1), ("1" * 200, r"\boxed{" + "1" * 200 + "}", 1), ("7", r"\boxed{7.0}", 1),
    ("007", r"\boxed{7}", 1), ("7", r"\boxed{-7}", 0), ("-7", r"$\boxed{-7}$.", 1),
    ("50\\%", r"\boxed{0.5}", 1), ("7", r"\boxed{7" + "}" * 3000, 1), ("7", r"\boxed{8}" + "x" * 10_000, 0)])
def test_math_verdicts(checker, gold, text, expected):
    assert checker.check([("math", gold, text)]) == [expected]


def test_hostile_answers_are_wrong_and_cost_a_second_each(checker):
    before, t0 = checker.restarts, time.monotonic()
    requests = [("math", "2", t) for t in (HOSTILE[0], r"\boxed{2}", HOSTILE[1], r"\boxed{2}", HOSTILE[0], r"\boxed{3}")]
    assert checker.check(requests) == [0, 1, 0, 1, 0, 0]
    # three seconds of processor time on two workers, at most wall_seconds each on a machine that is busy with other things
    assert time.monotonic() - t0 < 3 * (checker.wall_seconds + 2)
    assert 1 <= checker.restarts - before <= 3      # (an integral that sympy gives up on is wrong without a death)
    assert checker.check([("math", "2", r"\boxed{2}")] * 5) == [1] * 5


def test_memory_is_limited():
    """The worker's own main function, with a check that asks for as many bytes as the request says."""
    code = "from minirl_nb import tasks; tasks.CHECKS['hog'] = lambda n: len(bytearray(n)) == n; tasks._serve(5, 512)"
    requests = json.dumps([["hog", 1 << 30], ["hog", 1 << 20], ["hog", 1 << 40], ["math", "2", r"\boxed{2}"]]).encode() + b"\n"
    out = subprocess.run([sys.executable, "-c", code], input=requests, capture_output=True, timeout=60).stdout
    assert out == b"r.0.1.0.1"


EXPRESSIONS = r"""x^2+3x-4 | (1,2) | \frac{3}{4} | 2\sqrt{3} | -17 | \{1,2,3\} | [0,1) | x\in(1,2]
    | \begin{pmatrix}1&2\\3&4\end{pmatrix} | \log_2 5
    | \sin x+\cos^2 x | 3\cdot 10^5 | \int_0^1 x dx | \sum_{i=1}^n i | x=3,y=4 | f(x)=2x | \binom{5}{2} | 2^{n+1}-1 | 5! | a_{n}=n^2
    | 1\frac{1}{2} | 90^\circ | 12,345 | \text{east} | x<y<z | (-\infty, 3)\cup[5,\infty) | e^{i\pi} | \frac{x^2-1}{x+1}+xy | 2(x+1)(x-3)
    | \pm 3 | \overline{AB} | 3\% | \$5 | 1{,}000 | x^2+y^2=1 | \frac{ | x^ | )(""".split("|")


def test_two_stage_parsing_changes_no_tree(tmp_path):
    code = """if True:
        import json, logging, sys
        from math_verify import parse
        from minirl_nb import tasks
        logging.disable(50)
        boxes = ["\\\\boxed{" + e.strip() + "}" for e in json.load(open(sys.argv[1]))]
        trees = lambda: [[repr(x) for x in parse(box, parsing_timeout=None)] for box in boxes]
        plain = trees(); tasks._two_stage_parsing(); assert len(plain) > 30
        print([(a, b) for a, b in zip(plain, trees()) if a != b])"""
    (tmp_path / "e.json").write_text(json.dumps(EXPRESSIONS))
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "e.json"], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_a_worker_that_dies_is_replaced(checker):
    checker.check([("math", "1", "1")] * 8)
    for victim in (children(checker.workers[0])[0], checker.workers[0].process):    # the one that answers; its parent
        before = checker.restarts
        victim.kill()
        psutil.wait_procs([psutil.Process(victim.pid)] if psutil.pid_exists(victim.pid) else [], timeout=1)
        assert checker.check([("math", "5", r"\boxed{5}")] * 40) == [1.0] * 40     # it was idle: no answer is to blame
        assert checker.restarts >= before
    checker.close()
    assert checker.check([("math", "5", r"\boxed{5}")] * 4) == [1.0] * 4


def test_a_worker_that_sleeps_is_replaced():
    pool = Pool(workers=1, wall_seconds=1.0)
    pool.check([("math", "1", "1")])
    child, = children(pool.workers[0])
    child.suspend()
    # the answer must have begun when it sleeps: else it is the batch that is given START_SECONDS, and nothing is wrong yet
    pool.workers[0].answering = True
    send = pool.workers[0].send
    def send_and_begin(*args):
        send(*args)
        pool.workers[0].deadline = time.monotonic() + pool.wall_seconds
    pool.workers[0].send = send_and_begin
    t0 = time.monotonic()
    assert pool.check([("math", "1", r"\boxed{1}"), ("math", "1", r"\boxed{1}")]) == [0, 1]
    assert pool.restarts == 1 and time.monotonic() - t0 < 30
    pool.close()


def test_workers_that_cannot_start_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the processes that check answers do not start"): Pool(workers=1).check([("math", "1", "1")])


def test_from_threads(checker):
    results = {}
    work = lambda i: results.setdefault(i, checker.check([("math", str(i), rf"\boxed{{{i}}}"), ("math", str(i), rf"\boxed{{{i + 1}}}")]))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert results == {i: [1, 0] for i in range(8)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=80), st.none(), st.floats(), st.binary(max_size=8), st.lists(st.text(max_size=3), max_size=2),
                          st.text(alphabet="\\{}boxedfrac^_$()0123456789+-*/=,. ", max_size=60).map(lambda s: r"\boxed{" + s)), max_size=6))
def test_math_verifier_never_raises(texts):
    p = Problem("p", "p", r"\frac{22}{7}")
    verdicts = tasks.verify_math([p] * len(texts), texts)
    assert len(verdicts) == len(texts) and set(verdicts) <= {0.0, 1.0}


def test_strange_golden_answers(checker):
    golds = ["", "Evelyn", "$$", "\\boxed{", "1", "\\frac{", HOSTILE[0]]
    assert checker.check([("math", gold, r"\boxed{1}") for gold in golds]) == [0, 0, 0, 0, 1, 0, 0]


def ordinary(n, seed=0):
    "n answers as an instruct model writes them, no two alike, about half of them right."
    rng, out = random.Random(seed), []
    for _ in range(n):
        a, b, c = rng.randrange(2, 900), rng.randrange(2, 90), rng.randrange(2, 40)
        gold = rng.choice([f"{a}", rf"\frac{{{a}}}{{{b}}}", rf"{a}\sqrt{{{c}}}", f"({a},{b})", f"{a}.{b}", f"x^2+{a}x-{b}"])
        given = gold if rng.random() < 0.5 else gold.replace(str(a), str(a + 1))
        work = " ".join(f"Step {j}: we have $y_{j} = {rng.randrange(999)}x + {j}$, so the sum grows." for j in range(12))
        out.append(("math", gold, f"{work} Hence the answer is $\\boxed{{{given}}}$."))
    return out


def test_rate_of_ordinary_answers(checker):
    checker.check(ordinary(64, seed=1))
    cpu = lambda: sum(sum(c.cpu_times()[:2]) for w in checker.workers for c in children(w))
    requests, c0, t0 = ordinary(1000), cpu(), time.monotonic()
    verdicts = checker.check(requests)
    clock, processor = time.monotonic() - t0, cpu() - c0
    print(f"math-verify pool: {len(requests) / clock:.0f} ordinary answers/s by the clock, "
          f"{2 * len(requests) / processor:.0f}/s by the processor time of two cores")
    assert 400 < sum(verdicts) < 600
    # the goal is 500/s on two idle cores (tests/bench measures it); by processor time, and with a wide margin, for a busy machine
    assert 2 * len(requests) / processor > 150


def test_workers_are_light_and_nobody_is_left_behind(tmp_path):
    """A parent that is killed with kill -9, with one worker idle and one in an endless computation, leaves no process."""
    script = tmp_path / "parent.py"      # no __main__ guard: the workers must not run this file
    script.write_text(f"""
import os, threading, time
from minirl_nb.tasks import Pool
p = Pool(workers=2)
kids = []
while len(kids) < 2:
    p.check([("math", "1", "1")] * 8)
    kids = [k for w in p.workers if w.ready for k in open(f"/proc/{{w.process.pid}}/task/{{w.process.pid}}/children").read().split()]
print("torch" in open(f"/proc/{{kids[0]}}/maps").read(), *kids, *[w.process.pid for w in p.workers], flush=True)
threading.Thread(target=p.check, args=([("math", "1", {HOSTILE[0]!r})],)).start()
time.sleep(0.3)
os.kill(os.getpid(), 9)
""")
    if not Path("/proc").is_dir(): pytest.skip("reads /proc")
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    torch_loaded, *pids = out.stdout.split()
    assert torch_loaded == "False" and len(pids) == 4, out.stderr
    def alive(pid):
        try: return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError: return False
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline: time.sleep(0.1)
    assert not any(map(alive, pids))


def test_importing_tasks_is_light():
    code = "import sys, minirl_nb.tasks; print(*[m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == ""


def test_hashes_of_the_data_are_what_the_readme_says():
    readme = (DATA / "README.md").read_text()
    for path in sorted((DATA / "arithmetic").glob("*.jsonl")):
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in readme, path.name
        for line in path.read_text().splitlines(): assert json.loads(line).keys() == {"id", "problem", "answer"}
