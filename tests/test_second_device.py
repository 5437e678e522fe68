"""A run on a device that is not the processor: what has to be moved is moved. There is no card
here, so the device is one that only says where its tensors are (`second_device`)."""

import math

import pytest
import torch
from second_device import OnCard, second_device
from small_runs import metrics, small

from minirl_nb import train


def test_the_second_device_refuses_tensors_of_the_first():
    with second_device() as card:
        x = torch.ones(3, device=card)
        assert isinstance(x, OnCard) and x.device == card and x.is_cuda
        with pytest.raises(RuntimeError, match="same device: add"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        layer = torch.nn.Linear(3, 1).to(card)
        layer(x).sum().backward()
        assert layer.weight.grad.device == card
        assert torch.equal(layer.weight.grad.cpu(), torch.ones(1, 3))
    assert torch.ones(3).device.type == "cpu"


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.replay": "R3"},
        {"objective.replay": "R2", "batch.packed": True, "model.gradient_checkpointing": True},
    ],
    ids=["R3", "R2 packed checkpointing"],
)
def test_a_run_goes_and_goes_on_where_the_model_is_on_another_device(coldstart, tmp_path, changes):
    changes = changes | {"model.device": "cuda", "rollout.max_new_tokens": 6, "batch.updates": 1}
    changes |= {"evaluation.every": 0, "output.samples_every": 0, "batch.prompts": 2}
    with second_device():
        for steps in (1, 2):
            again = {"steps": steps, "resume": steps > 1}
            train.train(small(tmp_path / "run", coldstart, **changes | again))
    rows = [r for r in metrics(tmp_path / "run") if r["kind"] == "step"]
    assert [r["step"] for r in rows] == [1, 2]
    for key in ("k3", "entropy", "loss", "grad_norm", "discrepancy/flip"):
        assert all(math.isfinite(r[key]) for r in rows), key
    assert rows[0]["k3"] > 0  # the engine rounds to FP8
