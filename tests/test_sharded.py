"""Sharded parameters: real processes over gloo, held against one process with the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ended, join_ranks, spawn

SHAPES = [(12, 7), (5,), (8, 3, 3, 3), (7, 16), (12, 7), (4, 6, 5)]


def _every_rule(rank: int, world: int, port: int, out: str) -> None:
    """The largest difference between sharded and whole parameters after four updates, of each rule."""
    join_ranks(rank, world, port)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    from thalweg.optim import face_of
    from thalweg.rules import RULES

    mesh = init_device_mesh("cpu", (world,))
    placements = [[Shard(0)], [Replicate()], [Shard(0)], [Shard(1)], [Shard(0)], [Shard(0)]]
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES] for _ in range(4)]
    found = {}
    for name in RULES:
        if "curvature" in RULES[name].needs:  # a second gradient, which its own test gives
            continue
        ours = [nn.Parameter(p.clone()) for p in starts]
        theirs = [nn.Parameter(distribute_tensor(p.clone(), mesh, place)) for p, place in zip(starts, placements)]
        options = {"lr": 0.01, "weight_decay": 0.1, "clip": 1.0, "average": 0.9, "skip_nonfinite": True}
        one, many = face_of(name)(ours, **options), face_of(name)(theirs, **options)
        for t, gs in enumerate(gradients):
            for p, q, g, place in zip(ours, theirs, gs, placements):
                p.grad = g.clone()
                q.grad = distribute_tensor(g.clone(), mesh, place)
            if t == 2:  # one rank's shard overflows: all ranks skip
                ours[0].grad[0, 0] = torch.inf
                q = theirs[0]
                if rank == 0:
                    q.grad.to_local()[0, 0] = torch.inf
            one.step()
            many.step()
        gaps = [(p - q.full_tensor()).abs().max() for p, q in zip(ours, theirs)]
        gaps += [
            (one.state[p]["average"] - many.state[q]["average"].full_tensor()).abs().max() for p, q in zip(ours, theirs)
        ]
        found[name] = float(torch.stack(gaps).max().detach())
    if rank == 0:
        torch.save(found, out)
    ended()


@pytest.mark.parametrize("world", [3])
def test_every_rule_gives_the_unsharded_result(world: int, tmp_path: Path) -> None:
    spawn(_every_rule, world, str(tmp_path / "found"))
    found = torch.load(tmp_path / "found")
    assert len(found) > 30
    assert {name: gap for name, gap in found.items() if not gap <= 1e-6} == {}


def _fsdp(rank: int, world: int, port: int, out: str) -> None:
    """FSDP2 with Muon, AdamW and 8-bit-free slots, trained, saved through torch's own gathering, and gone on with."""
    join_ranks(rank, world, port)
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    import thalweg

    def build(shard: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        if shard:
            fully_shard(model)
        return model, thalweg.optim.Muon(model.parameters(), lr=0.02, weight_decay=0.1, clip=0.5, precision="fp32")

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, share: bool) -> None:
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            x = torch.randn(8, 6, generator=draw, dtype=torch.float64)
            x = x.chunk(world)[rank] if share else x
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    single = build(shard=False)
    train(*single, range(6), share=False)
    model, optimizer = build(shard=True)
    train(model, optimizer, range(3), share=True)
    options = StateDictOptions(full_state_dict=True)
    kept = get_optimizer_state_dict(model, optimizer, options=options)
    other, again = build(shard=True)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, again, kept, options=options)
    train(model, optimizer, range(3, 6), share=True)
    train(other, again, range(3, 6), share=True)
    whole = [p.full_tensor() for p in model.parameters()]
    gaps = [(p - q).abs().max() for p, q in zip(whole, single[0].parameters())]
    resumed = [(p - q.full_tensor()).abs().max() for p, q in zip(whole, other.parameters())]
    if rank == 0:
        torch.save({"single": float(max(gaps)), "resumed": float(max(resumed))}, out)
    ended()


def test_fsdp2_trains_and_resumes_as_one_process(tmp_path: Path) -> None:
    spawn(_fsdp, 2, str(tmp_path / "found"))
    found = torch.load(tmp_path / "found")
    assert found["single"] < 1e-9 and found["resumed"] == 0.0
