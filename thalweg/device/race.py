"""Which of several ways of doing one thing is fastest: taken in turn, the slow ones given up early."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Way = TypeVar("Way", bound=Hashable)

_MOST_ROUNDS = 25
#: A way is given up when it is this many times slower than the best: after its first run, which may have to build what it
#: needs, after its second, and after later ones.
_GIVEN_UP = (20.0, 1.6, 1.25)


def race(ways: Sequence[Way], run: Callable[[Way], float], budget_s: float) -> dict[Way, float]:
    """Seconds of one run of each way: the mean of the faster half of its runs, as others' work on the machine only ever adds.

    Args:
        run: runs once and tells its seconds. The first run of each way is a warm-up: it counts only where it is the only one.
        budget_s: no round begins after so many seconds; two are always made.
    """
    begun = time.perf_counter()
    times: dict[Way, list[float]] = {way: [] for way in ways}
    left = list(ways)
    for number in range(_MOST_ROUNDS):
        if number > 1 and (len(left) == 1 or time.perf_counter() - begun > budget_s):
            break
        for way in left:
            times[way].append(run(way))
        best = min(_typical(times[way]) for way in left)
        limit = _GIVEN_UP[min(number, len(_GIVEN_UP) - 1)] * best
        left = [way for way in left if _typical(times[way]) <= limit]
    return {way: _typical(found) for way, found in times.items()}


def _typical(seconds: list[float]) -> float:
    counted = sorted(seconds[1:] or seconds)
    faster = counted[: (len(counted) + 1) // 2]
    return sum(faster) / len(faster)


def simplest(found: dict[Way, float], changes: Callable[[Way], int], gain: float) -> Way:
    """The way with the fewest ``changes`` that no other is ``gain`` times as fast as; among equals the fastest."""
    best = min(found.values())
    near = [way for way, seconds in found.items() if seconds == best or seconds / best < gain]
    return min(near, key=lambda way: (changes(way), found[way]))
