"""`integrations.trl` against the real TRL: equal to this library's own loop, bit-equal to TRL's when
it only looks, and one sentence for what cannot be."""

import dataclasses
import types
import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install minirl_nb[trl]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

from datasets import Dataset
from small_runs import small
from test_readme import snippet
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_runs import PROMPTS, Plain, odd, trainer

from minirl_nb import objective, train
from minirl_nb.batch import Ragged, Rollout
from minirl_nb.integrations import trl as module
from minirl_nb.integrations import trl_checks
from minirl_nb.integrations.trl import MiniRL
from minirl_nb.integrations.trl_checks import check_version, problem, routes_problem
from minirl_nb.rollout import Sampling, TorchEngine

FP8 = partial(TorchEngine, fp8="fp8_per_channel", routes=True)
TWO_STEPS = dict(gradient_accumulation_steps=2, steps_per_generation=4)  # N = 2 mini-batches of 16


def done(folder, tmp_path, options=None, **changes):
    t = trainer(folder, tmp_path / "trl", options=options, **changes)
    t.train()
    return t


def logs(t):
    return [row for row in t.state.log_history if "loss" in row]


# ------------------------------------------------------------------------------- our own loop
def as_rollout(inputs):
    "TRL's micro-batches of a generation as this library's rollout, with the routes if it has any."
    rows = []
    for x in inputs:
        for b in range(len(x["prompt_ids"])):
            prompt = x["prompt_ids"][b][x["prompt_mask"][b].bool()]
            kept = x["completion_mask"][b].bool()
            row = dict(prompt=len(prompt), tokens=torch.cat([prompt, x["completion_ids"][b][kept]]))
            row |= dict(mu=x["logp_mu"][b][kept], advantage=x["advantages"][b])
            if "replayed_experts" in x:
                attended = torch.cat([x["prompt_mask"][b], x["completion_mask"][b]]).bool()
                row |= dict(
                    routes=x["replayed_experts"][b][attended],
                    valid=x["replayed_valid"][b][attended],
                )
            rows.append(row)
    length = torch.tensor([len(r["tokens"]) for r in rows])
    T = int(length.max())

    def table(values, dtype):
        out = torch.zeros(len(rows), T, dtype=dtype)
        for row, x in zip(out, values):
            row[: len(x)] = x
        return out

    mu = [torch.cat([torch.zeros(r["prompt"]), r["mu"]]) for r in rows]
    rollout = Rollout(
        tokens=table([r["tokens"] for r in rows], torch.int64),
        prompt_length=torch.tensor([r["prompt"] for r in rows]),
        length=length,
        logp_mu=table(mu, torch.float32),
        group=torch.arange(len(rows)),
    )
    if "routes" in rows[0]:
        rollout.routes = Ragged(torch.cat([r["routes"] for r in rows]), length)
        rollout.routes_valid = table([r["valid"] for r in rows], torch.bool)
    return rollout, torch.stack([r["advantage"] for r in rows])


def off(ours, theirs):
    "Relative distance of two gradients."
    names = theirs.keys()
    square = sum((ours[n] - theirs[n]).double().square().sum() for n in names)
    return float((square / sum(theirs[n].double().square().sum() for n in names)).sqrt())


def own_steps(run, watched, accumulate, steps):
    """Losses, gradients and distances of pi_old's log-probabilities from `train`'s own functions,
    for the gradient steps of one generation; `watched` are its micro-batches in TRL."""
    parts = [watched[i : i + accumulate] for i in range(0, len(watched), accumulate)]
    first = parts[:steps]
    rollout, advantage = as_rollout([m["inputs"] for part in first for m in part])
    sizes = [sum(len(m["inputs"]["prompt_ids"]) for m in part) for part in first]
    minibatches = list(torch.arange(len(rollout)).split(sizes))
    step = train.Step(
        rollout, advantage, [], {}, {}, minibatches, rollout.routes, rollout.routes_valid
    )
    run.model.load_state_dict(watched[0]["weights"])
    train.recompute(run, step, torch.arange(len(rollout)))
    for i, part in enumerate(parts):
        run.model.load_state_dict(part[0]["weights"])
        run.model.zero_grad()
        rows = minibatches[i % steps]
        loss, logp = train._accumulate(run, step, rows[advantage[rows] != 0], len(rows))
        gradients = {n: p.grad for n, p in run.model.named_parameters()}
        yield loss, gradients, step, part


