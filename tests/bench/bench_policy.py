"""Peak memory and time of token log-probabilities: chunked with recomputation against log_softmax,
forward and backward.

    # live bytes, resident memory of the chunked way, times: a minute
    OMP_NUM_THREADS=1 python -m tests.bench.bench_policy
    # also log_softmax itself at full size (needs 9 GB) and its gradients
    OMP_NUM_THREADS=1 python -m tests.bench.bench_policy --full

Live bytes count the tensors made above the inputs (`policy.LiveBytes`), at full size on the meta
device. Resident memory is the growth of a fresh process's peak over what it held with its inputs
made, so it includes what operations need inside."""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from minirl_nb.policy import Head, LiveBytes, head_logprobs

V, T, H = 151_936, 4_096, 256


def usual(hidden, weight, labels):
    return torch.log_softmax(F.linear(hidden, weight), -1).gather(1, labels[:, None])[:, 0]


def chunked(hidden, weight, labels):
    return head_logprobs(hidden, Head(weight), labels)[0]


WAYS = {"log_softmax": usual, "chunked": chunked}


def inputs(device="cpu", n=T, v=V, h=H):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, h, device=device), torch.randn(v, h, device=device).mul_(0.1)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(0, v, (n,), device=device),
        torch.randn(n, device=device),
    )


def gradients(f, hidden, weight, labels, g):
    return torch.autograd.grad((f(hidden, weight, labels) * g).sum(), (hidden, weight))


def live(name):
    args = inputs("meta")
    with LiveBytes() as bytes_:
        gradients(WAYS[name], *args)
    return bytes_.peak


def resident(name):
    """Bytes by which a fresh process's resident memory grows beyond its inputs, at full size, and
    seconds."""
    code = (
        "import json, resource, time; from tests.bench import bench_policy as b; args = b.inputs(); "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; "
        "before, t = peak(), time.perf_counter(); "
        f"b.gradients(b.WAYS[{name!r}], *args); print(json.dumps([peak() - before, time.perf_counter() - t]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory():
    "Rows (label, value, unit, goal) of the front page's table."
    chunked, plain = live("chunked"), live("log_softmax")
    grown, seconds = resident("chunked")
    return [
        ("policy, log_softmax: peak of live tensors", plain / 2**20, "MiB", ""),
        ("policy, chunked: peak of live tensors", chunked / 2**20, "MiB", ""),
        ("policy, chunked / log_softmax", 100 * chunked / plain, "%", "<= 10"),
        ("policy, chunked: growth of resident memory, a real run", grown / 2**20, "MiB", ""),
        ("policy, chunked: that run's forward and backward", seconds, "s", ""),
    ]


def full():
    "log_softmax itself at full size, and the gradients of both."
    grown, seconds = resident("log_softmax")
    rows = [
        ("log_softmax: growth of resident memory, a real run", grown / 2**20, "MiB", ""),
        ("log_softmax: that run's forward and backward", seconds, "s", ""),
    ]
    args = inputs()
    theirs = gradients(usual, *args)
    for name, a, b in zip(("states", "matrix"), gradients(chunked, *args), theirs):
        rows.append(
            (
                f"relative difference of the gradient of the {name}",
                float((a - b).norm() / b.norm()),
                "",
                "<= 1e-5",
            )
        )
    return rows


def small(rounds=30):
    """Where one chunk holds everything: 4,096 tokens of a 16-word vocabulary, both sides in turns,
    best of the rounds."""
    args, best = inputs(v=16, h=64), dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for name, f in WAYS.items():
            t = time.process_time()
            gradients(f, *args)
            best[name] = min(best[name], time.process_time() - t)
    return [
        (f"{name}, 4,096 tokens of 16 words, forward and backward", 1e3 * s, "ms", "")
        for name, s in best.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true")
    for label, value, unit, goal in (
        memory() + small() + (full() if parser.parse_args().full else [])
    ):
        print(f"{label:70s} {value:12.4g} {unit:5s} {goal}")
