"""Two processes against one: log-probabilities, gradients, recorded and replayed routes of a
sharded model.

Started by torchrun from test_sharded.py, as `sharded.py FOLDER CASE...`; rank 0 prints one line
of JSON for each case. A rank's rows are its share of uneven rows; the loss of a rank is
multiplied by the number of ranks, because FSDP2 averages gradients.
"""

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from minirl_nb.batch import Ragged
from minirl_nb.packed import pack_attention
from minirl_nb.policy import token_logprobs
from minirl_nb.routing import compare, record, replay


def rows(vocab=48, B=6, T=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens, length = (
        torch.randint(1, vocab, (B, T), generator=g),
        torch.tensor([12, 5, 9, 7, 4, 11]),
    )
    at = torch.arange(T)
    return tokens, length, (at >= 3) & (at < length[:, None])


def step(model, tokens, length, mask, weight, scale, routes=None, pieces=1, packed=False):
    """log-probabilities of these rows; gradients of -sum(weight * logp) * scale are left in the
    model. `pieces` accumulates.
    """
    out = []
    for at in torch.arange(len(tokens)).chunk(pieces):
        valid = torch.arange(tokens.shape[1]) < length[at, None]
        given = (
            None
            if routes is None
            else Ragged.pack(routes[at], length[at])
            if packed
            else routes[at]
        )
        with replay(model, given, valid) if routes is not None else torch.enable_grad():
            logp = token_logprobs(
                model, tokens[at], mask[at], length=length[at], chunk=5, packed=packed
            )[0]
            (-(logp * weight[at]).sum() * scale).backward()
        out.append(logp.detach())
    return torch.cat(out)


def gathered(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def cancellation(whole, tokens, length, mask, weight, routes=None):
    """By parameter, the norms of the single tokens' gradients added up: what a sum that cancels
    is rounded at. The norm of the sum may be much smaller.
    """
    total = {name: 0.0 for name, _ in whole.named_parameters()}
    for row, column in mask.nonzero().tolist():
        whole.zero_grad()
        alone = torch.zeros_like(mask)
        alone[row, column] = True
        step(whole, tokens, length, alone, weight, 1, routes)
        for name, p in whole.named_parameters():
            total[name] += float(p.grad.norm())
    return total


def difference(model, whole, scale):
    """Largest difference of a parameter's gradient over its `scale`, and whose; every rank takes
    part in the gathering.
    """
    worst = {}
    for (name, p), (other, q) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert name == other and p.grad is not None and p.grad.dtype == torch.float32, (
            f"{name} has no float32 gradient"
        )
        worst[name] = float((gathered(p.grad) - q.grad).norm()) / scale[name]
    name = max(worst, key=worst.get)
    return worst[name], name


def case(folder, tied="untied", ep="1", checkpointing="", precision=""):
    rank, world = dist.get_rank(), dist.get_world_size()
    path = f"{folder}/{tied}"
    config = DistributedConfig(
        fsdp_size=world, ep_size=int(ep), fsdp_mixed_precision="mixed" in precision
    )
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=config
    )
    if checkpointing == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    packed = "packed" in precision
    if packed:
        pack_attention(model)
    tokens, length, mask = rows()
    weight = torch.linspace(-1, 2, mask.numel()).view(mask.shape)
    mine = slice(rank, None, world)
    out = {"case": [tied, ep, checkpointing, precision]}
    # routes: the choice of the sharded model on this rank's rows against the whole model on all
    with torch.no_grad():
        with record(whole) as a:
            token_logprobs(whole, tokens, mask)
        with record(model) as b:
            token_logprobs(model, tokens[mine], mask[mine], length=length[mine], packed=packed)
    own, shared = a.pop(len(tokens)), b.pop(length=length[mine])
    at = torch.arange(tokens.shape[1]) < length[mine, None]
    out["flips"] = int(compare(Ragged.pack(own[mine], length[mine]), shared, at).per_token.sum())
    other = own.flip(0)  # routes of other tokens: replay has something to do
    for name, routes in (("live", None), ("replay", other)):
        for iteration in range(2):  # the second finds the state that the first left
            last = (
                iteration == 1 and name == "live"
            )  # and here, the last rank has nothing to learn from
            for m in (whole, model):
                m.zero_grad()
            keep = torch.ones(len(tokens), 1, dtype=torch.bool)
            if last:
                keep[world - 1 :: world] = False
            scale = cancellation(whole, tokens, length, mask & keep, weight, routes)
            whole.zero_grad()
            full = step(whole, tokens, length, mask & keep, weight, 1, routes)
            part = step(
                model,
                tokens[mine],
                length[mine],
                (mask & keep)[mine],
                weight[mine],
                world,
                None if routes is None else routes[mine],
                pieces=1 + iteration,
                packed=packed,
            )
            grad, where = difference(model, whole, scale)
            live = step(whole, tokens, length, mask & keep, weight, 1)
            out[f"{name} {iteration}"] = {
                "logp": float((part - full[mine]).abs().max()),
                "grad": grad,
                "where": where,
                "moved": float((full - live).abs().max()),
            }
    all_ = [None] * world
    dist.all_gather_object(all_, out)
    if rank == 0:
        print(json.dumps(all_), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for words in sys.argv[2:]:
        case(sys.argv[1], *words.split(","))
    dist.barrier()
    dist.destroy_process_group()
