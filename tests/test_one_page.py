"""The page 00_one_page beside the package.

The same weights, prompts and random numbers give the same responses, losses and gradient norms, and
a broken line of the page is noticed."""

import ast
import copy
import importlib
import json
import math
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirl_nb.objective import MINIRL, group_advantage
from minirl_nb.rollout import TorchEngine
from minirl_nb.train import load_config, train

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "00_one_page.ipynb"
COLDSTART = ROOT / "data" / "coldstart"
PROMPTS, GROUP, N, ROLLOUTS, LONGEST, LR = 8, 16, 2, 3, 32, 5e-4

# Two float32 forwards that sum in another order agree in log pi to about 1e-6 (the parity probe of
# page 10). A response has up to 32 tokens, |A| w (1 + |log pi|) is about 1, and nothing need
# cancel: 32 x 1e-6. Found: 3e-7, also after six updates.
LOSS = 3e-5
# The gradient has the relative error of its terms, 3e-5, and a norm of about 3. Found: 2e-6.
NORM = 1e-4
# A mean over tokens of log mu - log pi_old, each good to 1e-6. Found: 4e-8.
KL = 1e-6


def code():
    "The code cells of the method: all but the one that checks the answers to the exercises."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    sources = [("".join(c["source"]), c["cell_type"]) for c in cells]
    exercises = next(i for i, (text, _) in enumerate(sources) if "## Exercises" in text)
    return [text for text, kind in sources[:exercises] if kind == "code"]


def page(*change):
    "The imports and functions of the page; `change` replaces one piece of its text by another."
    source = "\n\n".join(code())
    if change:
        old, new = change
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times on the page"
        source = source.replace(old, new)
    tree = ast.parse(source)
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    names = {"tokenizer": AutoTokenizer.from_pretrained(COLDSTART)}
    exec(compile(tree, PAGE.name, "exec"), names)
    return names


