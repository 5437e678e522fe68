"""What the processes of a run agree on, and what one of them writes and reads."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import tiny_qwen3_moe
from transformers import AutoModelForCausalLM

from minirl_nb.config import OptimizerConfig, load_config
from minirl_nb.world import World, named_state, pretrained, read_shards, whole


def stepped(model, optimizer, steps, seed=0):
    "Some steps on made-up gradients."
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def assert_equal(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("size, each", [(1, 1), (3, 1), (8, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_shares_are_even_and_cover_everything_once(size, each, n):
    found = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        assert world.chief == (rank == 0)
        found.append(list(range(n))[world.share(n, each)])
    # neighbours who share an engine have the same
    assert all(found[r] == found[r - r % each] for r in range(size))
    parts = found[::each]
    assert sum(parts, []) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_goes_on_from_its_files_bit_for_bit(tmp_path):
    world, config = World(), OptimizerConfig(lr=1e-2)
    model = tiny_qwen3_moe()
    optimizer = world.optimizer(model, config)
    stepped(model, optimizer, 2)
    assert world.save(model, optimizer, tmp_path)(True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = world.optimizer(read, config)
    world.restore(read, again, tmp_path)
    for m, o in ((model, optimizer), (read, again)):
        stepped(m, o, 2, seed=1)
    assert_equal(read, model)


def test_shards_of_other_processes_are_read_by_one(tmp_path):
    "Weights, moments and the number of steps, under the names of the parameters."
    world, config = World(), OptimizerConfig(lr=1e-2)
    model = tiny_qwen3_moe()
    optimizer = world.optimizer(model, config)
    stepped(model, optimizer, 2)
    dcp.save(named_state(model, optimizer), checkpoint_id=str(tmp_path / "shards"), no_dist=True)
    other = tiny_qwen3_moe(seed=1)
    again = world.optimizer(other, config)
    stepped(other, again, 1)  # what is read replaces it
    read_shards(other, again, tmp_path / "shards")
    assert_equal(other, model)
    for m, o in ((model, optimizer), (other, again)):
        stepped(m, o, 2, seed=1)
    assert_equal(other, model)


def test_weights_have_the_type_that_layers_compute_in():
    world, model = World(), tiny_qwen3_moe()
    assert all(x.dtype == torch.float32 for _, x in world.weights(model))
    world.compute_dtype = torch.bfloat16
    given = dict(world.weights(model))
    assert given.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(given[name], p.detach().bfloat16()) and not given[name].requires_grad
    assert whole(p) is p


def test_the_gradient_is_cut_to_the_limit_and_its_norm_is_told():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert World().clip_gradient(model, 10.0) == 5 and model.weight.grad.tolist() == [[3, 4]]
    World().clip_gradient(model, 1.0)
    # clip_grad_norm_ adds 1e-6 to the norm; float32 has seven digits
    assert model.weight.grad.norm() == pytest.approx(1, abs=1e-6)


def test_a_model_has_the_type_of_its_config(moe_folder):
    for dtype in ("float32", "bfloat16"):
        config = load_config(None, {"model.dtype": dtype, "model.path": str(moe_folder)})
        assert pretrained(config, moe_folder).dtype == getattr(torch, dtype)
        assert World().load_model(config, moe_folder).dtype == getattr(torch, dtype)
