"""What a compiled step traces: pure functions over the tensors of a run, written so that no two of their inputs overlap.

The model's parameters are views of flat buffers. Handed to the compiler side by side with those, they would be many inputs that
share memory, each put together anew at every call; on a chip whose views are copies they would not even be the same memory. So
only the flat buffer goes in, as a leaf that asks for its gradient; the parameters are cut out of it inside the graph, the model
is called with them in place of its own, and the gradient comes out flat: the backward pass of a split is one concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thalweg.engine.losses import sum_and_weight
from thalweg.engine.preflight import ModelLoss
from thalweg.optim import Arena
from thalweg.optim.arena import Segment, numbers_of
from thalweg.optim.batch import Batch, is_dense
from thalweg.optim.eager import eager
from thalweg.optim.program import due_now
from thalweg.optim.shared import settle_over
from thalweg.precision import Policy


class LossOf(nn.Module):
    """A model and its loss as one module, so that ``functional_call`` reaches the model's parameters inside the loss."""

    def __init__(self, model: nn.Module, loss: ModelLoss, policy: Policy, device: Any) -> None:
        super().__init__()
        self.model, self.loss, self.policy, self.device = model, loss, policy, device

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        with self.policy.forward(self.device):
            total, weight = sum_and_weight(self.loss(self.model, batch), batch)
        return total, weight


@dataclass(frozen=True)
class _Cut:
    """A parameter's place in its arena: how many elements of its share are used, and how they become its shape.

    Attributes:
        names: as the loss's module has it; several where it is tied.
        laid: its shape in the order of memory; ``order``: which of those dimensions comes where.
    """

    names: tuple[str, ...]
    num: int
    laid: tuple[int, ...]
    order: tuple[int, ...]

    def of(self, share: Tensor) -> Tensor:
        part = share[: self.num].view(self.laid)
        return part if self.order == tuple(range(len(self.order))) else part.permute(self.order)


def as_vector(number: Tensor) -> Tensor:
    """A number of the state as a vector of one, which is the same memory; all else as it is.

    The tracer takes 0-dim float64 tensors of the CPU for numbers of Python's, and forgets what is written to them (torch 2.13).
    """
    return number.view(1) if not number.ndim else number