def coldstart():
    return AutoModelForCausalLM.from_pretrained(COLDSTART, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of the package: the calls of its engine with what they gave, and its metrics."
    folder = tmp_path_factory.mktemp("one_page") / "run"
    config = load_config(
        None,
        {
            "model.path": str(COLDSTART),
            "output.folder": str(folder),
            "steps": ROLLOUTS * N,
            "batch.prompts": PROMPTS,
            "batch.updates": N,
            "rollout.responses": GROUP,
            "rollout.max_new_tokens": LONGEST,
            "rollout.fp8": "fp8_per_channel",
            "rollout.probe": 0,
            "objective.replay": "R3",
            "optimizer.lr": LR,
            "optimizer.warmup": 0,
            "evaluation.samples": 1,
            "evaluation.numerics": "rollout",
            "output.monitor": 0,
            "output.progress": False,
            "output.figure": False,
            "output.samples_every": 0,
            "threads": 1,
        },
    )
    generate, calls = TorchEngine.generate, []

    def watched(engine, prompts, sampling):
        out = generate(engine, prompts, sampling)
        if len(prompts) == PROMPTS * N:  # an evaluation asks for other numbers of prompts
            calls.append((torch.tensor(prompts), sampling, copy.deepcopy(out)))
        return out

    with patch.object(TorchEngine, "generate", watched):
        train(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(calls) == ROLLOUTS
    return calls, [row for row in rows if row["kind"] == "step"]


def inputs(names, prompts, rollout):
    "A rollout of the package as the page's `learn` wants it, and the page's own rewards."
    P = prompts.shape[1]
    assert (rollout.prompt_length == P).all()
    texts = names["tokenizer"].batch_decode(rollout.tokens[:, P:])
    problems = names["tokenizer"].batch_decode(prompts[:, :-1])
    factors = [p.split("*") for p in problems for _ in range(GROUP)]
    answers = [str(int(a) * int(b)) for a, b in factors]
    reward = torch.tensor([names["reward_of"](t, a) for t, a in zip(texts, answers, strict=True)])
    given = (
        rollout.tokens,
        rollout.response_mask[:, 1:],
        rollout.logp_mu[:, 1:],
        rollout.routes[:, :-1].long(),
    )
    return given, reward


def learned(names, run):
    "The page's rows for all rollouts of a run, from the cold start."
    model, out = coldstart(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for prompts, _, rollout in run[0]:
        given, reward = inputs(names, prompts, rollout)
        rows = names["learn"](model, optimizer, given, reward, GROUP, N)
        for row, part in zip(rows, reward.chunk(N), strict=True):
            out.append(row | {"reward": part.mean().item()})
    return out


def differences(names, run):
    "The largest difference between page and package in loss, gradient norm, KL and reward."
    pairs = list(zip(learned(names, run), run[1], strict=True))
    keys = ("loss", "grad_norm", "kl", "reward")
    return {k: max(abs(a[k] - b[k]) for a, b in pairs) for k in keys}


def test_the_page_is_short_and_imports_nothing_of_the_package():
    lines = [len(source.splitlines()) for source in code()]
    assert sum(lines) <= 150 and max(lines) <= 40, lines
    assert "minirl_nb" not in "\n".join(code())


def test_the_page_has_the_packages_losses_and_gradient_norms(run):
    "Six gradient steps on three FP8 rollouts of the package, two updates each, with R3."
    assert any(row["clip_high"] + row["clip_low"] > 0 for row in run[1]), "no token was masked"
    assert all(row["grad_norm"] > 0.1 for row in run[1])
    found = differences(page(), run)
    assert found["loss"] < LOSS and found["grad_norm"] < NORM and found["kl"] < KL, found
    assert found["reward"] == 0.0


# Each moved loss, gradient norm or KL of the first rollout by at least 50 times its bound.
BREAKS = {
    "no replay in pi_old": (
        "logprobs(model, tokens, routes)\n    log",
        "logprobs(model, tokens)\n    log",
    ),
    "no replay in the updates": (
        "logprobs(model, tokens[rows], routes[rows])",
        "logprobs(model, tokens[rows])",
    ),
    "another layer's experts": ("routes[:, :, len(used)]", "routes[:, :, 0]"),
    "dead gates": ("logits.softmax(-1)", "logits.detach().softmax(-1)"),
    "gates not normalised": ("weights = weights / weights.sum(-1, keepdim=True)", "pass"),
    "mask sign": ("(advantage > 0) & (r > 1.27)", "(advantage < 0) & (r > 1.27)"),
    "no mask": ("mask & ~too_far", "mask"),
    "mask around mu": ("r = (logp.detach() - logp_old)", "r = (logp.detach() - logp_mu)"),
    "no weight": ("terms = weight * advantage", "terms = advantage"),
    "weight around pi_old": (
        "weight = (logp.detach() - logp_mu)",
        "weight = (logp.detach() - logp_old)",
    ),
    "weight with a gradient": ("weight = (logp.detach() - logp_mu)", "weight = (logp - logp_mu)"),
    "no baseline": ("reward - reward.mean(1, keepdim=True)", "reward"),
    "mean over tokens": (".sum() / len(logp)", ".sum() / mask.sum()"),
    "no step": ("        optimizer.step()\n", ""),
}


@pytest.mark.parametrize("change", BREAKS.values(), ids=BREAKS)
def test_a_broken_line_is_noticed(run, change):
    calls, rows = run
    found = differences(page(*change), (calls[:1], rows[:N]))
    excess = found["loss"] / LOSS, found["grad_norm"] / NORM, found["kl"] / KL
    assert max(excess) > 10, found


# 160 float64 terms of size 10 in another order: 160 x 10 x 1.1e-16
EXACT = 2e-13


def equation_7(names):
    "Page beside package on ratios beyond every threshold: the gaps of the loss and its gradient."
    g = torch.Generator().manual_seed(0)
    logp, old, mu = (-2 * torch.rand(8, 20, generator=g, dtype=torch.float64) for _ in range(3))
    mu[:, ::4] -= 3.0  # weights beyond 5
    mask = torch.rand(8, 20, generator=g) < 0.7
    reward = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.float64)
    advantage = names["advantage_of"](reward, 4)
    theirs = group_advantage(reward, torch.arange(8) // 4)
    assert ((logp - mu)[mask] > math.log(5)).any()
    x, y = (logp.clone().requires_grad_() for _ in range(2))
    loss = names["loss_of"](logp=x, logp_old=old, logp_mu=mu, advantage=advantage, mask=mask)
    want = MINIRL.loss(logp=y, logp_old=old, logp_mu=mu, advantage=theirs, response_mask=mask)
    loss.backward()
    want.backward()
    return abs(loss - want).item(), (x.grad - y.grad).abs().max().item()


def test_equation_7_with_all_its_cases():
    assert max(equation_7(page())) < EXACT


LOSS_BREAKS = {
    "no truncation": (".clamp(max=5.0)", ""),
    "eps_high": ("r > 1.27", "r > 1.2"),
    "eps_low": ("r < 0.8", "r < 0.73"),
    "no baseline": ("reward - reward.mean(1, keepdim=True)", "reward"),
}


@pytest.mark.parametrize("change", LOSS_BREAKS.values(), ids=LOSS_BREAKS)
def test_a_broken_loss_is_noticed(change):
    assert max(equation_7(page(*change))) > 1e6 * EXACT


def uniform(sampling, requests):
    "What the package's engine draws: a Philox stream for each request, keyed by (seed, request)."
    streams = (np.random.Philox(key=[sampling.seed, i]) for i in range(requests))
    return torch.from_numpy(np.stack([np.random.Generator(s).random(LONGEST) for s in streams]))


def sampled(names, model, prompts, sampling, rollout):
    """The page's rollout beside the package's: the share of equal responses and, over these,
    the median |difference of log mu| and the share of different choices of experts."""
    (tokens, mask, logp, routes), _ = inputs(names, prompts, rollout)
    repeated = prompts.repeat_interleave(GROUP, 0)
    mine = names["sample"](names["fp8_copy"](model), repeated, uniform(sampling, len(repeated)))
    S = mask.shape[1]
    same = ((mine[0][:, 1 : S + 1] == tokens[:, 1:]) | ~mask).all(1)
    same &= (mine[1][:, :S] == mask).all(1) & ~mine[1][:, S:].any(1)
    at = mask & same[:, None]
    if not at.any():
        return 0.0, math.inf, 1.0
    median = (mine[2][:, :S] - logp)[at].abs().median().item()
    valid = rollout.routes_valid[:, :-1] & same[:, None]
    differ = mine[3][:, :S].sort(-1).values != routes.sort(-1).values
    return same.double().mean().item(), median, differ.any(-1)[valid].double().mean().item()


# In float32 both engines agree to 1e-6. FP8 makes more of it only where that last digit decides a
# rounding: a token has about 1,000 rounded numbers, whose grid is 2^-4 apart in relative terms, so
# 1,000 x 1e-6 / 2^-4, 1-2% of tokens. Such a token's log mu moves by some 0.01, which is also the
# chance that another token is drawn: 25 tokens x 2% x 1% is half a percent of responses.
SAME, MEDIAN, ROUTES = 0.95, 1e-5, 5e-3


def test_the_page_samples_what_the_package_samples(run):
    "Also from the weights that the page's own updates have reached. Found: all responses equal."
    names, model = page(), coldstart()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for prompts, sampling, rollout in run[0]:
        same, median, routes = sampled(names, model, prompts, sampling, rollout)
        assert same > SAME and median < MEDIAN and routes < ROUTES, (same, median, routes)
        names["learn"](model, optimizer, *inputs(names, prompts, rollout), GROUP, N)


SAMPLING_BREAKS = {
    "weights not rounded": ("weight.copy_(fp8(weight))", "pass"),
    "activations not rounded": ("(fp8(args[0]), *args[1:])", "args"),
    "not rounded inside experts": ("fp8(gate(h))", "gate(h)"),
    "head rounded": (' and name != "lm_head"', ""),
    "one scale a tensor": ("x.abs().amax(-1, keepdim=True)", "x.abs().amax()"),
    "experts of other tokens": ("used.append(experts)", "used.append(experts.flip(0))"),
    "shifted by one": ("(prompts.shape[1] - 1, 0)", "(prompts.shape[1], -1)"),
    "ended responses go on": ("alive = alive & (new", "alive = (new"),
}


@pytest.mark.parametrize("change", SAMPLING_BREAKS.values(), ids=SAMPLING_BREAKS)
def test_a_broken_engine_is_noticed(run, change):
    same, median, routes = sampled(page(*change), coldstart(), *run[0][0])
    assert same < SAME or median > 10 * MEDIAN or routes > 2 * ROUTES, (same, median, routes)


def test_the_map_leads_somewhere():
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    book = next(t for c in cells if "## Where each line" in (t := "".join(c["source"])))
    for link in re.findall(r"\]\((\w+\.ipynb)\)", book):
        assert (PAGE.parent / link).exists(), link
    names = [row.split("|")[2] for row in book.splitlines() if row.startswith("|")]
    for module, name in re.findall(r"`(\w+)\.(\w+)`", " ".join(names)):
        assert hasattr(importlib.import_module(f"minirl_nb.{module}"), name), f"{module}.{name}"
    functions = re.findall(r"^def (\w+)", "\n\n".join(code()), re.M)
    missing = [f for f in functions if f"`{f}`" not in book]
    assert not missing, f"not on the map: {missing}"
