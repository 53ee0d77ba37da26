"""The batches of a run, and the clock: windows are timed where batches are drawn, the same for all frameworks.

A framework that prefetches, or runs several updates a call, draws earlier; over windows that follow each other this evens out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.speed.workloads import Workload, batches


class Stop(BaseException):
    """Ends the timed run from inside the feed. No ``Exception``, so that no framework takes it for a fault of the data."""


class Feed:
    """An iterable of micro-batches.

    Args:
        updates: how many; None: timed windows, each begun by a word of the driver, until it says another.
        say, hear: to the driver and from it.

    Attributes:
        items: the micro-batches; an adapter may put its own form of them there before it begins.
        wait: called at the end of a window by frameworks that run behind: waits for all that is queued.
        first: seconds since the epoch at which the first update was done; ``first_update`` notes it.
        note: what the framework has chosen itself, for the table.
    """

    def __init__(
        self, w: Workload, updates: int | None, say: Callable[..., None], hear: Callable[[], str], seconds: float = 0.0
    ) -> None:
        self.w, self.updates, self.say, self.hear = w, updates, say, hear
        self.seconds = seconds or w.seconds
        self.items: list[Any] = list(batches(w))
        self.wait: Callable[[], object] = lambda: None
        self.first, self.note = 0.0, ""
        self._begun = self._count = self._drawn = 0
        self._start = self._cpu = 0.0

    def first_update(self, *_: object) -> None:
        self.first = self.first or time.time()

    @property
    def limit(self) -> int:
        """Updates, for frameworks that ask for a number."""
        return self.updates or self.w.steps

    def __iter__(self) -> Iterator[Any]:
        items = itertools.cycle(self.items)
        if self.updates is not None:
            yield from itertools.islice(items, self.updates * self.w.accumulate)
            return
        while True:
            self.draw(1)
            for _ in range(self.w.accumulate):
                yield next(items)

    def draw(self, updates: int) -> None:
        """Data for so many updates is about to be taken; between two windows this waits for the driver."""
        now = time.perf_counter()
        if self._begun and now - self._start >= self.seconds:
            self.wait()
            took, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
            self.say("window", updates=self._count, seconds=took, cpu=cpu)
            self._begun = 0
        if not self._begun:
            if not self._drawn:
                self.say("ready")
            self._drawn = 1
            if self.hear() != "go":
                raise Stop
            self._begun, self._count = 1, 0
            self._start, self._cpu = time.perf_counter(), time.process_time()
        self._count += updates
