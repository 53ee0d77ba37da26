"""The shapes: each a pure function of the place within its piece. A value is a factor on the peak.

A piece of ``num`` updates is asked for the values at ``index`` 0 to ``num`` - 1. ``x`` runs over (0, 1] where another
piece came before (its last value was x = 0), and over [0, 1] where the schedule begins with this piece, so that the
first and the last value are always exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thalweg.core import Registry


@dataclass(frozen=True)
class Place:
    """Where a value is asked for.

    Attributes:
        index, num: position within the piece and the piece's length, in updates.
        x: position as a fraction; exactly 1 at the last update.
        begin: the value just before the piece.
        before: updates in the pieces before.
    """

    index: int
    num: int
    x: float
    begin: float
    before: int


@dataclass(frozen=True)
class Shape:
    """A registered shape: its function and what it says of itself."""

    name: str
    value: Callable[..., float]
    about: str


SHAPES: Registry[Shape] = Registry("schedule shape")


def shape(function: Callable[..., float]) -> Callable[..., float]:
    """Register a shape under its function's name; the first line of its docstring is its description."""
    SHAPES.add(function.__name__, Shape(function.__name__, function, (function.__doc__ or "").split("\n")[0]))
    return function


def _mix(a: float, b: float, share: float) -> float:
    """Exactly ``a`` at 0 and exactly ``b`` at 1, which a + (b - a)*share is not."""
    return (1.0 - share) * a + share * b


@shape
def warmup(at: Place, *, start: float = 0.0, zero_first: bool = False) -> float:
    """Linear rise to 1: (t + 1)/num, so that no update is wasted at rate 0; the peak is reached at its last update.

    Args:
        start: the value that the rise begins from, one update before the first.
        zero_first: take the update at ``start`` too (t/(num - 1)); a warm-up of one update is at 1 all the same.
    """
    share = at.index / (at.num - 1) if zero_first and at.num > 1 else (at.index + 1) / at.num
    return _mix(start, 1.0, share)


@shape
def hold(at: Place) -> float:
    """Stays where it is."""
    return at.begin


@shape
def constant(at: Place, *, value: float = 1.0) -> float:
    """One value throughout."""
    return value


@shape
def linear(at: Place, *, to: float = 0.0) -> float:
    """Straight line to ``to``."""
    return _mix(at.begin, to, at.x)


@shape
def cosine(at: Place, *, to: float = 0.0) -> float:
    """Half a cosine to ``to``: to + (begin - to)*(1 + cos(pi x))/2 (arXiv:1608.03983, without restarts)."""
    return to + (at.begin - to) * 0.5 * (1.0 + math.cos(math.pi * at.x))


@shape
def polynomial(at: Place, *, to: float = 0.0, power: float = 2.0) -> float:
    """to + (begin - to)*(1 - x)**power."""
    return float(to + (at.begin - to) * (1.0 - at.x) ** power)


@shape
def inverse_sqrt(at: Place, *, timescale: float = 0.0) -> float:
    """begin*sqrt(s/(s + t)), s being ``timescale`` or else the updates before (arXiv:1706.03762, section 5.3)."""
    scale = timescale or float(max(at.before, 1))
    updates = at.index + 1 if at.before else at.index
    return at.begin * math.sqrt(scale / (scale + updates))


def options_of(name: str) -> dict[str, Any]:
    """The options of a shape and their defaults, read off its signature."""
    import inspect

    parameters = inspect.signature(SHAPES[name].value).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
