"""Rate of the math-verify pool on ordinary answers, and what hostile ones cost.

    python tests/bench/bench_tasks.py [--workers 2]

Two kinds of load: different problems with one answer each (numbers, fractions, roots, pairs,
polynomials; about half right), and groups of 16 answers to one problem, as a rollout step has them.
Rates by the clock, and by the workers' processor time, which a busy neighbour disturbs less. Then a
batch in which one answer of 50 is a power tower.
"""

import argparse
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_verification import BY_VALUE, HOSTILE, ordinary

from minirl_nb.verification import Pool


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--answers", type=int, default=2000)
    args = parser.parse_args()
    pool = Pool(workers=args.workers)
    while not all(w.ready for w in pool.workers) or not pool.workers:
        pool.check(ordinary(200, seed=99))

    def processor():
        return sum(
            sum(c.cpu_times()[:2])
            for w in pool.workers
            for c in psutil.Process(w.process.pid).children()
        )

    def rate(name, requests):
        c, t = processor(), time.perf_counter()
        pool.check(requests)
        t, c = time.perf_counter() - t, processor() - c
        print(
            f"{name:42s} {len(requests) / t:7.0f} answers/s by the clock, "
            f"{args.workers * len(requests) / c:7.0f}/s by processor time"
        )

    rate("different problems", ordinary(args.answers, seed=1))
    grouped = [
        (kind, gold, text)
        for i in range(args.answers // 16)
        for kind, gold, text in ordinary(1, seed=1000 + i) * 16
    ]
    rate("groups of 16 answers", grouped)
    mixed = ordinary(500, seed=2)
    for i in range(0, 500, 50):
        mixed[i] = ("math", "1", HOSTILE[0], BY_VALUE)
    t, before = time.perf_counter(), pool.restarts
    verdicts = pool.check(mixed)
    assert not any(verdicts[::50])
    print(
        f"500 answers, 10 of them hostile: {time.perf_counter() - t:.1f} s "
        f"({pool.restarts - before} workers replaced)"
    )
    pool.close()


if __name__ == "__main__":
    main()
