"""What training state takes, found by making it from shapes alone: the arena itself says, so no rule has a formula here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import ParameterRow
from thalweg.optim.arena import How, Segment, make_arenas
from thalweg.optim.eager import STACK, TILE


@dataclass(frozen=True)
class StateSizes:
    """Bytes of training state on the device, by purpose.

    Attributes:
        offloaded: of slots and averages that lie in the CPU's memory instead, and are not among the others.
        update: what the update takes besides while it runs, at most.
    """

    parameters: int
    gradients: int
    slots: int
    averages: int
    offloaded: int = 0
    update: int = 0


def state_sizes(
    named: Sequence[tuple[str, Tensor]],
    rows: Sequence[ParameterRow],
    optimizer: Any,
    *,
    average: bool = False,
    device_kind: str = "cpu",
    gradients: torch.dtype | None = None,
) -> StateSizes:
    """What ``make_arenas`` would allocate; nothing is.

    Args:
        named: (name, parameter): real, fake or on the meta device.
        rows: the parameter table.
        optimizer: the recipe's optimizer section; what it leaves open is as without a budget.
        average: whether a weight average moves in the update.
        device_kind: where it will run.
        gradients: what gradients are added up in; None: the parameters' own dtype.

    Raises:
        RecipeError: for slots that the rule cannot have.
    """
    shapes = [(name, nn.Parameter(_without_memory(p))) for name, p in named]
    how = How(
        slots=optimizer.slots or "full",
        rounding=optimizer.rounding,
        average=average,
        way="eager",  # it needs no kernel to be built
        release=optimizer.release_gradients not in (None, "off"),
        gradients=gradients,
    )
    found = {"parameters": 0, "gradients": 0, "slots": 0, "average": 0}
    arenas = make_arenas(shapes, rows, optimizer, how)
    for arena in arenas:
        for purpose, nbytes in arena.nbytes().items():
            found[purpose] += nbytes
    away = found["slots"] + found["average"] if optimizer.offload else 0
    if away:
        found["slots"] = found["average"] = 0
    update = max((_temporary(segment) for arena in arenas for segment in arena.segments), default=0)
    return StateSizes(found["parameters"], found["gradients"], found["slots"], found["average"], away, update)


def _without_memory(p: Tensor) -> Tensor:
    """Its shape, strides and dtype; ``empty_like`` would import half of torch's compiler for it."""
    return torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device="meta")


#: Tensors of a stack of matrices that are alive at once while rules work on it: the parameter and its gradient in float32,
#: slots, the change, and what products of matrices need.
_ALIVE = 8


def _temporary(segment: Segment) -> int:
    """What an update takes while it runs, beyond what it writes, at most.

    Rules that work element by element go through tiles of ``TILE`` elements, rules that read matrices through stacks of up to
    ``STACK`` elements or one larger matrix, in float32.
    """
    if segment.program.reads == "element":
        return 4 * _ALIVE * min(TILE, sum(p.numel() for p in segment.batch.ps))
    sizes = [p.numel() for p in segment.batch.ps]
    largest = max(sizes, default=0)
    if segment.program.stacks:  # equal shapes together, as many as fit
        largest = max(largest, min(STACK, sum(sizes)))
    return 4 * _ALIVE * largest
