"""What a plan reads off a model: configs without the hub, counts, where layers repeat."""

import os

import pytest
from plan_models import DENSE, MIXTURE
from transformers import AutoConfig, Qwen3MoeConfig

from minirl_nb.config import load_config, recipes
from minirl_nb.plan.case import PUBLISHED, model_config, shape
from minirl_nb.plan.step import depths


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
    for name in recipes():
        path = load_config(name).model.path
        assert path in PUBLISHED or path.startswith(("data/", "../data/", "models/")), (
            name
        )  # made, not published


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


def test_routes_of_the_30b_model_are_384_bytes_a_token():
    assert shape(model_config("Qwen/Qwen3-30B-A3B")).route_bytes == 384