CASES = {
    "R3, FP8 engine": dict(replay="R3", engine=FP8),
    "R3, FP8 engine, checkpoints, two iterations": dict(
        replay="R3", engine=FP8, gradient_checkpointing=True, num_iterations=2, max_steps=4
    ),
    "R3, TRL's generation, checkpoints": dict(replay="R3", gradient_checkpointing=True),
    "R2, checkpoints, two iterations": dict(
        replay="R2", gradient_checkpointing=True, num_iterations=2, max_steps=4
    ),
    "no replay, FP8 engine": dict(replay="none", engine=FP8),
}


@pytest.mark.parametrize("case", CASES)
def test_trl_makes_the_loss_gradient_and_routes_of_the_own_loop(case, moe_folder, tmp_path):
    changes = dict(CASES[case])
    options = dict(objective=objective.MINIRL, replay=changes.pop("replay"))
    options |= {"engine": changes.pop("engine")} if "engine" in changes else {}
    t = done(moe_folder, tmp_path, options, temperature=0.8, **TWO_STEPS | changes)
    assert_own_loop(t, t.seen, moe_folder, tmp_path / "own")


def assert_own_loop(t, seen, model_folder, folder):
    "The micro-batches `seen` of one generation, used for two gradient steps, against `train`."
    mode = t.replay_mode
    own = small(
        folder,
        model_folder,
        **{
            "objective.replay": mode,
            "model.gradient_checkpointing": t.args.gradient_checkpointing,
            "rollout.temperature": t.temperature,
            "output.monitor": 0,
        },
    )
    padded = [m["inputs"]["prompt_mask"] for m in seen]
    assert any((~mask.bool()).any() for mask in padded), "no prompt is padded: nothing is tested"
    run = train.Run(own)
    compared = list(own_steps(run, seen, 2, steps=2))
    assert len(compared) == len(seen) // 2 >= 2
    moved = 0.0
    for loss, gradients, _, part in compared:
        theirs = sum(float(m["loss"]) for m in part)
        assert loss == pytest.approx(theirs, abs=2e-5)
        assert off(gradients, part[-1]["gradients"]) < 2e-5
        for m in part:
            if mode != "none":
                x = m["inputs"]
                attended = torch.cat([x["prompt_mask"], x["completion_mask"]], 1).bool()
                valid = x["replayed_valid"] & attended
                assert torch.equal(m["routes"][valid], x["replayed_experts"][valid])
            of_old = m["inputs"]["old_per_token_logps"]
            moved = max(moved, float((m["logp"] - of_old).abs().max()))
    assert moved > 1e-2, "the weights did not move: one step is not told from the next"
    step = compared[0][2]  # pi_old's numbers and, for R2, its routes
    ours = step.logp_old[step.rollout.response_mask]
    both = [m["inputs"] for part in compared[:2] for m in part[3]]
    theirs = torch.cat(
        [
            x["old_per_token_logps"][b][x["completion_mask"][b].bool()]
            for x in both
            for b in range(len(x["prompt_ids"]))
        ]
    )
    assert (ours - theirs).abs().max() < 2e-5
    if mode == "R2":
        recorded, _ = as_rollout(both)
        assert torch.equal(step.rollout.routes.values, recorded.routes.values)


