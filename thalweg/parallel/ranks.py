"""The processes that train one model together, behind one small face: what each may know, and what they tell one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from torch import Tensor

from thalweg.core import RanksError
from thalweg.device import Device

T = TypeVar("T")


class Talk(Protocol):
    """What ranks say between two steps."""

    def say(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks, as said a call ago; zeros at the first call, and after ``end``."""

    def end(self) -> None:
        """No call follows soon: what is under way is waited for."""


class Ranks(Protocol):
    """Who trains, and how they agree. Every rank calls each method at the same place of its program.

    Attributes:
        rank, world: which this is, from 0, and how many there are.
        group: the process group for sums on the device; None where there is one rank.
        timeout: seconds after which a rank that does not answer is given up.
        at: the last step that this rank has made, for what is said of it where it is lost.
    """

    rank: int
    world: int
    group: Any
    timeout: float
    at: int

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""

    def own(self, device: Device) -> Device:
        """This rank's own device of that kind; the one thing here that asks no other rank.

        Raises:
            DeviceError: if there are more ranks here than devices, or no sums between such devices.
        """

    def use(self, device: Device) -> None:
        """Sums are made on such devices from now on."""

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks, in place: one collective a tensor, in this order."""

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes that of the first rank, whatever its dtype and strides."""

    def largest(self, number: int) -> int:
        """The largest of what the ranks gave."""

    def gather(self, tensor: Tensor) -> Tensor:
        """What each rank gave, in the order of ranks: (world, *shape)."""

    def exchange(self, tensor: Tensor) -> Tensor:
        """Row ``r`` of every rank's ``tensor`` (world, n) goes to rank ``r``, which gets them in the order of ranks: (world, n)."""

    def told(self, value: T) -> list[T]:
        """What each rank gave, in the order of ranks. Plain data."""

    def from_first(self, value: T) -> T:
        """What the first rank gave. Plain data."""

    def together(self, act: Callable[[], T]) -> T:
        """What ``act`` gives on this rank; where it fails on one rank, it fails on all.

        Raises:
            RanksError: naming the rank that failed, on those that did not. The others raise what they met.
        """

    def talk(self) -> Talk:
        """For what ranks say between steps."""

    def in_touch(self, what: str) -> AbstractContextManager[None]:
        """Around what asks other ranks past this face.

        Args:
            what: is waited for, for people.

        Raises:
            RanksError: where it fails.
        """

    def wait(self) -> None:
        """Until all ranks are here."""

    def leave(self) -> None:
        """All is done: the ranks part."""

    def ends_with(self, words: str) -> None:
        """This rank ends with an error of its own: the others can say so."""


class Silent:
    """Nobody to talk to."""

    def say(self, *numbers: float) -> list[float]:
        return list(numbers)

    def end(self) -> None:
        pass


class Alone:
    """One process: everything is its own, and nothing is asked of torch.distributed."""

    rank, world, group, timeout, at = 0, 1, None, 0.0, 0

    @property
    def is_first(self) -> bool:
        return True

    def own(self, device: Device) -> Device:
        return device

    def use(self, device: Device) -> None:
        pass

    def add(self, tensors: Iterable[Tensor]) -> None:
        pass

    def copy(self, tensors: Iterable[Tensor]) -> None:
        pass

    def largest(self, number: int) -> int:
        return number

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def exchange(self, tensor: Tensor) -> Tensor:
        return tensor

    def told(self, value: T) -> list[T]:
        return [value]

    def from_first(self, value: T) -> T:
        return value

    def together(self, act: Callable[[], T]) -> T:
        return act()

    def talk(self) -> Talk:
        return Silent()

    def in_touch(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def ends_with(self, words: str) -> None:
        pass


#: One process.
ALONE: Ranks = Alone()


def on_first(ranks: Ranks, act: Callable[[], T]) -> T | None:
    """What ``act`` gives on the first rank; None on the others, which fail where it fails."""
    return ranks.together(act if ranks.is_first else lambda: None)


def check_equal(ranks: Ranks, what: str, names: Sequence[str], remedy: str) -> None:
    """Refuse ranks whose ``names`` (what they hold, one by one) are not the first rank's.

    Args:
        what: they hold, in words: "another recipe".

    Raises:
        RanksError: on all ranks, with the first few that differ.
    """
    told = ranks.told(list(names))
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            only = [f"rank {rank} has {one}" for one in theirs if one not in told[0]]
            missing = [f"rank 0 has {one}" for one in told[0] if one not in theirs]
            shown = [*missing[:3], *only[:3]] or ["the same in another order"]
            err = RanksError(f"Rank {rank} has {what} than rank 0.", "; ".join(shown) + ".", remedy)
            err.told = not ranks.is_first
            raise err
