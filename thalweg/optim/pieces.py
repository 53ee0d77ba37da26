"""A batch cut into parts that are updated one after the other, with the same numbers, to the same result.

What cuts: release of gradients (a parameter at a time, as the backward pass gives its gradient) and offload of slots (as
much at a time as lies on the device). A uniform part, one number for the whole batch, is the same before every part of it
and moves once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, offsets, slots_of
from thalweg.optim.codecs import BLOCK
from thalweg.optim.eager import Extra
from thalweg.optim.program import Program


def uniform_parts(program: Program) -> list[int]:
    """Which stored parts are one number for a whole batch."""
    return [k for k, part in enumerate(program.parts) if part.shape == "uniform"]


def elements(program: Program, batch: Batch, start: int, num: int) -> Batch:
    """Elements ``start`` to ``start + num`` of a batch of one flat tensor; without its gradient, with uniform parts copied.

    Args:
        start: a multiple of ``BLOCK``.
    """
    assert start % BLOCK == 0 and len(batch.ps) == 1
    cuts = {"like": slice(start, start + num), "block": slice(start // BLOCK, -(-(start + num) // BLOCK))}
    slots = [
        [mine[0].clone() if part.shape == "uniform" else mine[0][cuts[str(part.shape)]]]
        for part, mine in zip(program.parts, batch.slots)
    ]
    first = next(offsets(batch)) + start
    return Batch([batch.ps[0][start : start + num]], [], slots, batch.folds, firsts=[first])


def one_of(program: Program, batch: Batch, i: int) -> Batch:
    """Parameter ``i`` of a batch alone, without its gradient, with uniform parts copied."""
    return Batch(
        [batch.ps[i]], [], slots_of(program, batch.slots, [i]), [batch.fold(i)], firsts=[list(offsets(batch))[i]]
    )


@dataclass
class Turn:
    """The uniform parts of a batch while its pieces are updated: what they were before, and what they become."""

    program: Program
    batch: Batch

    def __post_init__(self) -> None:
        self.which = uniform_parts(self.program)
        self.new = [self.batch.slots[k][0].clone() for k in self.which]

    def begin(self, piece: Batch) -> None:
        """A piece starts from what the batch has."""
        for k in self.which:
            piece.slots[k][0].copy_(self.batch.slots[k][0])

    def note(self, piece: Batch, skipped: Tensor | None) -> None:
        """Keep what a piece has made of them, unless it was ``skipped``; all that were not have made the same."""
        for new, k in zip(self.new, self.which):
            made = piece.slots[k][0]
            new.copy_(made if skipped is None else torch.where(skipped > 0, new, made))

    def end(self) -> None:
        """The batch has what its pieces have made."""
        for new, k in zip(self.new, self.which):
            self.batch.slots[k][0].copy_(new)


def portions(program: Program, batch: Batch, extra: Extra, largest: int) -> Iterator[tuple[Batch, Extra]]:
    """A batch in pieces of at most ``largest`` elements: of a flat tensor cut, else of whole parameters, at least one.

    Args:
        largest: a multiple of ``BLOCK``.
    """
    if program.reads == "element":
        size = batch.ps[0].numel()
        for start in range(0, size, largest):
            num = min(largest, size - start)
            piece = elements(program, batch, start, num)
            piece.gs = [batch.gs[0][start : start + num]]
            yield piece, None if extra is None else {n: [x[0][start : start + num]] for n, x in extra.items()}
        return
    which: list[int] = []
    for i, p in enumerate(batch.ps):
        if which and sum(batch.ps[k].numel() for k in which) + p.numel() > largest:
            yield _some(program, batch, extra, which)
            which = []
        which.append(i)
    yield _some(program, batch, extra, which)


def _some(program: Program, batch: Batch, extra: Extra, which: list[int]) -> tuple[Batch, Extra]:
    """The parameters numbered ``which``, with uniform parts copied."""
    places = list(offsets(batch))
    piece = Batch(
        [batch.ps[k] for k in which],
        [batch.gs[k] for k in which],
        slots_of(program, batch.slots, which),
        [batch.fold(k) for k in which],
        firsts=[places[k] for k in which],
    )
    return piece, None if extra is None else {name: [x[k] for k in which] for name, x in extra.items()}