def test_the_comparison_tells_other_routes(moe_folder, tmp_path):
    "With live routing in place of the engine's, and with routes one token late, the gradient is off."
    options = dict(objective=objective.MINIRL, replay="R3", engine=FP8)
    t = done(moe_folder, tmp_path, options, **TWO_STEPS)
    for fault in ("none", "late"):
        run = train.Run(
            small(
                tmp_path / fault,
                moe_folder,
                **{"objective.replay": "none" if fault == "none" else "R3", "output.monitor": 0},
            )
        )
        if fault == "late":
            for m in t.seen:
                x = m["inputs"]
                x["replayed_experts"] = x["replayed_experts"].roll(1, 1)
                x["replayed_valid"] = x["replayed_valid"] & x["replayed_valid"].roll(1, 1)
        worst = max(off(g, part[-1]["gradients"]) for _, g, _, part in own_steps(run, t.seen, 2, 2))
        assert worst > 1e-2, fault


# -------------------------------------------------------------------------- TRL's own numbers
ALONE = pytest.param(1, marks=pytest.mark.any_kernels("bits of one process; 2 is run with others"))


@pytest.mark.parametrize("accumulate", [ALONE, 2])
def test_without_replay_trl_keeps_every_bit(accumulate, moe_folder, tmp_path):
    settings = dict(gradient_accumulation_steps=accumulate, steps_per_generation=4, max_steps=4)
    settings |= dict(gradient_checkpointing=True, router_aux_loss_coef=None, beta=0.04)
    results = {}
    for name, kind, options in (
        ("TRL", GRPOTrainer, {}),
        ("off", Plain, dict(measure=False)),
        ("looks", Plain, dict(monitor=3)),
    ):
        t = trainer(moe_folder, tmp_path / name, kind, options, **settings)
        t.train()
        kept = [
            {k: v for k, v in r.items() if "minirl" not in k and "time" not in k} for r in logs(t)
        ]
        results[name] = kept, t.model.state_dict(), logs(t)
    for name in ("off", "looks"):
        assert results[name][0] == results["TRL"][0]
        for key, value in results["TRL"][1].items():
            assert torch.equal(value, results[name][1][key]), key
    assert not any("minirl" in key for row in results["off"][2] for key in row)
    found = results["looks"][2][-1]
    assert found["minirl/staleness/k3"] > 0 and found["minirl/discrepancy/k3"] < 1e-10
    assert "minirl/staleness/flip" in {key for row in results["looks"][2] for key in row}


def test_the_objective_grpo_trains_as_trls_loss_does(moe_folder, tmp_path):
    "TRL's loss takes min(r A, clip(r) A), the objective masks: one gradient."
    settings = dict(num_iterations=2, max_steps=4, epsilon=0.2, epsilon_high=0.27, loss_type="grpo")
    settings |= dict(scale_rewards="group", learning_rate=3e-2) | TWO_STEPS
    theirs = trainer(moe_folder, tmp_path / "theirs", GRPOTrainer, **settings)
    theirs.train()
    ours = trainer(moe_folder, tmp_path / "ours", Plain, dict(objective=objective.GRPO), **settings)
    ours.train()
    clipped = max(r["minirl/clip_high"] + r["minirl/clip_low"] for r in logs(ours))
    assert clipped > 0, "nothing was clipped: the test compares less than it says"
    # Adam's first steps are signs: what matters is that no parameter took another way
    apart = max(
        float((a - b).abs().max())
        for a, b in zip(theirs.model.state_dict().values(), ours.model.state_dict().values())
    )
    assert apart < 3e-4


