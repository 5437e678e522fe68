"""Engineering tests of `verification`: hostile answers, and processes that die, sleep or stay."""

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_nb import verification
from minirl_nb.answers import Problem
from minirl_nb.verification import Pool

BY_VALUE = {"unevaluated": "accept"}  # the default rules refuse these before any algebra
HOSTILE = [r"\boxed{9^{9^{9^9}}}", r"\boxed{\int_0^\infty e^{x^{x^x}}dx}"]


def children(worker):
    return psutil.Process(worker.process.pid).children()


@pytest.fixture(scope="module")
def checker():
    pool = Pool(workers=2)
    pool.check([("math", "1", "1")] * 4)
    yield pool
    pool.close()


def test_hostile_answers_are_wrong_and_cost_a_second_each(checker):
    before, t0 = checker.restarts, time.monotonic()
    requests = [
        ("math", "2", t, BY_VALUE)
        for t in (HOSTILE[0], r"\boxed{2}", HOSTILE[1], r"\boxed{2}", HOSTILE[0], r"\boxed{3}")
    ]
    assert checker.check(requests) == [0, 1, 0, 1, 0, 0]
    # three seconds of processor time on two workers, at most wall_seconds each on a machine that is
    # busy with other things
    assert time.monotonic() - t0 < 3 * (checker.wall_seconds + 2)
    assert (
        1 <= checker.restarts - before <= 3
    )  # (an integral that sympy gives up on is wrong without a death)
    assert checker.check([("math", "2", r"\boxed{2}")] * 5) == [1] * 5


def test_memory_is_limited():
    "The worker's own main function, with a check that asks for as many bytes as the request says."
    code = (
        "from minirl_nb import verification as v\n"
        "v.CHECKS['hog'] = lambda n: len(bytearray(n)) == n\n"
        "v._serve(5, 512)"
    )
    requests = (
        json.dumps(
            [["hog", 1 << 30], ["hog", 1 << 20], ["hog", 1 << 40], ["math", "2", r"\boxed{2}"]]
        ).encode()
        + b"\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], input=requests, capture_output=True, timeout=60
    ).stdout
    assert out == b"r.0.1.0.1"


def test_a_worker_that_dies_is_replaced(checker):
    checker.check([("math", "1", "1")] * 8)
    for victim in (
        children(checker.workers[0])[0],
        checker.workers[0].process,
    ):  # the one that answers; its parent
        before = checker.restarts
        victim.kill()
        psutil.wait_procs(
            [psutil.Process(victim.pid)] if psutil.pid_exists(victim.pid) else [], timeout=1
        )
        assert (
            checker.check([("math", "5", r"\boxed{5}")] * 40) == [1.0] * 40
        )  # it was idle: no answer is to blame
        assert checker.restarts >= before
    checker.close()
    assert checker.check([("math", "5", r"\boxed{5}")] * 4) == [1.0] * 4


def test_a_worker_that_sleeps_is_replaced():
    pool = Pool(workers=1, wall_seconds=1.0)
    pool.check([("math", "1", "1")])
    (child,) = children(pool.workers[0])
    child.suspend()
    # the answer must have begun when it sleeps: else it is the batch that is given START_SECONDS,
    # and nothing is wrong yet
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
    with pytest.raises(RuntimeError, match="the processes that check answers do not start"):
        Pool(workers=1).check([("math", "1", "1")])


def test_from_threads(checker):
    results = {}

    def work(i):
        return results.setdefault(
            i,
            checker.check(
                [("math", str(i), rf"\boxed{{{i}}}"), ("math", str(i), rf"\boxed{{{i + 1}}}")]
            ),
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: [1, 0] for i in range(8)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=80),
            st.none(),
            st.floats(),
            st.binary(max_size=8),
            st.lists(st.text(max_size=3), max_size=2),
            st.text(alphabet="\\{}boxedfrac^_$()0123456789+-*/=,. ", max_size=60).map(
                lambda s: r"\boxed{" + s
            ),
        ),
        max_size=6,
    )
)
def test_math_verifier_never_raises(texts):
    p = Problem("p", "p", r"\frac{22}{7}")
    verdicts = verification.verify_math([p] * len(texts), texts)
    assert len(verdicts) == len(texts) and set(verdicts) <= {0.0, 1.0}


def ordinary(n, seed=0):
    "n answers as an instruct model writes them, no two alike, about half of them right."
    rng, out = random.Random(seed), []
    for _ in range(n):
        a, b, c = rng.randrange(2, 900), rng.randrange(2, 90), rng.randrange(2, 40)
        gold = rng.choice(
            [
                f"{a}",
                rf"\frac{{{a}}}{{{b}}}",
                rf"{a}\sqrt{{{c}}}",
                f"({a},{b})",
                f"{a}.{b}",
                f"x^2+{a}x-{b}",
            ]
        )
        given = gold if rng.random() < 0.5 else gold.replace(str(a), str(a + 1))
        work = " ".join(
            f"Step {j}: we have $y_{j} = {rng.randrange(999)}x + {j}$, so the sum grows."
            for j in range(12)
        )
        out.append(("math", gold, f"{work} Hence the answer is $\\boxed{{{given}}}$."))
    return out


def test_rate_of_ordinary_answers(checker):
    checker.check(ordinary(64, seed=1))

    def cpu():
        return sum(sum(c.cpu_times()[:2]) for w in checker.workers for c in children(w))

    requests, c0, t0 = ordinary(1000), cpu(), time.monotonic()
    verdicts = checker.check(requests)
    clock, processor = time.monotonic() - t0, cpu() - c0
    print(
        f"math-verify pool: {len(requests) / clock:.0f} ordinary answers/s by the clock, "
        f"{2 * len(requests) / processor:.0f}/s by the processor time of two cores"
    )
    assert 400 < sum(verdicts) < 600
    # the goal is 500/s on two idle cores (tests/bench measures it); by processor time, and with a
    # wide margin, for a busy machine
    assert 2 * len(requests) / processor > 150


def test_workers_are_light_and_nobody_is_left_behind(tmp_path):
    """A parent that is killed with kill -9, with one worker idle and one in an endless computation,
    leaves no process."""
    script = tmp_path / "parent.py"  # no __main__ guard: the workers must not run this file
    script.write_text(f"""
import os, threading, time
from minirl_nb.verification import Pool
p = Pool(workers=2)
kids = []
while len(kids) < 2:
    p.check([("math", "1", "1")] * 8)
    pids = [w.process.pid for w in p.workers if w.ready]
    kids = [k for i in pids for k in open(f"/proc/{{i}}/task/{{i}}/children").read().split()]
print("torch" in open(f"/proc/{{kids[0]}}/maps").read(), *kids, *pids, flush=True)
threading.Thread(target=p.check, args=([("math", "1", {HOSTILE[0]!r}, {BY_VALUE})],)).start()
time.sleep(0.3)
os.kill(os.getpid(), 9)
""")
    if not Path("/proc").is_dir():
        pytest.skip("reads /proc")
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    torch_loaded, *pids = out.stdout.split()
    assert torch_loaded == "False" and len(pids) == 4, out.stderr

    def alive(pid):
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