class FlatArena:
    """An arena as a graph sees it.

    Attributes:
        theta: the arena's parameters as one leaf that asks for a gradient; the same memory.
        whole: whether its segments are updated apart, and joined into it.
        lengths: elements of each parameter's share, gaps included; their sum is the arena.
    """

    def __init__(self, arena: Arena, names: Mapping[int, tuple[str, ...]]) -> None:
        self.arena = arena
        self.theta = arena.params.detach().requires_grad_()
        self.grads = arena.grads
        starts = [start for start, _ in arena.places.values()] + [arena.params.numel()]
        self.lengths = [b - a for a, b in zip(starts, starts[1:])]
        self.cuts = [_cut(names[id(p)], p) for _, p in arena.places.values()]
        self.kernels = [eager(s.program, tile=0, stack=s.program.reads == "matrix") for s in arena.segments]
        self.borders = [_border(arena, segment) for segment in arena.segments]
        self.slots = [[[as_vector(x) for x in part] for part in s.batch.slots] for s in arena.segments]
        self.flat = [[[not x.ndim for x in part] for part in s.batch.slots] for s in arena.segments]
        self.shared = {rule: {n: as_vector(x) for n, x in found.items()} for rule, found in arena.shared.items()}
        self.whole = self._is_whole()
        self.where = {name: k for k, name in enumerate(arena.places)}

    def _is_whole(self) -> bool:
        """Whether the segments work element by element and fill the arena, one behind the other."""
        ends = [0, *(stop for _, stop in self.borders)]
        return [start for start, _ in self.borders] == ends[:-1] and ends[-1] == self.theta.numel() > 0

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by the names of the loss's module, cut out of the leaf."""
        shares = self.theta.split(self.lengths)
        found: dict[str, Tensor] = {}
        for share, cut in zip(shares, self.cuts):
            p = cut.of(share)
            for name in cut.names:
                found[name] = p
        return found

    def batch(self, k: int, flat: Tensor, grad: Tensor) -> Batch:
        """Segment ``k`` with its parameters and gradients as views of what the graph holds."""
        segment = self.arena.segments[k]
        if segment.program.reads == "element":
            start, stop = self.borders[k]
            ps, gs = [flat[start:stop]], [grad[start:stop]]
        else:
            places = [self.where[name] for name in segment.names]
            shares, theirs = flat.split(self.lengths), grad.split(self.lengths)
            ps = [self.cuts[i].of(shares[i]) for i in places]
            gs = [self.cuts[i].of(theirs[i]) for i in places]
        slots = [
            [x[0] if flat else x for x, flat in zip(part, flats)] for part, flats in zip(self.slots[k], self.flat[k])
        ]
        return replace(segment.batch, ps=ps, gs=gs, slots=slots)

    def scalars(self, k: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Arena.scalars``, of segment ``k``."""
        segment = self.arena.segments[k]
        shared = self.shared.get(segment.treatment.rule, {})
        return {**self.arena.scalars(segment, given), **{name: number[0] for name, number in shared.items()}}


def _cut(names: tuple[str, ...], p: Tensor) -> _Cut:
    order = tuple(range(p.ndim))
    if p.numel() and is_dense(p):  # as ``Arena.view``: dense strides are kept
        strides = p.stride()
        order = tuple(sorted(order, key=lambda d: (-strides[d], d)))
    laid = tuple(p.shape[d] for d in order)
    return _Cut(names, p.numel(), laid, tuple(order.index(d) for d in range(p.ndim)))


def _border(arena: Arena, segment: Segment) -> tuple[int, int]:
    """The first element of a segment in its arena, and the one behind its last."""
    if segment.program.reads != "element":
        return 0, 0
    start = arena.places[segment.names[0]][0]
    return start, start + segment.batch.ps[0].numel()


def names_in(module: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each parameter, by its identity."""
    found: dict[int, tuple[str, ...]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        found[id(p)] = (*found.get(id(p), ()), name)
    return found


def gradients(
    module: LossOf,
    flats: Sequence[FlatArena],
    buffers: Mapping[str, Tensor],
    batch: Any,
    seed: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """(sum of losses, weight, flat gradient of each arena) of a micro-batch.

    Args:
        buffers: what stands in place of the model's own, by the names of ``module``.
        seed: what the backward pass starts from, given the sum of losses.
    """
    given: dict[str, Tensor] = dict(buffers)
    for flat in flats:
        given.update(flat.parameters())
    total, weight = functional_call(module, given, (batch,))
    found = torch.autograd.grad(total, [flat.theta for flat in flats], seed(total))
    return total.detach(), weight, found


def update(
    flats: Sequence[FlatArena],
    grads: Sequence[Tensor],
    *,
    lr: Tensor,
    t: Tensor,
    divisor: Tensor,
    skipped: Tensor,
    share: Tensor | None,
    moved: Mapping[str, Tensor],
    due: Sequence[int],
) -> None:
    """As ``thalweg.optim.arena.update``, on what a graph holds.

    Args:
        grads: summed, of each arena; they are left as they are.
        due: for each segment, over all arenas, whether its periodic work is due.
    """
    given = numbers_of(flats[0].arena.scalar_dtype, lr, t, divisor, skipped, share, moved)
    places = [(flat, k) for flat in flats for k in range(len(flat.arena.segments))]
    thetas = [flat.theta.detach() for flat in flats]
    batches = [flat.batch(k, thetas[i], grads[i]) for i, flat in enumerate(flats) for k in range(len(flat.kernels))]
    for rule, found in flats[0].shared.items():
        numbers = {name: number[0] for name, number in found.items()}
        mine = [
            (flat.arena.segments[k].program, batch, flat.scalars(k, given))
            for (flat, k), batch in zip(places, batches)
            if flat.arena.segments[k].treatment.rule == rule
        ]
        settle_over(mine, numbers, rates=[scalars["lr"] for _, _, scalars in mine], skipped=skipped)
    for (flat, k), batch, now in zip(places, batches, due):
        if flat.whole:  # each its own: what is written into parts of one tensor is masked, part by part, over all of it
            batch.ps[:] = [p.clone() for p in batch.ps]
        flat.kernels[k](batch, flat.scalars(k, given), due=now)
    for flat in flats:
        if flat.whole:
            flat.theta.detach().copy_(torch.cat([batch.ps[0] for at, batch in zip(places, batches) if at[0] is flat]))


def due_of(flats: Sequence[FlatArena], tries: int) -> tuple[int, ...]:
    """For each segment, whether its periodic work is due at this step."""
    return tuple(due_now(s.program.rule, s.program.options, tries) for flat in flats for s in flat.arena.segments)
