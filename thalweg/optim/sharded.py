"""Updates of sharded parameters (DTensor): torch.distributed carries them, and what is computed is the unsharded update.

Rules that work element by element run on each rank's own shard, without communication. Rules that read rows, matrices or
whole parameters need them whole: parameters are shared out over the ranks, each gathers all, computes its own and sends the
results, so that a matrix is orthogonalized once, not once a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from thalweg.core import ModelError
from thalweg.optim.batch import Batch
from thalweg.optim.eager import Extra, Kernel
from thalweg.optim.program import Program


def sharded(program: Program, kernel: Kernel) -> Kernel:
    """``kernel`` for batches of DTensors."""
    return _on_shards(kernel) if program.reads == "element" else _shared_out(program, kernel)


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor; itself if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def _on_shards(kernel: Kernel) -> Kernel:
    def run(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        mine = Batch(
            [local(p) for p in batch.ps],
            [local(g) for g in _like(batch.gs, batch.ps)],
            [[local(x) for x in part] for part in batch.slots],
            batch.folds,
        )
        more = None if extra is None else {name: [local(x) for x in tensors] for name, tensors in extra.items()}
        kernel(mine, scalars, due=due, extra=more)

    return run


def _shared_out(program: Program, kernel: Kernel) -> Kernel:
    def run(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        mesh = batch.ps[0].device_mesh  # type: ignore[attr-defined]
        group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        ps, gs = [whole(p) for p in batch.ps], [whole(g) for g in batch.gs]
        slots = [[whole(x) for x in part] for part in batch.slots]
        uniform = [part.shape == "uniform" for part in program.parts]
        mine = [i for i in range(len(ps)) if i % world == rank] or [0]
        own = [part if alone else [part[i] for i in mine] for part, alone in zip(slots, uniform)]
        folds = [batch.folds[i] for i in mine] if batch.folds else []
        more = None if extra is None else {name: [whole(x[i]) for i in mine] for name, x in extra.items()}
        kernel(Batch([ps[i] for i in mine], [gs[i] for i in mine], own, folds), scalars, due=due, extra=more)
        for i in range(len(ps)):
            source = dist.get_global_rank(group, i % world)
            results = [ps[i], *(part[i] for part, alone in zip(slots, uniform) if not alone)]
            targets = [batch.ps[i], *(part[i] for part, alone in zip(batch.slots, uniform) if not alone)]
            for result, target in zip(results, targets):
                sent = result.contiguous()
                dist.broadcast(sent, src=source, group=group)
                _put(sent, target)

    return run


def whole(x: Tensor) -> Tensor:
    """All of a tensor on this rank, in memory of its own."""
    return x.full_tensor().clone() if isinstance(x, DTensor) else x


def _put(full: Tensor, target: Tensor) -> None:
    """This rank's part of ``full`` into ``target``, without communication."""
    if isinstance(target, DTensor):
        part = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    elif target is not full:
        target.copy_(full)


def _like(gs: Sequence[Tensor], ps: Sequence[Tensor]) -> list[Tensor]:
    """Gradients laid out as their parameters are."""
    laid = []
    for g, p in zip(gs, ps):
        if isinstance(p, DTensor) and not isinstance(g, DTensor):
            raise ModelError(
                "A sharded parameter has a gradient that is not.",
                f"Parameter {tuple(p.shape)} on {p.device_mesh}, gradient a plain tensor {tuple(g.shape)}.",
                "Keep gradients as DTensors, as FSDP2 and tensor parallelism make them.",
            )
        same = not isinstance(g, DTensor) or not isinstance(p, DTensor) or g.placements == p.placements
        laid.append(g if same else g.redistribute(p.device_mesh, p.placements))  # type: ignore[attr-defined]
    return laid


def added_up(value: Tensor, x: Tensor) -> Tensor:
    """A sum over this rank's part of ``x``, added up over the ranks that hold other parts.

    Ranks that hold copies count once.
    """
    if not isinstance(x, DTensor):
        return value
    value = value.clone()
    for dim, placement in enumerate(x.placements):
        if isinstance(placement, Shard):
            dist.all_reduce(value, group=x.device_mesh.get_group(dim))
        elif isinstance(placement, Partial):
            raise ModelError(
                "A gradient is a partial sum.",
                f"Placements {x.placements}.",
                "Reduce gradients before the step, as FSDP2 does.",
            )
    return value


def layout(x: Tensor) -> Any:
    """What tensors must share for their sums to be added up in one call."""
    return (x.device_mesh, x.placements) if isinstance(x, DTensor) else None
