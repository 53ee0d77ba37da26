"""The ranks as those see them who share out micro-batches, where several ranks compute each micro-batch together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from thalweg.device import Device
from thalweg.parallel.joined import Joined
from thalweg.parallel.mesh import Grid
from thalweg.parallel.ranks import Talk

T = TypeVar("T")


class Feeds:
    """One of the feeds; sums are over one rank of each, words over all ranks.

    Args:
        ranks: all of the run.
        grid: how they stand.
    """

    def __init__(self, ranks: Joined, grid: Grid) -> None:
        self.ranks, self.layout = ranks, grid.layout
        self.rank, self.world, self.group = grid.feed, grid.layout.feeds, grid.feeds_group
        self.timeout = ranks.timeout

    @property
    def at(self) -> int:
        return self.ranks.at

    @at.setter
    def at(self, step: int) -> None:
        self.ranks.at = step

    @property
    def is_first(self) -> bool:
        return self.ranks.is_first

    def own(self, device: Device) -> Device:
        return self.ranks.own(device)

    def use(self, device: Device) -> None:
        self.ranks.use(device)

    def add(self, tensors: Iterable[Tensor]) -> None:
        if self.world > 1:
            self.ranks.add(tensors, self.group)

    def copy(self, tensors: Iterable[Tensor]) -> None:
        self.ranks.copy(tensors)

    def largest(self, number: int) -> int:
        return self.ranks.largest(number)

    def gather(self, tensor: Tensor) -> Tensor:
        return self.ranks.gather(tensor)[:: self.layout.tensor]

    def exchange(self, tensor: Tensor) -> Tensor:
        raise AssertionError("exact_reduce is refused where layers are cut")

    def told(self, value: T) -> list[T]:
        """What one rank of each feed gave."""
        return self.ranks.told(value)[:: self.layout.tensor]

    def from_first(self, value: T) -> T:
        return self.ranks.from_first(value)

    def together(self, act: Callable[[], T]) -> T:
        return self.ranks.together(act)

    def talk(self) -> Talk:
        return self.ranks.talk()

    def wait(self) -> None:
        self.ranks.wait()

    def leave(self) -> None:
        self.ranks.leave()

    def ends_with(self, words: str) -> None:
        self.ranks.ends_with(words)
