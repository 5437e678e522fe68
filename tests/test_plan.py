"""The plan: what it foretells against what is measured, its limits in time and memory, its refusals."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from minirl_nb import plan, policy
from minirl_nb.cli import main
from minirl_nb.plan import (
    GPUS,
    Assumptions,
    Cluster,
    GiB,
    Ledger,
    Plan,
    decode,
    depths,
    lengths,
    model_config,
    refuse,
    rehearse,
    shape,
)
from minirl_nb.train import load_config

SMALL = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=512,
    intermediate_size=128,
    tie_word_embeddings=False,
)
MIXTURE = Qwen3MoeConfig(
    num_hidden_layers=9, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, **SMALL
)
THIN = Qwen3MoeConfig(
    **MIXTURE.to_dict() | {"num_hidden_layers": 3}
)  # run whole, so a plan of it is quick
DENSE = Qwen3Config(num_hidden_layers=4, **SMALL)
TIED = Qwen3Config(num_hidden_layers=2, **SMALL | {"tie_word_embeddings": True})
CPU = replace(Cluster.of("h100", 1), gpu="cpu")
BIG = {
    "model.path": "Qwen/Qwen3-30B-A3B",
    "model.compute": "bfloat16",
    "model.gradient_checkpointing": True,
    "parallel.expert": 8,
    "rollout.engine": "vllm",
    "rollout.fp8": "fp8_per_block",
    "rollout.max_new_tokens": 32768,
    "rollout.responses": 16,
    "batch.prompts": 64,
    "batch.tokens": 32768,
    "rollout.max_batch": 64,
    "evaluation.numerics": "rollout",
    "steps": 1200,
}


def saved(config, folder):
    config.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------- clusters and models
def test_gpus_by_name_and_what_is_refused():
    c = Cluster.of("H100", 64)
    assert (c.gpu, c.nodes, c.gpus_per_node) == ("h100", 8, 8) and c.memory == GPUS["h100"].memory
    assert Cluster.of("a100", 2).gpu == "a100-80" and Cluster.of("a100", 2).gpus_per_node == 2
    assert all(g.fp8 >= g.bf16 > g.float32 and g.link >= g.network for g in GPUS.values())
    for words in (("h1000", 8), ("h100", 0)):
        with pytest.raises(ValueError, match="known are a100-40|must be positive"):
            Cluster.of(*words)


def test_here_looks_at_this_machine(monkeypatch):
    import psutil

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    c = Cluster.here()
    assert (
        c.gpus == 4
        and c.nodes == 2
        and c.memory == pytest.approx(psutil.virtual_memory().total / 2)
        and c.bf16 > 1e8
    )


@pytest.mark.parametrize(
    "name, parameters, experts",
    [
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 128),
        ("Qwen/Qwen3-30B-A3B-Base", 30_532_122_624, 128),
        ("allenai/OLMoE-1B-7B-0924", 6_919_161_856, 64),
    ],
)
def test_configs_of_the_recipes_need_no_hub(name, parameters, experts, monkeypatch):
    """The counts are those of the published checkpoints."""
    from_pretrained = AutoConfig.from_pretrained

    def offline(path, *args, local_files_only=False, **kwargs):
        assert local_files_only or os.path.isdir(path), "asked the hub"
        return from_pretrained(path, *args, local_files_only=True, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    sh = shape(model_config(name))
    assert (sh.parameters, sh.E, sh.K) == (parameters, experts, 8)


def test_every_recipe_names_a_model_that_can_be_planned():
    from minirl_nb.train import recipes

    for name in recipes():
        path = load_config(name).model.path
        assert path in plan.PUBLISHED or path.startswith(("data/", "../data/")), name


def test_unknown_models_in_one_sentence():
    with pytest.raises(FileNotFoundError, match="there is no folder data/nothing"):
        model_config("data/nothing")


def test_kinds_of_layers_repeat():
    assert shape(MIXTURE).period == (0, 1) and depths(shape(MIXTURE)) == (3, 5)
    assert depths(shape(DENSE)) == (4, 4)  # small enough to be run whole
    every_third = Qwen3MoeConfig(
        **MIXTURE.to_dict() | {"num_hidden_layers": 20, "decoder_sparse_step": 3}
    )
    sh = shape(every_third)
    low, high = depths(sh)
    assert sh.period == (0, 3) and (20 - low) % 3 == (high - low) % 3 == 0 and low >= 4
    first_dense = Qwen3MoeConfig(
        **MIXTURE.to_dict() | {"num_hidden_layers": 20, "mlp_only_layers": [0]}
    )
    assert shape(first_dense).period == (1, 1) and min(depths(shape(first_dense))) >= 3


# ---------------------------------------------------------------------------------------------- memory
def real_peaks(hf, checkpointing, rows, width):
    "The same step on real numbers."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf).eval()
    model.set_attn_implementation("sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    policy._checked.add(model)
    ledger = Ledger(CPU, Assumptions())
    ledger.track_external(model, optimizer)
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: plan._at_head(ledger, args[0])
    )
    at = torch.zeros(rows * (width - 1), dtype=torch.long)
    with ledger:
        ledger.begin("forward")
        tokens = torch.zeros(rows, width, dtype=torch.long)
        logp, _ = policy._forward(
            model, at, at, dict(input_ids=tokens, attention_mask=None), entropy=False
        )
        logp.sum().backward()
        del logp
        ledger.begin("step")
        optimizer.step()
    return ledger.peak


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hf", [MIXTURE, DENSE, TIED], ids=["mixture", "dense", "tied"])
def test_fake_tensors_take_what_real_ones_take(hf, checkpointing):
    config = load_config(None, {"model.gradient_checkpointing": checkpointing})
    fake = plan.run_pass(
        config, hf, CPU, Assumptions(), hf.num_hidden_layers, 8, 96, 8 * 95, accumulate=False
    )
    real = real_peaks(hf, checkpointing, 8, 96)
    for part in (
        "forward",
        "head",
        "backward",
        "step",
    ):  # what remains is positions and tokens, a few kilobytes
        assert fake.peak[part] == pytest.approx(real[part], rel=0.01), part


def test_shapes_that_dtensor_works_out_are_not_counted():
    """It does so on tensors of global size, once for each operation: the first pass in a process must not see them."""
    config = load_config(
        None,
        {"model.compute": "bfloat16", "parallel.expert": 4, "model.gradient_checkpointing": True},
    )
    wider = Qwen3MoeConfig(
        **THIN.to_dict() | {"hidden_size": 80}
    )  # shapes that no other test has used
    with plan._processes(8):
        first, second = (
            plan.run_pass(config, wider, Cluster.of("h100", 8), Assumptions(), 3, 1, 64, 60)
            for _ in range(2)
        )
    assert first.peak == second.peak
    assert (
        first.peak["step"] < first.states + 1.2 * first.weights
    )  # one temporary of all parameters: foreach


@pytest.mark.parametrize("expert", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_line_through_two_depths_foretells_a_third(expert):
    config = load_config(
        None,
        {
            "model.compute": "bfloat16",
            "model.gradient_checkpointing": True,
            "parallel.expert": expert,
        },
    )
    cluster = Cluster.of("h100", 8)
    with plan._processes(8):
        a, b, c = (
            plan.run_pass(config, MIXTURE, cluster, Assumptions(), n, 1, 512, 500)
            for n in (3, 5, 9)
        )
    line = a.along(b, 3.0)
    for f in ("weights", "gradients", "optimizer"):
        assert getattr(line, f) == pytest.approx(getattr(c, f), rel=1e-6)
    for f in ("peak", "flops", "moved"):
        for k, v in getattr(c, f).items():
            assert getattr(line, f)[k] == pytest.approx(v, rel=2e-3), (f, k)
    for k, v in c.seconds.items():
        assert line.seconds[k] == pytest.approx(v, rel=0.02), k
    assert (
        c.optimizer == pytest.approx(2 * c.weights, rel=1e-3)
        and c.weights >= shape(MIXTURE).parameters * 4 / 8
    )
    assert (
        c.weights < shape(MIXTURE).parameters * 4 / 8 * 1.1
    )  # sharded: only the padding of uneven shards is more


def test_many_chunks_of_the_head_from_few(monkeypatch):
    monkeypatch.setattr(policy, "CHUNK", 512 * 16)  # 16 rows a chunk
    config = load_config(None)
    sh = shape(DENSE)
    found = plan.measure(config, DENSE, sh, CPU, Assumptions(matmul=0.61), 4, 128, 400, True)
    whole = plan.run_pass(config, DENSE, CPU, Assumptions(matmul=0.61), 4, 4, 128, 400)
    for k, v in whole.peak.items():
        assert found.peak[k] == pytest.approx(v, rel=0.01), k
    for k, v in whole.seconds.items():
        assert found.seconds[k] == pytest.approx(v, rel=0.02), k


def test_rehearsal_of_the_cold_start_agrees_to_a_tenth():
    config = load_config(
        "demo", {"rollout.max_new_tokens": 52, "batch.tokens": 8192, "rollout.fp8": "none"}
    )
    assume = Assumptions(prompt_tokens=12)
    foretold = (
        plan.plan(config, replace(CPU, memory=64 * GiB), assume, search=False).phase("update").total
    )
    for k, v in rehearse(config, assume).items():
        assert foretold == pytest.approx(v, rel=0.1), k


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rehearsal_of_a_hundred_million_parameters_agrees_to_a_tenth(checkpointing, tmp_path):
    hf = Qwen3MoeConfig(
        num_hidden_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        vocab_size=16384,
        max_position_embeddings=2048,
        eos_token_id=15,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(hf)
    assert 90e6 < model.num_parameters() < 110e6
    model.save_pretrained(tmp_path / "model")
    config = load_config(
        "demo",
        {
            "model.path": str(tmp_path / "model"),
            "rollout.max_new_tokens": 244,
            "batch.tokens": 1024,
            "rollout.fp8": "none",
            "model.gradient_checkpointing": checkpointing,
        },
    )
    assume = Assumptions(prompt_tokens=12)
    foretold = (
        plan.plan(config, replace(CPU, memory=64 * GiB), assume, search=False).phase("update").total
    )
    for k, v in rehearse(config, assume).items():
        assert foretold == pytest.approx(v, rel=0.1), k


# ---------------------------------------------------------------------------------------------- sampling
@given(st.integers(1, 2000), st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_lengths_have_the_mean_that_was_asked_for(n, m):
    config = load_config(None, {"rollout.max_new_tokens": 4096})
    length = lengths(n, config, Assumptions(mean_length=m))
    assert length.min() >= 1 and length.max() <= 4096 and (np.diff(length) >= 0).all()
    if n > 500:
        assert length.mean() == pytest.approx(4096 * m, rel=0.03, abs=1)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(70, 2000),
    st.integers(1, 16),
)
@settings(max_examples=80, deadline=None)
def test_an_engine_finishes_within_its_cache(length, prompt, capacity, most):
    seen = []

    def step(b, tokens):
        seen.append(b)
        return float(b)  # a second for each response: total tokens, in the end

    length = np.array(length)
    out = decode(length, prompt, capacity, most, step, lambda tokens: 0.0)
    assert out.seconds == pytest.approx(length.sum()) and out.tokens == length.sum()
    assert out.cached <= capacity and max(seen) <= most and out.steps >= length.max()
    free = decode(length, prompt, 10**9, 10**6, lambda b, tokens: 1.0, lambda tokens: 0.0)
    assert free.steps == length.max() and free.evicted == 0
    assert math.isinf(
        decode(length, prompt, prompt + length.max() - 1, most, step, lambda tokens: 0.0).seconds
    )


# ---------------------------------------------------------------------------------------------- the plan
@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return saved(THIN, tmp_path_factory.mktemp("mixture"))


def small(path, **other):
    return load_config(
        None,
        {
            "model.path": path,
            "model.compute": "bfloat16",
            "model.gradient_checkpointing": True,
            "rollout.engine": "vllm",
            "rollout.max_new_tokens": 256,
            "batch.tokens": 2048,
            "steps": 8,
        }
        | other,
    )


def test_all_phases_add_up_and_say_so(mixture):
    found = plan.plan(small(mixture), Cluster.of("h100", 8))
    assert (
        isinstance(found, Plan)
        and found.fits
        and [p.name for p in found.phases] == ["rollout", "recompute", "update", "transfer"]
    )
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["seconds"] == pytest.approx(sum(p["time"] for p in numbers["phases"]))
    assert numbers["gpu hours a gradient step"] == pytest.approx(numbers["seconds"] * 8 / 3600)
    assert numbers["route bytes a token"] == 3 * 2
    text = found.report()
    for word in (
        "weights",
        "activations",
        "KV cache",
        "optimiser",
        "GPU hours",
        "largest micro-batch",
        "8 x h100",
    ):
        assert word in text, word


def test_routes_of_the_30b_model_are_384_bytes_a_token():
    sh = shape(model_config("Qwen/Qwen3-30B-A3B"))
    assert sh.moe_layers * sh.K * (1 if sh.E <= 256 else 2) == 384


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_the_largest_micro_batch_is_the_largest(mixture, offload):
    cluster = replace(Cluster.of("h100", 8), memory=6 * GiB)
    most = int(
        plan.plan(small(mixture, **{"parallel.offload": offload}), cluster).numbers[
            "largest micro-batch"
        ]
    )
    one_row = lambda n: small(
        mixture,
        **{"batch.tokens": n, "rollout.max_new_tokens": n - 200, "parallel.offload": offload},
    )
    at = lambda n: plan.plan(one_row(n), cluster, search=False).phase("update").total
    assert most > 4096 and at(most) <= cluster.memory < at(int(1.05 * most))


def test_what_does_not_fit_is_said_with_the_knob_that_helps(mixture):
    tight = replace(Cluster.of("h100", 8), memory=6 * GiB)
    found = plan.plan(small(mixture, **{"batch.tokens": 10**6}), tight, search=False)
    assert not found.fits and any(
        "activations" in w and "lower batch.tokens" in w for w in found.warnings
    )
    found = plan.plan(
        small(mixture, **{"batch.tokens": 2**18, "model.gradient_checkpointing": False}),
        tight,
        search=False,
    )
    assert any("gradient_checkpointing to True" in w for w in found.warnings)
    reserved = Assumptions().context + Assumptions().workspace
    config = small(mixture, **{"rollout.max_new_tokens": 4000})
    cache = plan.plan(config, replace(Cluster.of("h100", 8), memory=reserved + 2**21), search=False)
    assert not cache.fits and any(
        "room for" in w and "rollout.tensor_parallel" in w for w in cache.warnings
    )


def test_offload_moves_states_to_the_host(mixture):
    a, b = (
        plan.plan(small(mixture, **{"parallel.offload": o}), Cluster.of("h100", 8), search=False)
        for o in (False, True)
    )
    least = 8 * 16 * shape(THIN).parameters / 8
    assert (
        a.host["states"] == 0 and least <= b.host["states"] < 1.5 * least
    )  # with one temporary of AdamW for all parameters
    assert (
        b.phase("update").total < a.phase("update").total
        and "weights" not in b.phase("update").memory
    )


def test_larger_global_batches_and_shorter_responses_are_cheaper(mixture):
    cost = lambda m=0.4, **k: plan.plan(
        small(mixture, **k), Cluster.of("h100", 8), Assumptions(mean_length=m), search=False
    ).numbers["gpu hours a gradient step"]
    assert cost(**{"batch.updates": 8}) < cost()
    assert cost(0.1) < cost(0.4)


def test_a_lower_bound_never_refuses_what_the_plan_lets_pass(mixture):
    config = small(mixture)
    for memory in (0.01, 0.1, 1.0, 1.6, 3.0, 5.0, 6.0, 20.0):
        cluster = replace(Cluster.of("h100", 8), memory=memory * GiB)
        said = refuse(config, cluster)
        if said:
            assert not plan.plan(config, cluster, search=False).fits, (memory, said)
        else:
            assert memory > 1
    assert refuse(config, Cluster.of("h100", 8)) is None


def test_refusals_of_the_30b_model_are_one_sentence_with_the_largest_term():
    config = load_config(None, BIG)
    said = refuse(config, Cluster.of("a100-40", 8))
    assert (
        "optimiser states" in said
        and "parallel.offload" in said
        and "\n" not in said
        and said.count(". ") == 0
    )
    assert refuse(config, Cluster.of("h100", 64)) is None
    hours = load_config(
        None, BIG | {"model.gradient_checkpointing": False, "rollout.max_new_tokens": 40000}
    )
    assert "activations" in refuse(
        hours, Cluster.of("h100", 64)
    ) and "gradient_checkpointing" in refuse(hours, Cluster.of("h100", 64))
    offload = load_config(None, BIG | {"parallel.offload": True})
    assert "host memory" in refuse(offload, replace(Cluster.of("h100", 8), host=400 * GiB))


def test_bad_layouts_end_in_one_sentence(mixture):
    for over, word in (
        ({"parallel.expert": 3}, "parallel.expert is 3"),
        ({"parallel.shard": 3}, "parallel.shard is 3"),
        ({"rollout.tensor_parallel": 3}, "rollout.tensor_parallel is 3"),
        ({"parallel.expert": 8, "parallel.shard": 4}, "parallel.expert"),
    ):
        with pytest.raises(ValueError, match=word):
            plan.plan(small(mixture, **over), Cluster.of("h100", 8))
    with pytest.raises(ValueError, match="mean_length"):
        plan.plan(small(mixture), Cluster.of("h100", 8), Assumptions(mean_length=1.5))


def test_a_plan_leaves_no_processes_behind(mixture):
    import torch.distributed as dist

    plan.plan(small(mixture, **{"batch.tokens": 2000}), Cluster.of("h100", 4), search=False)
    assert not dist.is_initialized()
    with plan._processes(2):
        with pytest.raises(RuntimeError, match="before torch.distributed is started"):
            plan.plan(small(mixture), Cluster.of("h100", 8), search=False)
    assert not dist.is_initialized()


# ---------------------------------------------------------------------------------------------- the limits of the command
def within_limits(gpus, recipe="qwen3_30b_a3b"):
    """Processor seconds instead of seconds, because the test must not depend on what else the machine does; a plan is one thread's work."""
    code = (
        "import json, resource, sys, time\nfrom minirl_nb.cli import main\nt = time.perf_counter()\n"
        f"status = main(['plan', {recipe!r}, '--gpus', '{gpus}', '--gpu', 'h100', '--json'])\n"
        "u = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps({'status': status, 'cpu': u.ru_utime + u.ru_stime, 'wall': time.perf_counter() - t, "
        "'rss': u.ru_maxrss * 1024}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *text, last = done.stdout.strip().splitlines()
    used, found = json.loads(last), json.loads("\n".join(text))
    print({"gpus": gpus} | used)
    assert used["status"] == 0 and used["cpu"] <= 120 and used["rss"] <= 8e9, used
    return found


def test_the_papers_run_on_64_gpus_is_planned_in_time_and_fits():
    found = within_limits(64)
    assert found["fits"] and found["route bytes a token"] == 384 and found["responses"] == 1024
    assert found["phases"][2]["memory"]["weights"] == pytest.approx(
        4 * 30_532_122_624 / 64, rel=1e-3
    )
    assert found["phases"][2]["memory"]["optimiser"] == pytest.approx(
        8 * 30_532_122_624 / 64, rel=1e-3
    )
    assert found["phases"][3]["moved"]["weight sync"] == pytest.approx(
        2 * 30_532_122_624 * 63 / 64, rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [8, 16])
def test_the_papers_run_on_fewer_gpus_is_planned_in_time(gpus):
    found = within_limits(gpus)
    assert found["cluster"]["gpus"] == gpus


# ---------------------------------------------------------------------------------------------- the command
def test_the_command_prints_a_table_or_numbers(mixture, capsys):
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
        (["--gpus", "many"], "--gpus is many"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus"], "--gpus needs a value"),
        (["--gpus", "8", "--assume.mean_lenght", "0.3"], "did you mean 'mean_length'"),
        (["nothing"], "there is no recipe nothing"),
        (["demo", "--gpus", "6", "--parallel.shard", "4"], "does not divide the 6"),
        (["demo", "--model.path", "data/nothing"], "there is no folder"),
    ],
)
def test_mistakes_are_one_sentence_and_status_two(words, said, capsys):
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("minirl: ")


def test_a_run_that_cannot_fit_ends_before_weights_are_loaded(
    mixture, tmp_path, monkeypatch, capsys
):
    """The folder has a config and no weights: whoever looked for them would say so."""
    monkeypatch.setattr(
        Cluster, "here", classmethod(lambda cls: replace(Cluster.of("h100", 1), memory=2**20))
    )
    assert (
        main(
            [
                "train",
                "demo",
                "--model.path",
                mixture,
                "--output.folder",
                str(tmp_path / "run"),
                "--output.progress",
                "False",
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert "does not fit on 1 x h100" in err and "optimiser states" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_names_gpus_and_assumptions(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "h100" in text and "--assume.mean_length" in text
