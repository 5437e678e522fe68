"""Which modules choose experts, and what is said where none is found."""

import pytest
import torch
import transformers
from test_routing import drawn, qwen, tokens

from minirl_nb import routing
from minirl_nb.routing import record, replay, routers

B, T, K, E = 2, 9, 3, 8


def test_routers_are_named_in_layer_order_and_dense_layers_have_none():
    model = qwen(mlp_only_layers=[1])
    assert list(routers(model)) == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
    r = routers(model)["model.layers.2.mlp.gate"]
    assert (r.experts, r.top_k, r.module) == (E, K, model.model.layers[2].mlp.gate)
    with record(model) as routes, torch.no_grad():
        model(tokens())
    assert routes.pop(B).shape == (B, T, 2, K)


def test_a_model_without_routed_experts_is_refused():
    c = transformers.Qwen3Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=4,
        num_key_value_heads=2,
    )
    with pytest.raises(TypeError, match="Qwen3ForCausalLM has no router"):
        record(transformers.Qwen3ForCausalLM(c))


def test_experts_without_a_known_router_are_refused():
    class MysteryExperts(torch.nn.Module):
        pass

    model = qwen()
    model.model.layers[1].extra = torch.nn.ModuleDict({"experts": MysteryExperts()})
    with pytest.raises(
        TypeError,
        match=r"model.layers.1.extra.experts is a MysteryExperts.*no router of a known class",
    ):
        routers(model)


def test_an_unknown_router_can_be_given_an_adapter(monkeypatch):
    class OwnGate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.chosen = torch.nn.Linear(4, 6), None

        def forward(self, x):
            self.chosen = self.score(x).topk(2).indices
            return self.chosen

    model = torch.nn.Sequential(OwnGate())
    with pytest.raises(TypeError, match="has no router"):
        routers(model)
    monkeypatch.setitem(
        routing.ADAPTERS,
        "OwnGate",
        routing.Adapter(experts="score.out_features", top_k="score.missing"),
    )
    with pytest.raises(TypeError, match="OwnGate does not say its number of experts per token"):
        routers(model)
    model[0].two = 2
    monkeypatch.setitem(
        routing.ADAPTERS, "OwnGate", routing.Adapter(experts="score.out_features", top_k="two")
    )
    routes = drawn(shape=(1, 5), layers=1, k=2, experts=6)
    with replay(model, routes, torch.ones(1, 5, dtype=torch.bool)):
        model(torch.randn(5, 4))
    assert torch.equal(model[0].chosen, routes[0, :, 0].long())