@pytest.mark.parametrize("preset", ["cispo", "minirl_length_norm", "vespo"])
def test_any_objective_over_micro_batches_is_that_of_the_mini_batch(preset, moe_folder, tmp_path):
    chosen = objective.PRESETS[preset]
    scale = "group" if chosen.advantage == "mean_std" else "none"
    t = done(
        moe_folder,
        tmp_path,
        dict(objective=chosen),
        scale_rewards=scale,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    assert len(t.seen) == 2
    batch = {}
    for name in ("logp_mu", "completion_mask", "advantages"):
        batch[name] = torch.cat([m["inputs"][name] for m in t.seen])
    logp = torch.cat([m["logp"] for m in t.seen])
    whole = chosen.loss(
        logp=logp,
        logp_old=logp,
        logp_mu=batch["logp_mu"],
        advantage=batch["advantages"],
        response_mask=batch["completion_mask"].bool(),
    )
    assert float(whole) == pytest.approx(sum(float(m["loss"]) for m in t.seen), abs=1e-6)
    row = logs(t)[-1]
    assert row["loss"] == pytest.approx(float(whole), abs=1e-6)


# ------------------------------------------------------------------------- sources of routes
def test_a_reference_model_is_never_replayed(moe_folder, tmp_path):
    t = done(moe_folder, tmp_path, dict(replay="R3", engine=FP8), beta=0.1, **TWO_STEPS)
    x = t.seen[0]["inputs"]
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    mask = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    with torch.no_grad():
        live, _, _ = t._get_per_token_logps_and_entropies(
            t.ref_model, ids, mask, x["completion_ids"].shape[1]
        )
    kept = x["completion_mask"].bool()
    assert torch.allclose(x["ref_per_token_logps"][kept], live[kept], atol=1e-5)
    # pi_old has the reference's weights here, and is replayed: another function
    assert (x["old_per_token_logps"] - live)[kept].abs().max() > 1e-2


def sampled_by_the_user(prompts, trainer):
    "A rollout_func that returns routes, as an engine of the user's would."
    ids = trainer.processing_class(prompts)["input_ids"]
    if not hasattr(trainer, "own_engine"):
        with module._own_forward(trainer.model) as model:
            trainer.own_engine = FP8(model)
    r = trainer.own_engine.generate(ids, Sampling(1, 1.0, 9, seed=3))
    rows = [slice(a, b) for a, b in zip(r.prompt_length.tolist(), r.length.tolist())]
    return dict(
        prompt_ids=ids,
        completion_ids=[x[at].tolist() for x, at in zip(r.tokens, rows)],
        logprobs=[x[at].tolist() for x, at in zip(r.logp_mu, rows)],
        routed_experts=[x[: n - 1].numpy() for x, n in zip(r.routes, r.length.tolist())],
    )


def test_a_rollout_func_may_return_routes(moe_folder, tmp_path):
    options = dict(replay="R3", objective=objective.MINIRL, rollout_func=sampled_by_the_user)
    t = done(moe_folder, tmp_path, options, **TWO_STEPS)
    for m in t.seen:
        x = m["inputs"]
        assert x["replayed_valid"].sum(1).tolist() == [
            int(a + b) - 1 for a, b in zip(x["prompt_mask"].sum(1), x["completion_mask"].sum(1))
        ]
        valid = x["replayed_valid"]
        assert torch.equal(m["routes"][valid], x["replayed_experts"][valid])
    assert logs(t)[0]["minirl/discrepancy/k3"] > 1e-6  # FP8


@pytest.mark.any_kernels("routes written by hand")
@pytest.mark.parametrize("fault", ["zeros", "one row for all", "an expert too many"])
def test_wrong_routes_of_a_rollout_func_do_not_run(fault, moe_folder, tmp_path):
    "NeMo-RL #3327: a path that replayed what nobody had recorded. 96 tokens: enough to see a repeat."
    prompts = [[5, 6, 7], [8, 9]]
    completions = [[3 + (i * i) % 11 for i in range(96 - len(p))] for p in prompts]
    g = torch.Generator().manual_seed(0)
    right = [torch.rand(95, 2, 8, generator=g).topk(2).indices for _ in prompts]
    wrong = [x.clone() for x in right]
    if fault == "zeros":
        wrong[1][:] = 0
    elif fault == "one row for all":
        wrong[1][:] = wrong[1][0]
    else:
        wrong[1][40, 1, 0] = 8

    def answer(routes):
        kept = dict(prompt_ids=prompts, completion_ids=completions, routed_experts=routes)
        options = dict(replay="R3", objective=objective.MINIRL, rollout_func=lambda *given: kept)
        t = trainer(moe_folder, tmp_path / "trl", options=options)
        t.rollout_func(["a", "b"], t)
        return t._sampled

    sampled = answer(right)
    assert torch.equal(sampled.routes[1], right[1].to(torch.uint8)) and sampled.logp is None
    with pytest.raises(ValueError, match=r"routes\["):
        answer(wrong)


def test_truncated_completions_are_masked(moe_folder, tmp_path):
    options = dict(replay="R3", objective=objective.MINIRL)
    t = done(
        moe_folder,
        tmp_path,
        options,
        mask_truncated_completions=True,
        max_steps=1,
        max_completion_length=12,
    )
    (m,) = t.seen
    masked = m["inputs"]["completion_mask"].sum(1) == 0
    assert 0 < masked.sum() < len(masked), "all or none are cut: another length is needed"
    x = m["inputs"]
    expected = objective.MINIRL.loss(
        logp=m["logp"],
        logp_old=m["logp"],
        logp_mu=x["logp_mu"],
        advantage=x["advantages"],
        response_mask=x["completion_mask"].bool(),
    )
    assert float(m["loss"]) == float(expected)


@pytest.mark.any_kernels("what is absent, and a zero")
def test_the_old_numbers_are_missing_where_trl_saves_them(moe_folder, tmp_path):
    "One gradient step a generation: pi_old is pi, R2 has nothing to replay, auto takes none."
    t = done(moe_folder, tmp_path, dict(replay="R2", objective=objective.MINIRL), max_steps=1)
    assert "old_per_token_logps" not in t.seen[0]["inputs"]
    assert "replayed_experts" not in t.seen[0]["inputs"]
    assert logs(t)[0]["minirl/staleness/k3"] == 0
    for accumulation, mode in ((4, "none"), (2, "R2"), (1, "R3")):
        t = trainer(
            moe_folder,
            tmp_path / mode,
            options=dict(replay="auto"),
            gradient_accumulation_steps=accumulation,
            steps_per_generation=4,
        )
        assert t.replay_mode == mode


def test_an_engine_gets_new_weights_and_evaluation_works(moe_folder, tmp_path):
    options = dict(replay="R3", objective=objective.MINIRL, engine=FP8, monitor=2)
    t = trainer(moe_folder, tmp_path / "trl", options=options, max_steps=2)
    t.eval_dataset = t.train_dataset.select(range(2))
    t.train()
    result = t.evaluate()
    assert "eval_loss" in result and not any("minirl" in key for key in result)
    first, last = (m["inputs"] for m in t.seen[:2])
    kept = last["completion_mask"].bool()
    assert t._loaded == 2
    # a rollout engine with old weights would be off by far more than FP8 is
    assert (last["logp_mu"] - t.seen[1]["logp"])[kept].abs().mean() < 0.1
    assert logs(t)[0]["minirl/discrepancy/flip"] >= 0


def test_the_warning_of_the_meter_is_said_once(moe_folder, tmp_path):
    t = trainer(
        moe_folder,
        tmp_path / "trl",
        Plain,
        dict(objective=objective.MINIRL),
        learning_rate=0.3,
        num_iterations=3,
        max_steps=6,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.train()
    said = [str(w.message) for w in said if "shift between rollout and training" in str(w.message)]
    assert len(said) == 1 and "beyond 0.5" in said[0]
    assert max(r["minirl/validity/local_shift"] for r in logs(t)) > 0.5


@pytest.mark.any_kernels("the names of a program")
def test_the_drop_in_of_the_front_page_runs(moe_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = snippet(1)
    short = (
        'GRPOConfig("runs/trl", max_steps=1, max_completion_length=8, use_cpu=True, bf16=False, '
    )
    given = code.replace('GRPOConfig("runs/trl", ', short)
    assert given != code
    model = AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32)
    names = dict(model=model, reward=odd, data=Dataset.from_dict({"prompt": PROMPTS}))
    exec(compile(given, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 1
    assert names["trainer"].replay_mode == "R3"


# -------------------------------------------------------------------------------- one sentence
REFUSED = {
    "router_aux_loss_coef = 0": dict(objective=objective.MINIRL, router_aux_loss_coef=None),
    "set scale_rewards = 'none'": dict(objective=objective.MINIRL, scale_rewards="group"),
    "set scale_rewards = 'group'": dict(objective=objective.GRPO),
    "set beta = 0": dict(objective=objective.MINIRL, beta=0.1),
    "set top_entropy_quantile = 1": dict(objective=objective.MINIRL, top_entropy_quantile=0.2),
    "set top_p = 1": dict(top_p=0.9),
    "set top_k = 0": dict(top_k=5),
    "advantage 'none' is not had": dict(
        objective=dataclasses.replace(objective.MINIRL, advantage="none")
    ),
    "replay mode 'R4' must be one of": dict(replay="R4"),
}


@pytest.mark.any_kernels("messages")
@pytest.mark.parametrize("sentence", REFUSED)
def test_settings_that_contradict_are_refused_in_a_sentence(sentence, moe_folder, tmp_path):
    changes = dict(REFUSED[sentence])
    options = {k: changes.pop(k) for k in ("objective", "replay") if k in changes}
    with pytest.raises(ValueError) as error:
        trainer(moe_folder, tmp_path, Plain, options, **changes)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_routes_that_nobody_gives_are_refused():
    args = types.SimpleNamespace(beta=0.1, vllm_mode="server", vllm_tensor_parallel_size=1)
    t = types.SimpleNamespace(
        args=args,
        model=types.SimpleNamespace(),
        use_vllm=True,
        tools=[],
        use_transformers_continuous_batching=False,
        environment_factories=None,
    )
    assert "client of a vLLM server drops" in routes_problem(t, "R3", False)
    args.vllm_mode, args.vllm_tensor_parallel_size = "colocate", 2
    assert "vllm_tensor_parallel_size = 1" in routes_problem(t, "R3", False)
    args.vllm_tensor_parallel_size = 1  # one process, one vLLM: its routes can be listened to
    assert routes_problem(t, "R3", False) is None
    assert routes_problem(t, "R3", True) is None
    assert routes_problem(t, "R2", False) is None
    t.model.peft_config = {}
    assert "reference" in routes_problem(t, "R2", False)
    t.use_vllm, args.beta, t.use_transformers_continuous_batching = False, 0.0, True
    assert "continuous batching" in routes_problem(t, "R3", False)
    t.use_transformers_continuous_batching, t.tools = False, [len]
    assert "turn by turn" in routes_problem(t, "R3", False)


def test_an_unknown_trl_is_warned_of_or_refused(monkeypatch):
    assert problem(GRPOTrainer) is None
    monkeypatch.setattr(trl_checks, "version", lambda name: "1.17.2")
    with pytest.warns(UserWarning, match="TRL 1.17.2 was not tested with MiniRL"):
        check_version(GRPOTrainer)

    class Older(GRPOTrainer):
        def _generate_single_turn(self, prompts):
            return prompts

    with pytest.raises(TypeError, match="Older._generate_single_turn takes no prompt_ids"):
        check_version(Older)
    with pytest.raises(TypeError, match="object has no _generate_single_turn"):
        check_version(object)

    class Trainer(MiniRL, Older):
        pass

    with pytest.raises(TypeError, match="Older._generate_single_turn takes no prompt_ids"):
        Trainer(args=GRPOConfig("x", use_cpu=True, bf16=False))
