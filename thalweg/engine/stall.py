"""What part of its steps a run waits for data, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from thalweg.core import Feed, Recipe
from thalweg.data import feeds, items, streams

#: A person is told from this part of the time of steps on, once that is known of so many steps and seconds.
SHARE, _STEPS, _SECONDS = 0.05, 20, 1.0
_SMALL_BYTES = 1024  # of a sample: it is not its bytes that take long


class Stall:
    """Seconds that steps waited for their windows, counted from a run's second step on: the first wait starts workers.

    Attributes:
        last: seconds of the last wait.
        waited: of all waits.
    """

    def __init__(self) -> None:
        self.last = self.waited = 0.0
        self._first: float | None = None  # when the first window had come
        self._before = 0.0  # waited and spent until then
        self._num = 0
        self._told = False

    def timed(self, windows: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """The same windows; two looks at the clock for each."""
        while True:
            begun = perf_counter()
            window = next(windows, None)
            ended = perf_counter()
            self.last = ended - begun
            self.waited += self.last
            if window is None:
                return
            if self._first is None:
                self._first, self._before = ended, self.waited
            self._num += 1
            yield window

    def news(self, beside: float, advice: Callable[[], str]) -> str:
        """What a person should know, once; "" where there is nothing.

        Args:
            beside: seconds so far that went into neither steps nor waits.
            advice: what to do.
        """
        if self._told or self._first is None or self._num <= _STEPS:
            return ""
        seconds, waited = perf_counter() - self._first - beside, self.waited - self._before
        if seconds < _SECONDS or waited <= SHARE * seconds:
            return ""
        self._told = True
        each, num = 1e3 / (self._num - 1), self._num - 1
        return (
            f"{waited / seconds:.0%} of the time of {num} steps went into waiting for data: "
            f"{each * waited:.3g} of {each * seconds:.3g} ms a step. {advice()}"
        )


def advice(feed: Feed, recipe: Recipe) -> str:
    """What makes a step wait less for windows of this feed."""
    while (inner := getattr(feed, "feed", None)) is not None:
        feed = inner
    workers = recipe.data.workers
    if isinstance(feed, items.ItemFeed) and workers == 0:
        return "The data set is read between the steps: give data.workers=2 or more, or tensors in memory."
    if isinstance(feed, items.ItemFeed):
        return f"Its {workers} workers do not keep up: give more of them, do less in __getitem__, or give tensors in memory."
    if isinstance(feed, streams.StreamFeed):
        return "The stream is read between the steps: let it read ahead, as torchdata's StatefulDataLoader does by workers."
    if isinstance(feed, feeds.MemoryFeed) and feed.augment is not None:
        return "The data lies in memory and is augmented in batches: take transforms out of regularize.augment, or cheaper ones."
    if isinstance(feed, feeds.MemoryFeed) and feed.sample_bytes <= _SMALL_BYTES:
        return "The data lies in memory, and the steps are short beside gathering it: a larger train.batch makes less of it."
    return "The data lies in memory: gather less a sample, such as images of one byte a value, made float in the model."
