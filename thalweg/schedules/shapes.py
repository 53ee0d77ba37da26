"""The shapes: each a pure function of the place within its piece. A value is a factor on the peak.

A piece of ``num`` updates is asked for the values at ``index`` 0 to ``num`` - 1. ``x`` runs over (0, 1] where another
piece came before (its last value was x = 0), and over [0, 1] where the schedule begins with this piece, so that the
first and the last value are always exact.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from thalweg.core import Registry


@dataclass(slots=True)  # not frozen: one is made for each update
class Place:
    """Where a value is asked for.

    Attributes:
        index, num: position within the piece and the piece's length, in updates.
        x: position as a fraction; exactly 1 at the last update.
        begin: the value just before the piece.
        before: updates in the pieces before.
        peak: what a warm-up rises to: 1 for a factor, the recipe's value where a schedule gives the value itself.
    """

    index: int
    num: int
    x: float
    begin: float
    before: int
    peak: float = 1.0


@dataclass(frozen=True)
class Shape:
    """A registered shape: its function, what it says of itself, its formula, and whether it listens.

    Attributes:
        feedback: "evaluation" or "loss" for a shape whose value hangs on what the run finds; its function is then the
            value as long as nothing has been found.
    """

    name: str
    value: Callable[..., float]
    about: str
    formula: str = ""
    feedback: str = ""


SHAPES: Registry[Shape] = Registry("schedule shape")

#: Options that are lengths, or lists of lengths, and come to a shape as updates.
LENGTHS = ("every", "at")


def shape(function: Callable[..., float], *, formula: str = "", feedback: str = "") -> Callable[..., float]:
    """Register a shape under its function's name; the first line of its docstring is its description."""
    about = (function.__doc__ or "").split("\n")[0]
    SHAPES.add(function.__name__, Shape(function.__name__, function, about, formula, feedback))
    return function


def _shape(formula: str, feedback: str = "") -> Callable[[Callable[..., float]], Callable[..., float]]:
    return lambda function: shape(function, formula=formula, feedback=feedback)


def _mix(a: float, b: float, share: float) -> float:
    """Exactly ``a`` at 0 and exactly ``b`` at 1, which a + (b - a)*share is not."""
    return (1.0 - share) * a + share * b


def _halved(share: float) -> float:
    """From 0 to 1 along half a cosine."""
    return 0.5 * (1.0 - math.cos(math.pi * share))


@_shape("start + (peak - start)*t/n")
def warmup(at: Place, *, start: float = 0.0, zero_first: bool = False) -> float:
    """Linear rise to 1: (t + 1)/num, so that no update is wasted at rate 0; the peak is reached at its last update.

    Args:
        start: the value that the rise begins from, one update before the first.
        zero_first: take the update at ``start`` too (t/(num - 1)); a warm-up of one update is at 1 all the same.
    """
    share = at.index / (at.num - 1) if zero_first and at.num > 1 else (at.index + 1) / at.num
    return _mix(start, at.peak, share)


@_shape("begin")
def hold(at: Place) -> float:
    """Stays where it is."""
    return at.begin


@_shape("value")
def constant(at: Place, *, value: float = 1.0) -> float:
    """One value throughout."""
    return value


@_shape("begin + (to - begin)*x")
def linear(at: Place, *, to: float = 0.0) -> float:
    """Straight line to ``to``."""
    return _mix(at.begin, to, at.x)


@_shape("to + (begin - to)*(1 + cos(pi*x))/2")
def cosine(at: Place, *, to: float = 0.0) -> float:
    """Half a cosine to ``to``: to + (begin - to)*(1 + cos(pi x))/2 (arXiv:1608.03983, without restarts)."""
    return to + (at.begin - to) * 0.5 * (1.0 + math.cos(math.pi * at.x))


@_shape("to + (begin - to)*(1 - x)^power")
def polynomial(at: Place, *, to: float = 0.0, power: float = 2.0) -> float:
    """to + (begin - to)*(1 - x)**power."""
    return float(to + (at.begin - to) * (1.0 - at.x) ** power)


@_shape("begin*(to/begin)^x")
def exponential(at: Place, *, to: float = 0.01) -> float:
    """The same factor at every update, so that the piece ends at ``to``, above 0."""
    return at.begin if at.begin == 0 else to if at.x == 1 else float(at.begin * (to / at.begin) ** at.x)


@_shape("begin*factor^(t/every)")
def decay(at: Place, *, factor: float = 0.95, every: int = 1) -> float:
    """Times ``factor`` each ``every`` updates, smoothly in between; it ends wherever the run does."""
    return float(at.begin * factor ** (_updates(at) / every))


