"""`integrations.verl`: the loss with the arguments that verl documents, and inside verl's own
registry and helpers where verl can be imported (`make verl`)."""

from types import SimpleNamespace

import pytest
import torch
from random_batches import make

from minirl_nb.integrations.verl import AGGREGATION, policy_loss, rollout_metrics
from minirl_nb.objective import MINIRL, PRESETS
from minirl_nb.weights import diagnostics


def arguments(batch, rows=slice(None), **info):
    "A batch as verl hands it to a policy loss."
    mask = batch.response_mask[rows]
    return dict(
        old_log_prob=batch.logp_old[rows],
        log_prob=batch.logp[rows],
        advantages=(batch.advantage[:, None] * batch.response_mask)[rows],
        response_mask=mask,
        config=SimpleNamespace(global_batch_info=info),
        rollout_is_weights=(batch.logp_old - batch.logp_mu).exp()[rows] * mask,
    )


@pytest.mark.parametrize(
    "preset", ["minirl", "minirl_length_norm", "minirl_no_is", "cispo", "grpo"]
)
def test_parts_on_two_ranks_add_up_to_the_objective(preset):
    chosen, batch = PRESETS[preset], make(seed=3, B=8, T=9, shift=1.0)
    batch.logp.requires_grad_()
    loss, mode = policy_loss(chosen), AGGREGATION[chosen.normalizer]
    info = dict(dp_size=2, global_batch_size=8, batch_num_tokens=int(batch.response_mask.sum()))
    parts = [
        loss(**arguments(batch, slice(i, i + 2), **info), loss_agg_mode=mode)[0]
        for i in range(0, 8, 2)
    ]
    (ours,) = torch.autograd.grad(sum(parts) / 2, batch.logp)  # verl averages over ranks
    (whole,) = torch.autograd.grad(chosen.loss(**batch.named()), batch.logp)
    assert torch.allclose(ours, whole, rtol=1e-10, atol=1e-14)
    assert whole.abs().max() > 0


def test_statistics_of_equal_parts_average_to_the_whole():
    batch = make(seed=5, B=4, T=6)
    batch.response_mask[:] = True
    mode = "seq-mean-token-sum"
    loss = policy_loss(MINIRL)
    parts = [loss(**arguments(batch, slice(i, i + 2)), loss_agg_mode=mode)[1] for i in (0, 2)]
    _, whole = loss(**arguments(batch), loss_agg_mode=mode)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) / 2 == pytest.approx(value, abs=1e-12), name


def test_one_sentence_for_what_does_not_fit():
    batch, loss = make(seed=1), policy_loss(MINIRL)
    with pytest.raises(ValueError, match="loss_agg_mode=seq-mean-token-sum"):
        loss(**arguments(batch))
    mode = dict(loss_agg_mode="seq-mean-token-sum")
    with pytest.raises(ValueError, match="rollout_correction.rollout_is=token"):
        loss(**arguments(batch) | mode | dict(rollout_is_weights=None))
    given = arguments(batch) | mode
    given["rollout_is_weights"] = torch.zeros_like(batch.logp)
    with pytest.raises(ValueError, match="rollout_is_threshold one large number"):
        loss(**given)
    given = arguments(batch) | mode
    given["advantages"] = torch.arange(batch.logp.numel()).view_as(batch.logp) * batch.response_mask
    if batch.response_mask.sum(1).max() > 1:
        with pytest.raises(ValueError, match="different advantages"):
            loss(**given)


def test_metrics_before_the_updates():
    batch = make(seed=2)
    found = rollout_metrics(
        old_log_probs=batch.logp_old,
        rollout_log_probs=batch.logp_mu,
        response_mask=batch.response_mask,
    )
    expected = diagnostics(**batch.policies(logp=batch.logp_old))
    assert found["rollout_corr/minirl/discrepancy/k3"] == expected["discrepancy/k3"]
    assert "rollout_corr/minirl/validity/local_shift" in found


# ------------------------------------------------------------------------------ the real verl
@pytest.fixture(scope="module")
def core():
    return pytest.importorskip(
        "verl.trainer.ppo.core_algos",
        reason="verl cannot be imported: make verl",
        exc_type=ImportError,
    )


def test_verl_finds_the_loss_and_its_own_helper_feeds_it(core):
    import importlib

    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    importlib.import_module("minirl_nb.integrations.verl")
    loss = core.get_policy_loss_fn("minirl")
    batch = make(seed=4, B=6, T=8, shift=1.0)
    mask = batch.response_mask
    weights, _ = compute_rollout_correction_weights(
        (batch.logp_old - batch.logp_mu) * mask, mask, rollout_is="token", rollout_is_threshold=1e9
    )
    given = arguments(batch) | dict(rollout_is_weights=weights)
    value, metrics = loss(**given, loss_agg_mode="seq-mean-token-sum")
    assert float(value) == pytest.approx(float(MINIRL.loss(**batch.named())), rel=1e-6)
    assert {"actor/minirl/discrepancy/k3", "actor/minirl/clip_high"} <= metrics.keys()


def test_verls_presets_are_not_eq_7(core):
    "Its own vanilla loss, decoupled and bypassed, on a batch that truncates and clips."
    batch = make(seed=4, B=6, T=8, shift=1.0)
    batch.logp.requires_grad_()
    (eq7,) = torch.autograd.grad(MINIRL.loss(**batch.named()), batch.logp)

    class Config(SimpleNamespace):
        def get(self, name, default):
            return getattr(self, name, default)

    config = Config(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.27,
        clip_ratio_c=1e9,
        global_batch_info=dict(global_batch_size=6, dp_size=1),
    )
    given = arguments(batch) | dict(config=config, loss_agg_mode="seq-mean-token-sum")
    decoupled = given | dict(rollout_is_weights=given["rollout_is_weights"].clamp(max=5.0))
    bypass = given | dict(old_log_prob=batch.logp_mu, rollout_is_weights=None)
    for preset in (decoupled, bypass):
        value, _ = core.compute_policy_loss_vanilla(**preset)
        (theirs,) = torch.autograd.grad(value, batch.logp)
        assert (theirs - eq7).norm() / eq7.norm() > 0.1
