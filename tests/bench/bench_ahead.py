"""One step off against taking turns: two processes on two cores, paired runs of the demo's recipe.

`make bench ARGS=ahead`. Wall times mean something on an idle machine only; the seconds of the
processor, which are counted for both processes, are the same on a busy one."""

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path


def processor_seconds(engine):
    "Seconds of the processor that this process has taken, and the engine's if it has one."
    total = time.process_time()
    if process := getattr(engine, "_process", None):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system
    return total


def a_run(number, rollout_steps):
    "Rollout steps of one run, without the first two and the last: [{what: seconds}]."
    from minirl_nb import train
    from tests.bench.__main__ import demo

    marks = []

    def mark(run):
        marks.append((time.perf_counter(), processor_seconds(run.engine)))

    changes = {"rollout.ahead": number, "output.checkpoint_every": 0, "evaluation.every": 0}
    with tempfile.TemporaryDirectory() as d:
        config = demo(f"{d}/run", **changes)
        config = replace(config, steps=rollout_steps * config.batch.updates)
        result = train.train(config, on_step=mark)
    rows = [r for r in result.steps() if r["mini_batch"] == 0]
    found = []
    for i in range(2, rollout_steps - 1):
        phases = {
            k.removeprefix("seconds/"): v for k, v in rows[i].items() if k.startswith("seconds/")
        }
        training = sum(phases.get(k, 0.0) for k in ("recompute", "update", "monitor", "verify"))
        wall, processor = (b - a for a, b in zip(marks[i - 1], marks[i]))
        # a rollout that is sampled ahead stands in the row of the step that learns from it
        sampling = rows[i + 1 if number else i]["seconds/generate"]
        found.append(
            {
                "wall": wall,
                "processor": processor,
                "sampling": sampling,
                "training": training,
                "hand-over": phases["transfer"] + phases["parity"],
            }
        )
    return found


def ahead(rounds, rollout_steps=7):
    "The table of this section."
    taken = {0: [], 1: []}
    for _ in range(rounds):
        for number in taken:
            taken[number] += a_run(number, rollout_steps)

    def median(number, what):
        return statistics.median(step[what] for step in taken[number])

    rows = []
    for number, name in ((0, "in turns"), (1, "one step off")):
        for what in ("sampling", "training", "hand-over", "processor", "wall"):
            rows.append((f"rollout step {name}, {what}", median(number, what), "s", ""))
    longer = statistics.median(max(s["sampling"], s["training"]) + s["hand-over"] for s in taken[1])
    return [
        *rows,
        (
            "one step off, wall / (longer phase + hand-over)",
            median(1, "wall") / longer,
            "x",
            "<= 1.1",
        ),
        ("in turns / one step off, wall", median(0, "wall") / median(1, "wall"), "x", ""),
        (
            "one step off / in turns, processor",
            median(1, "processor") / median(0, "processor"),
            "x",
            "",
        ),
    ]
