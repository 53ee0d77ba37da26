"""Sums that do not hang on the order in which they are added: the same bits however numbers lie, and on which ranks.

Rounding to a fixed grid first makes every addition exact: no partial sum has more digits than a float64 holds, so any order,
any number of threads and any split over ranks gives the same bits. What the first grid leaves over goes to a second, finer
one. The method is that of Demmel and Nguyen (2013), Fast reproducible floating-point summation, with two bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_DIGITS = 53  # of a float64
_PORTION = 1 << 18  # elements at a time: copies in float64 stay small


OverRanks = Callable[[Tensor], Tensor]


def ordered_norm(
    gs: Sequence[Tensor],
    elements: int = 0,
    largest: OverRanks | None = None,
    added: OverRanks | None = None,
) -> Tensor:
    """The 2-norm over all elements, 0-dim float64: the same bits in whatever order and on whatever rank they lie.

    Args:
        gs: of any float dtype and shape, on one device that has float64.
        elements: how many there are over all ranks; 0: those in ``gs``. It sets the grids, so all ranks give the same.
        largest, added: the maximum and the sum of a tensor over the ranks; None: this process has all elements.

    Returns:
        NaN or infinite if an element is. Elements under 2^-52 of the largest one, divided by their number, are left out.

    >>> parts = [torch.tensor([1e-8, 3.0]), torch.tensor([4.0, -1e-9])]
    >>> ordered_norm(parts).item() == ordered_norm(parts[::-1]).item() == 5.0
    True
    """
    device = gs[0].device
    top = torch.zeros((), dtype=torch.float64, device=device)
    for g in gs:
        if g.numel():
            top = torch.maximum(top, torch.linalg.vector_norm(g, math.inf).to(torch.float64))
    if largest is not None:
        top = largest(top)
    unit = _unit(top)
    grids = _grids(elements or sum(g.numel() for g in gs))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for g in gs:
        for part in g.reshape(-1).split(_PORTION):
            squares = (part.to(torch.float64) * unit).square_()
            sums += torch.stack([near.sum() for near in _rounded(squares, grids)])
    if added is not None:
        sums = added(sums)
    return torch.where(torch.isfinite(top), sums.sum().sqrt() / unit, top)


def ordered_sum(rows: Tensor, num: int = 0, largest: OverRanks | None = None, added: OverRanks | None = None) -> Tensor:
    """The sum over the first dimension, float64: the same bits whatever the order of the rows, and whichever rank has them.

    Args:
        rows: (n, columns) in float64, finite; n may be 0.
        num: how many rows there are over all ranks, or more; 0: those of ``rows``.
        largest, added: as for ``ordered_norm``.

    >>> rows = torch.tensor([[0.1], [1e16], [0.2], [-1e16]], dtype=torch.float64)
    >>> torch.equal(ordered_sum(rows), ordered_sum(rows.flip(0))), abs(ordered_sum(rows).item() - 0.3) < 1e-2
    (True, True)
    """
    top = rows.abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[1:])
    if largest is not None:
        top = largest(top)
    unit = _unit(top)
    sums = torch.stack([near.sum(0) for near in _rounded(rows * unit, _grids(num or len(rows)))])
    if added is not None:
        sums = added(sums)
    return sums.sum(0) / unit


def _unit(top: Tensor) -> Tensor:
    """A power of two that brings ``top`` to at most 1."""
    exponent = torch.frexp(torch.where(torch.isfinite(top), top, 1.0))[1].clamp(min=-1000)
    return torch.ldexp(torch.ones_like(top), -exponent)


def _rounded(x: Tensor, grids: list[tuple[float, float]]) -> Iterator[Tensor]:
    """``x``, which is used up, in parts that are multiples of each grid."""
    for grid, steps in grids:
        near = (x * steps).round_().mul_(grid)
        yield near
        x -= near


def _grids(num: int) -> list[tuple[float, float]]:
    """(grid, 1 / grid), both powers of two: ``num`` multiples of it up to the last rest add up exactly."""
    digits = max(1, math.ceil(math.log2(max(num, 2))))
    first = 2.0 ** (digits + 1 - _DIGITS)
    second = first * 2.0 ** (digits - _DIGITS)
    return [(first, 1 / first), (second, 1 / second)]
