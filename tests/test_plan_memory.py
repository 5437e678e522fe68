"""The plan's memory of each phase, and the largest micro-batch that fits."""

from dataclasses import replace

import pytest
from plan_models import THIN, small

from minirl_nb import plan
from minirl_nb.plan import Cluster, GiB, shape


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_the_largest_micro_batch_is_the_largest(mixture, offload):
    cluster = replace(Cluster.with_gpus("h100", 8), memory=6 * GiB)
    found = plan.plan(small(mixture, **{"parallel.offload": offload}), cluster)
    largest = int(found.numbers["largest micro-batch"])

    def needed(width):
        row = {"batch.tokens": width, "rollout.max_new_tokens": width - 200}
        config = small(mixture, **row, **{"parallel.offload": offload})
        return plan.plan(config, cluster, search=False).phase("update").total

    assert largest > 4096 and needed(largest) <= cluster.memory < needed(int(1.05 * largest))


def test_offload_moves_states_to_the_host(mixture):
    a, b = (
        plan.plan(
            small(mixture, **{"parallel.offload": o}), Cluster.with_gpus("h100", 8), search=False
        )
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