@_shape("begin*factor^floor(t/every)")
def step(at: Place, *, factor: float = 0.1, every: int = 1) -> float:
    """Times ``factor`` each ``every`` updates, in steps."""
    return float(at.begin * factor ** (at.index // every))


@_shape("begin*factor^(milestones behind)")
def multistep(at: Place, *, factor: float = 0.1, at_: Sequence[int] = ()) -> float:
    """Times ``factor`` at each of the places ``at``, which count from the beginning of the run."""
    return float(at.begin * factor ** sum(place <= at.before + at.index for place in at_))


@_shape("begin*sqrt(s/(s + t))")
def inverse_sqrt(at: Place, *, timescale: float = 0.0) -> float:
    """begin*sqrt(s/(s + t)), s being ``timescale`` or else the updates before (arXiv:1706.03762, section 5.3)."""
    scale = timescale or float(max(at.before, 1))
    return at.begin * math.sqrt(scale / (scale + _updates(at)))


@_shape("begin*(s/(s + t))^power")
def power(at: Place, *, power: float = 1.0, timescale: float = 0.0) -> float:
    """A power law; power=1 is inverse time decay, power=0.5 the inverse square root (arXiv:2408.13359 has others)."""
    scale = timescale or float(max(at.before, 1))
    return float(at.begin * (scale / (scale + _updates(at))) ** power)


@_shape("to + (begin - to)*(1 - x^power)")
def cooldown(at: Place, *, to: float = 0.0, power: float = 0.5) -> float:
    """The end of warm-up, stable, decay: 1 - sqrt(x) (arXiv:2405.18392); power=1 is a straight line."""
    return float(to + (at.begin - to) * (1.0 - at.x**power))


@_shape("to + (begin - to)*(1 - x)/(1 - x/2)")
def rex(at: Place, *, to: float = 0.0) -> float:
    """Slow first, steep at the end: reflected exponential (arXiv:2107.04197)."""
    return to + (at.begin - to) * (1.0 - at.x) / (1.0 - at.x / 2.0)


@_shape("start to peak over `rise`, then to `to`")
def one_cycle(at: Place, *, start: float = 0.04, to: float = 4e-6, rise: float = 0.3, straight: bool = False) -> float:
    """Up, then far down, along half cosines or straight lines (arXiv:1708.07120); the peak is at ``rise`` of the piece.

    Args:
        start: first value.
        to: last value.
        rise: share of the piece that rises, in (0, 1).
        straight: lines instead of half cosines.
    """
    top = rise * at.num - 1.0
    up = at.index / top if top > 0 else 1.0
    down = (at.index - top) / (at.num - 1.0 - top) if at.num - 1.0 > top else 1.0
    first, last, share = (start, at.peak, up) if at.index <= top else (at.peak, to, down)
    return _mix(first, last, share if straight else _halved(share))


@_shape("low + (peak - low)*triangle(t/every)*factor^cycle")
def cyclic(at: Place, *, every: int = 0, low: float = 0.1, factor: float = 1.0) -> float:
    """Up to the peak and down to ``low``, over and over (arXiv:1506.01186).

    Args:
        every: updates in a cycle; 0: the whole piece is one.
        low: first value, and the lowest.
        factor: on the height of each next cycle; 0.5 is "triangular2".
    """
    cycle, place = divmod(at.index, every or at.num)
    height = 1.0 - abs(2.0 * place / (every or at.num) - 1.0)
    return _mix(low, at.peak, height * factor**cycle)


@_shape("to + (peak*factor^i - to)*(1 + cos(pi*x_i))/2")
def restarts(
    at: Place, *, every: int = 0, times: int = 1, longer: float = 1.0, factor: float = 1.0, to: float = 0.0
) -> float:
    """Half cosines to ``to``, each from the peak anew (SGDR, arXiv:1608.03983).

    Args:
        every: updates in the first cycle; 0: as long as ``times`` cycles fill the piece.
        times: cycles, where ``every`` is 0.
        longer: each cycle is so many times as long as the one before.
        factor: each cycle's peak is so much of the one before.
        to: the value at the end of each cycle.
    """
    first, stop, number = _cycle(at.index, at.num, every, times, longer)
    top = at.peak * factor**number
    if first == 0 and at.before:  # the piece before has taken the peak
        x = (at.index + 1) / stop
    else:
        x = (at.index - first) / (stop - first - 1) if stop - first > 1 else 1.0
    return to + (top - to) * 0.5 * (1.0 + math.cos(math.pi * x))


def _cycle(index: int, num: int, every: int, times: int, longer: float) -> tuple[int, int, int]:
    """(first update, update after the last, number) of the cycle that ``index`` lies in."""
    ends = _cycle_ends(num, every, times, longer)
    number = bisect_right(ends, index)
    first = ends[number - 1] if number else 0
    return first, ends[number], number


@lru_cache(maxsize=8)
def _cycle_ends(num: int, every: int, times: int, longer: float) -> list[int]:
    """The update after the last one of each cycle, up to where the piece ends; each cycle has at least one."""
    length = float(every or num / sum(longer**k for k in range(max(1, times))))
    end = length
    ends = [max(1, round(end))]
    while ends[-1] <= num:
        length = max(length * longer, 1.0)
        end += length
        ends.append(max(ends[-1] + 1, round(end)))
    return ends


@_shape("begin; times factor when evaluations stop improving", feedback="evaluation")
def plateau(
    at: Place, *, factor: float = 0.1, patience: int = 3, min_delta: float = 0.0, rest: int = 0, least: float = 0.0
) -> float:
    """Holds; times ``factor`` after ``patience`` evaluations in a row without improvement.

    Args:
        factor: in (0, 1).
        patience: evaluations without improvement; with 2, the second one lowers the value.
        min_delta: what counts as better: by more than this.
        rest: evaluations after a fall that are not counted.
        least: the product of all falls is never below this.
    """
    return at.begin


@_shape("begin; times factor when the smoothed training loss stops falling", feedback="loss")
def loss_plateau(
    at: Place,
    *,
    factor: float = 0.5,
    patience: int = 200,
    min_delta: float = 0.0,
    rest: int = 0,
    least: float = 0.0,
    smooth: float = 0.98,
) -> float:
    """Holds; times ``factor`` after ``patience`` updates in a row without a lower smoothed training loss.

    Args:
        factor, min_delta, rest, least: as for ``plateau``, counted in updates.
        smooth: decay of the running mean of the loss, in [0, 1).
    """
    return at.begin


def _updates(at: Place) -> int:
    """Updates since the value ``begin`` was taken."""
    return at.index + 1 if at.before else at.index


def options_of(name: str) -> dict[str, Any]:
    """The options of a shape and their defaults, read off its signature."""
    parameters = inspect.signature(SHAPES[name].value).parameters.values()
    return {p.name.rstrip("_"): p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
