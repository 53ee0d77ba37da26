"""From the lines of a record to the points of a chart: pure functions on pairs (step, value)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thalweg.core import Evaluation
from thalweg.report.folder import Line

Point = tuple[float, float]

_LARGEST = 1e300  # beyond it, differences between values overflow


def drawable(value: float) -> bool:
    """Whether a value has a place on an axis; what has none is a gap."""
    return abs(value) < _LARGEST


def downsample(points: Sequence[Point], limit: int = 800) -> list[Point]:
    """At most ``limit`` points: the first, the last, and the least and greatest of each equal part between them.

    A part without any drawable value becomes a gap.

    >>> downsample([(x, float(x % 7)) for x in range(100)], limit=4)
    [(0, 0.0), (6, 6.0), (7, 0.0), (99, 1.0)]
    """
    if len(points) <= limit:
        return list(points)
    inner, parts = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(parts):
        part = inner[i * len(inner) // parts : (i + 1) * len(inner) // parts]
        shown = [point for point in part if drawable(point[1])]
        if not shown:
            kept.append((part[0][0], math.nan))
            continue
        extremes = {min(shown, key=lambda p: p[1]), max(shown, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], width: int, limit: int = 400) -> list[Point]:
    """Means over ``width`` points on either side, at no more than ``limit`` + 1 places, the last point among them.

    At the beginning, where values fall fast, fewer points are taken, as many on one side as on the other.

    >>> smooth([(1, 0.0), (2, 3.0), (3, math.nan), (4, 5.0)], width=1)
    [(1, 0.0), (2, 1.5), (3, 4.0), (4, 5.0)]
    """
    if not points:
        return []
    places = [*range(0, len(points) - 1, math.ceil(len(points) / limit)), len(points) - 1]
    smoothed = []
    for place in places:
        reach = min(width, place)
        near = [y for _, y in points[place - reach : place + reach + 1] if drawable(y)]
        smoothed.append((points[place][0], math.fsum(near) / len(near) if near else math.nan))
    return smoothed


def attempts(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """The first step and the seconds of each process that the run took; seconds begin at 0 in each.

    The seconds of steps that were lost and done again are not in the record, hence not here.
    """
    found: list[tuple[int, float]] = []
    for line in lines:
        if not found or line.seconds < found[-1][1]:
            found.append((line.step, line.seconds))
        found[-1] = (found[-1][0], line.seconds)
    return found


def throughput(lines: Sequence[Line], least_seconds: float) -> list[Point]:
    """Weight a second, over windows of whole steps that last at least ``least_seconds``.

    Left out: the first step of each process, which warms up, and the time that evaluations took.
    """
    rates: list[Point] = []
    clock, weight, span = math.inf, 0.0, 0.0
    for line in lines:
        if isinstance(line, Evaluation):
            clock = line.seconds
            continue
        if line.seconds < clock:  # the first step of a process
            clock, weight, span = line.seconds, 0.0, 0.0
            continue
        weight, span, clock = weight + line.weight, span + line.seconds - clock, line.seconds
        if span >= least_seconds and span > 0:
            rates.append((line.step, weight / span))
            weight, span = 0.0, 0.0
    if not rates and span > 0:
        rates.append((lines[-1].step, weight / span))
    return rates


def window_seconds(lines: Sequence[Line], device: str) -> float:
    """How long a window of ``throughput`` should be: a hundredth of the run, within limits.

    An accelerator is given steps ahead of its work and waited for several times a second, so that only windows well
    above that say how fast it is.
    """
    if device.split(":")[0] != "cpu":
        return 1.0
    return min(1.0, max(0.005, sum(seconds for _, seconds in attempts(lines)) / 100))
