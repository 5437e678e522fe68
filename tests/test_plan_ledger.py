"""The ledger on fake tensors against the ledger on real ones."""

import pytest
import torch
import torch.distributed as dist
from plan_models import CPU, DENSE, MIXTURE, TIED, case_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from minirl_nb import policy
from minirl_nb.plan.cluster import Assumptions, Cluster
from minirl_nb.plan.ledger import Ledger
from minirl_nb.plan.step import MicroBatch, fake_processes, run_pass, watch_step

SMALL_TENSORS = 0.01


PARTS = ("forward", "head", "backward", "step")


def real_peaks(hf_config, checkpointing, micro):
    "The same step on real numbers."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
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
    watch_step(model, optimizer, ledger, micro)
    return ledger.peak


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hf_config", [MIXTURE, DENSE, TIED], ids=["mixture", "dense", "tied"])
def test_fake_tensors_take_what_real_ones_take(hf_config, checkpointing):
    case = case_of(hf_config, {"model.gradient_checkpointing": checkpointing})
    micro = MicroBatch(8, 96, 8 * 95)
    fake = run_pass(case, hf_config.num_hidden_layers, micro, accumulate=False)
    real = real_peaks(hf_config, checkpointing, micro)
    for part in PARTS:
        assert fake.peak[part] == pytest.approx(real[part], rel=SMALL_TENSORS), part


def test_gathered_and_scattered_bytes():
    "In a ring each rank sends all but one share of a whole tensor of 1,600 bytes, on one node."
    ledger = Ledger(Cluster.with_gpus("h100", 4), Assumptions())
    with fake_processes(4), ledger:
        part, all_of_it = torch.ones(100), torch.ones(400)
        dist.all_gather_into_tensor(torch.empty(400), part)
        dist.reduce_scatter_tensor(torch.empty(100), all_of_it)
    assert ledger.moved["before", "gather", False] == 1600 * 3 / 4
    assert ledger.moved["before", "scatter", False] == 1600 * 3 / 4


def test_kernels_that_touch_some_rows_cost_those_rows():
    "An embedding reads what it returns; adding two rows into a table moves two rows."
    ledger = Ledger(CPU, Assumptions(launch=0.0))
    table, rows = torch.zeros(10_000, 16), torch.ones(2, 16)
    at, second = torch.tensor([3, 7]), CPU.bandwidth * Assumptions().stream
    with ledger:
        ledger.begin("read")
        torch.nn.functional.embedding(at, table)
        ledger.begin("write")
        table.index_add_(0, at, rows)
    assert ledger.seconds["read", "stream"] == pytest.approx(2 * 2 * 16 * 4 / second)
    # the whole table is what the operation returns; its rows that are not named stay where they are
    assert ledger.seconds["write", "stream"] >= (2 * 16 * 4 + at.nbytes) / second


def test_products_of_experts_count_every_row_once():
    "10 rows of 8 numbers, each times one of 4 matrices 8 x 16: 2 x 10 x 8 x 16 operations."
    rows = torch.ones(10, 8, dtype=torch.bfloat16)
    experts = torch.ones(4, 8, 16, dtype=torch.bfloat16)
    ends = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
    ledger = Ledger(CPU, Assumptions())
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        torch._grouped_mm(rows, experts, ends)
    assert ledger.flops["before", "experts"] == 2 * 10 * 8 * 16


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_two_products_and_half_of_them_if_causal(causal):
    q = torch.ones(2, 3, 16, 8)
    ledger = Ledger(CPU, Assumptions())
    with ledger:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)
    full = 2 * 2 * (2 * 3 * 16 * 16 * 8)
    assert ledger.flops["before", "attention"] == (full / 2 if causal else full)
