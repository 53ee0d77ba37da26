"""Which part of each parameter lies on which rank, where parameters are sharded; and what ranks send one another of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Touch = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Piece:
    """A parameter cut along its first dimension, as torch's FSDP2 cuts it: equal runs of rows, the last ones shorter or empty.

    Attributes:
        shape: of the whole.
        world: ranks that hold a part.

    >>> piece = Piece((7, 2), 3)
    >>> [piece.bounds(rank) for rank in range(3)], piece.room, piece.size(2)
    ([(0, 6), (6, 12), (12, 14)], 6, (1, 2))
    """

    shape: tuple[int, ...]
    world: int

    @property
    def row(self) -> int:
        """Elements in a row."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def room(self) -> int:
        """Elements that each rank keeps place for: as many as the first has."""
        return -(-self.shape[0] // self.world) * self.row

    def bounds(self, rank: int) -> tuple[int, int]:
        """First and last element, in the order of memory, of a rank's part."""
        return min(rank * self.room, self.numel), min((rank + 1) * self.room, self.numel)

    def size(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's part."""
        start, stop = self.bounds(rank)
        return ((stop - start) // self.row if self.row else 0, *self.shape[1:])


class Shards:
    """How the parameters of a model lie on ranks.

    Args:
        shapes: of whole parameters, by name.
        group: of the ranks among which each parameter is cut.
        replica: which of several such groups this is, which hold the same; 0 where there is one.
        touch: stands around each exchange, told what it is; makes the errors of ranks that are lost.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        group: Any,
        replica: int = 0,
        touch: Touch = lambda what: nullcontext(),
    ) -> None:
        self.group, self.replica, self.touch = group, replica, touch
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.pieces = {name: Piece(tuple(shape), self.world) for name, shape in shapes.items()}

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor that is cut as the parameter ``name``; a view."""
        piece = self.pieces[name]
        start, stop = piece.bounds(self.rank)
        return whole.reshape(-1)[start:stop].view(piece.size(self.rank))

    def whole(self, name: str, part: Tensor, *, all_ranks: bool = False) -> Tensor | None:
        """The whole of what ``part`` is this rank's part of: on the first rank of the group, or on all; elsewhere None.

        Every rank of the group calls this.
        """
        piece = self.pieces[name]
        sent = part.new_zeros(piece.room)
        sent[: part.numel()] = part.reshape(-1)
        got = all_ranks or self.rank == 0
        parts = [torch.empty_like(sent) for _ in range(self.world)] if got else None
        with self.touch("the parts of a tensor"):
            if all_ranks:
                dist.all_gather(parts, sent, group=self.group)
            else:
                dist.gather(sent, parts, group=self.group, group_dst=0)
        return torch.cat(parts)[: piece.numel].view(piece.shape) if parts is not None else None

    def total(self, value: Tensor) -> Tensor:
        """The sum of what the ranks of the group have found in their parts."""
        found = value.clone()
        with self.touch("a sum over parts"):
            dist.all_reduce(found, group=self.group)
        return found

    def largest(self, value: Tensor) -> Tensor:
        """The largest of what the ranks of the group have found."""
        found = value.clone()
        with self.touch("a maximum over parts"):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found

    def exchange(self, given: Tensor, sent: Sequence[int], got: Sequence[int]) -> Tensor:
        """Runs of a flat tensor to each rank, and from each.

        Args:
            sent, got: elements to, and from, each rank.
        """
        found = torch.empty(sum(got), dtype=given.dtype, device=given.device)
        with self.touch("whole parameters, or parts of them"):
            dist.all_to_all_single(found, given, list(got), list(sent), group=self.group)
        return found


class Owners:
    """Who works on which whole parameter: each rank on about as many elements, in the order of names.

    Args:
        names: parameters that must be whole to be worked on.
    """

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        self.shards = shards
        load = [0] * shards.world
        self.of: dict[str, int] = {}
        for name in sorted(names, key=lambda name: (-shards.pieces[name].numel, name)):
            self.of[name] = load.index(min(load))
            load[self.of[name]] += shards.pieces[name].numel
        self.names = [[name for name in names if self.of[name] == rank] for rank in range(shards.world)]

    @property
    def mine(self) -> list[str]:
        return self.names[self.shards.rank]

    def gather(self, parts: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Whole tensors of what this rank owns, from everyone's parts: one exchange."""
        shards = self.shards
        runs = [parts[name].reshape(-1) for names in self.names for name in names]
        given = torch.cat(runs).to(dtype) if runs else torch.empty(0, dtype=dtype, device=device)
        sent = [sum(self._extent(name, shards.rank) for name in names) for names in self.names]
        sizes = [sum(self._extent(name, rank) for name in self.mine) for rank in range(shards.world)]
        got = shards.exchange(given, sent, sizes)
        wholes = {name: torch.empty(shards.pieces[name].shape, dtype=dtype, device=device) for name in self.mine}
        at = 0
        for rank in range(shards.world):
            for name in self.mine:
                start, stop = shards.pieces[name].bounds(rank)
                wholes[name].view(-1)[start:stop] = got[at : at + stop - start]
                at += stop - start
        return wholes

    def scatter(self, wholes: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """This rank's parts of all parameters, from who owns them: one exchange, the way back of ``gather``."""
        shards = self.shards
        runs = [
            wholes[name].reshape(-1)[slice(*shards.pieces[name].bounds(rank))]
            for rank in range(shards.world)
            for name in self.mine
        ]
        given = torch.cat(runs).to(dtype) if runs else torch.empty(0, dtype=dtype, device=device)
        sent = [sum(self._extent(name, rank) for name in self.mine) for rank in range(shards.world)]
        sizes = [sum(self._extent(name, shards.rank) for name in names) for names in self.names]
        got = shards.exchange(given, sent, sizes)
        return dict(self._cut(got))

    def _cut(self, got: Tensor) -> Iterator[tuple[str, Tensor]]:
        at, shards = 0, self.shards
        for names in self.names:
            for name in names:
                num = self._extent(name, shards.rank)
                yield name, got[at : at + num].view(shards.pieces[name].size(shards.rank))
                at += num

    def _extent(self, name: str, rank: int) -> int:
        start, stop = self.shards.pieces[name].bounds(rank)
        return stop - start
