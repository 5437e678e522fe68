"""Clusters and assumptions: names, this machine, refusals."""

import pytest
import torch

from minirl_nb.plan.cluster import GPUS, Assumptions, Cluster


def test_gpus_by_name_and_what_is_refused():
    c = Cluster.with_gpus("H100", 64)
    assert (c.gpu, c.nodes, c.gpus_per_node) == ("h100", 8, 8) and c.memory == GPUS["h100"].memory
    assert (
        Cluster.with_gpus("a100", 2).gpu == "a100-80"
        and Cluster.with_gpus("a100", 2).gpus_per_node == 2
    )
    assert all(g.fp8 >= g.bf16 > g.float32 and g.link >= g.network for g in GPUS.values())
    for words in (("h1000", 8), ("h100", 0)):
        with pytest.raises(ValueError, match="known are a100-40|must be positive"):
            Cluster.with_gpus(*words)


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


def test_assumptions_without_reserves_on_a_cpu():
    assert Assumptions().on(Cluster.here()).context in (0.0, Assumptions().context)
    with pytest.raises(ValueError, match="mean_length"):
        Assumptions(mean_length=1.5)
