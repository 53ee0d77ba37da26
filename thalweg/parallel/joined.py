"""Ranks over torch.distributed: sums on the devices' own backend, words over the host's."""

from __future__ import annotations

import atexit
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from thalweg.core import RanksError, ThalwegError
from thalweg.device import HOST_RANKS, Device, ran_out
from thalweg.parallel.beats import Beats, end_sibling
from thalweg.parallel.elastic import Agent
from thalweg.parallel.meeting import meet
from thalweg.parallel.ranks import ALONE, Ranks, Talk

T = TypeVar("T")
#: Seconds after which a rank that does not answer is given up.
TIMEOUT = 300.0


class Joined:
    """This process's part of a process group.

    Args:
        words: a group that works on the host's memory; sums go over it too, on the CPU.
        timeout: seconds, of what is begun.

        store: what they met in; None: of a group that was made elsewhere, and whose ranks are not named where one is lost.

    Attributes:
        group: for sums on the device.
        at: the last step that this rank has made; for others to read, where one is lost.
    """

    def __init__(self, words: Any, timeout: float = TIMEOUT, store: Any = None) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self.words, self.timeout = words, timeout
        self.rank, self.world = dist.get_rank(words), dist.get_world_size(words)
        self.group: Any = words
        self._backend = HOST_RANKS
        self.at = self._calls = 0
        self._doing = "at work"
        now = lambda: (self._calls, self.at, self._doing)
        every = min(1.0, timeout / 4)
        self._beats = None if store is None else Beats(store, self.rank, self.world, now, every)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, device: Device) -> Device:
        assert device.ranks_backend
        return device.of_rank(int(os.environ.get("LOCAL_RANK", self.rank)))

    def use(self, device: Device) -> None:
        backend = device.ranks_backend
        if backend != self._backend:
            with self._in_touch("a group for their devices"):
                self.group = self._dist.new_group(backend=backend, timeout=timedelta(seconds=self.timeout))
            self._backend = backend

    def add(self, tensors: Iterable[Tensor], group: Any = None) -> None:
        with self._in_touch("the sum of gradients"):
            for tensor in tensors:
                self._dist.all_reduce(tensor, group=group or self.group)

    def copy(self, tensors: Iterable[Tensor]) -> None:
        with self._in_touch("a copy of the state"), torch.no_grad():
            for tensor in tensors:
                if not tensor.numel():
                    continue
                whole = tensor.detach().contiguous()
                group = self.words if tensor.device.type == "cpu" else self.group  # slots may lie in the host's memory
                self._dist.broadcast(whole.reshape(-1).view(torch.uint8), group=group, group_src=0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    def largest(self, number: int) -> int:
        found = torch.tensor(number)
        with self._in_touch("how many micro-batches a window has"):
            self._dist.all_reduce(found, op=self._dist.ReduceOp.MAX, group=self.words)
        return int(found)

    def gather(self, tensor: Tensor) -> Tensor:
        found = tensor.new_empty(self.world, *tensor.shape)
        with self._in_touch("a sum in order"):
            put = (
                getattr(self._dist, "all_gather_single", None) or self._dist.all_gather_into_tensor
            )  # before torch 2.13
            put(found.reshape(-1), tensor.contiguous().reshape(-1), group=self.group)
        return found

    def exchange(self, tensor: Tensor) -> Tensor:
        found = torch.empty_like(tensor)
        with self._in_touch("a sum in order"):
            self._dist.all_to_all_single(found, tensor.contiguous(), group=self.group)
        return found

    def told(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world
        with self._in_touch("what each has to say"):
            self._dist.all_gather_object(found, value, group=self.words)
        return found

    def from_first(self, value: T) -> T:
        held = [value if self.is_first else None]
        with self._in_touch("what the first has to say"):
            self._dist.broadcast_object_list(held, group=self.words, group_src=0)
        return held[0]  # type: ignore[return-value]

    def together(self, act: Callable[[], T]) -> T:
        error: Exception | None = None
        value: Any = None
        try:
            value = act()
        except RanksError:
            raise  # this rank has lost the others: there is nobody to tell
        except Exception as err:
            error = err
        try:
            told = self.told("" if error is None else _words(error))
        except RanksError:
            if error is None:
                raise
            raise error from None  # the others have given this rank up: why they had to, it alone can say
        failed = next((rank for rank, words in enumerate(told) if words), None)
        if failed is None:
            return value  # type: ignore[no-any-return]
        if error is not None and (self.is_first or told[0] != told[self.rank]):
            raise error
        echo = RanksError(f"Rank {failed} failed.", told[failed], "See to it there; this rank had no part in it.")
        echo.told = True
        raise echo

    def talk(self) -> Talk:
        return _Talk(self)

    def wait(self) -> None:
        self.told(None)

    def leave(self) -> None:
        self.wait()
        self.part()

    def ends_with(self, words: str) -> None:
        if self._beats is not None:
            self._beats.end(words)

    def part(self) -> None:
        """The group is no more, for this process. Left to Python's end, its threads now and then abort the process."""
        if self._beats is not None:
            self._beats.end()
        self.words = self.group = None
        if self._dist.is_initialized():
            self._dist.destroy_process_group()
        gc.collect()  # who else holds the group, in a cycle

    def in_touch(self, what: str) -> AbstractContextManager[None]:
        return self._in_touch(what)

    @contextmanager
    def _in_touch(self, what: str) -> Iterator[None]:
        self._calls += 1
        self._doing = f"waiting in {what}"
        try:
            yield
        except RuntimeError as err:
            if isinstance(err, ThalwegError) or ran_out(err):
                raise
            lost = self._lost(what, _in_short(err))
            lost.lost = True
        else:
            self._doing = "at work"
            return
        raise lost

    def _lost(self, what: str, words: str) -> RanksError:
        """What there is to say of ranks that the others wait for; one that hangs on this machine is ended, or it would be in the
        way of the next group."""
        named = []
        for rank, (beat, why) in (self._beats.behind() if self._beats is not None else {}).items():
            hangs = "imed out" in words or "imeout" in words
            ended = (
                hangs and Agent().is_elastic and why in ("stands still", "is behind the others") and end_sibling(beat)
            )
            named.append(
                f"Rank {rank} {why} ({beat}{'; ended from here' if ended else ''}){': ' * bool(beat.last)}{beat.last}"
            )
        return RanksError(
            f"Rank {self.rank} lost another of the {self.world} ranks, or waited for it longer than {self.timeout:g} s.",
            " ".join([f"After step {self.at}, in {what}: {words}", *(f"{text}." for text in named)]),
            "Look for the first error of the other ranks; then go on from the newest checkpoint, with --resume.",
        )


class _Talk:
    """One small sum a step, begun at one call and waited for at the next: no rank waits for it in the step itself."""

    def __init__(self, ranks: Joined) -> None:
        self._ranks = ranks
        self._said: Tensor | None = None
        self._work: Any = None

    def say(self, *numbers: float) -> list[float]:
        heard = self._heard() or [0.0] * len(numbers)
        if not any(heard[:-1]):  # all but the last are wishes to end: nobody would wait for an answer
            self._said = torch.tensor(numbers, dtype=torch.float64)
            dist = self._ranks._dist
            with self._ranks._in_touch("a word between two steps"):
                self._work = dist.all_reduce(self._said, op=dist.ReduceOp.MAX, group=self._ranks.words, async_op=True)
        return heard

    def end(self) -> None:
        self._heard()

    def _heard(self) -> list[float]:
        if self._work is None or self._said is None:
            return []
        with self._ranks._in_touch("a word between two steps"):
            self._work.wait()
        found: list[float] = self._said.tolist()
        self._said = self._work = None
        return found


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ThalwegError) else f"{type(error).__name__}: {error}"


def _in_short(err: Exception) -> str:
    """What torch says, without the place in its sources and its advice."""
    words = " ".join(str(err).split())
    return re.sub(r"\[\S+:[0-9]+\] |This is typically caused.*", "", words)[:300].strip()


_joined: list[Joined] = []


def join(timeout: float = TIMEOUT, *, patience: float | None = None) -> Ranks:
    """The ranks that this process is one of: those that torchrun or ``--ranks`` started, or of a group that is there already.

    Args:
        timeout: seconds after which a rank that does not answer is given up; counts where the group is made here.
        patience: seconds that they may take to start, if others than ``timeout``.

    Raises:
        RanksError: if the others do not come.
    """
    import torch.distributed as dist

    ready = dist.is_available() and dist.is_initialized()
    if _joined and ready:
        return _joined[0]
    _joined.clear()
    wanted = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if ready:
        if dist.get_world_size() == 1:
            return ALONE
        limit = timedelta(seconds=timeout)
        own = dist.get_backend() == HOST_RANKS
        made = Joined(dist.group.WORLD if own else dist.new_group(backend=HOST_RANKS, timeout=limit), timeout)
    elif wanted == 1:
        return ALONE
    else:
        made = _met(dist, wanted, timeout, timeout if patience is None else patience)
    _joined.append(made)
    return made


def _met(dist: Any, wanted: int, timeout: float, patience: float) -> Joined:
    """A group with those whom the environment names."""
    from thalweg.parallel.launch import end_with_the_launcher

    end_with_the_launcher()
    try:
        store, rank, world = meet(dist, patience)
        limit = timedelta(seconds=timeout)
        patient = timedelta(seconds=max(timeout, patience))  # until all are there
        dist.init_process_group(HOST_RANKS, store=store, rank=rank, world_size=world, timeout=patient)
        words = dist.new_group(backend=HOST_RANKS, timeout=limit)  # a model's own collectives do not meet ours
    except (RuntimeError, ValueError) as err:
        words = _in_short(err)
        lost = RanksError(
            f"{wanted} ranks were to train together, and they did not meet.",
            words,
            "Start them with torchrun, or with thalweg train --ranks; or leave RANK and WORLD_SIZE unset.",
        )
        lost.lost = True
    else:
        made = Joined(words, timeout, store)
        atexit.register(made.part)
        return made
    raise lost
