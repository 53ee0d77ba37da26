"""``warmup(100) >> cosine(to=0.1)``: pieces in a row, as Python objects.

A schedule is a pure function of the number of applied updates. It knows no trainer, keeps no state, and is never stepped.
Two pieces listen to the run (``plateau``, ``loss_plateau``); what they have found is state of the run, not of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from thalweg.core import RecipeError
from thalweg.schedules.shapes import LENGTHS, SHAPES, Place, options_of
from thalweg.schedules.span import Length, Span

#: Schedules of others, by the word before the dot: ``make(name, options, updates)`` gives their values.
FOREIGN: dict[str, Callable[[str, Mapping[str, Any], int], Sequence[float]]] = {}


@dataclass(frozen=True)
class Listening:
    """A piece whose value hangs on what the run finds, and from which update up to which it listens."""

    shape: str
    kind: str
    options: Mapping[str, Any]
    first: int
    stop: int


class _Laying:
    """What laying out has found so far; values are appended piece by piece."""

    def __init__(
        self, span: Span, peak: float, *, offset: int = 0, before: int = 0, listening: list[Listening] | None = None
    ) -> None:
        self.span, self.peak, self.offset, self.before = span, peak, offset, before
        self.values: list[float] = []
        self.listening = [] if listening is None else listening

    @property
    def begin(self) -> float:
        return self.values[-1] if self.values else self.peak

    def within(self, num: int, *, anew: bool = True) -> _Laying:
        """For the next ``num`` updates, as a run of their own; not ``anew``: one that knows what came before."""
        here = len(self.values)
        before = 0 if anew else self.before + here
        offset = self.offset + here
        return _Laying(self.span.part(here, num), self.peak, offset=offset, before=before, listening=self.listening)


@dataclass(frozen=True)
class Piece:
    """One shape over a length: updates, a share of the run such as "5%", an amount such as "3 epochs", or (None) the rest."""

    shape: str
    length: Length
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.shape}({', '.join([*_written(self.length), *(f'{k}={v!r}' for k, v in self.options)])})"

    def lay(self, on: _Laying, num: int) -> None:
        before, begin = on.before + len(on.values), on.begin
        if "." in self.shape:
            on.values += _foreign(self, num, begin)
            return
        shape = SHAPES[self.shape]
        if shape.feedback:
            first = on.offset + len(on.values)
            given = {**options_of(self.shape), **dict(self.options)}
            on.listening.append(Listening(self.shape, shape.feedback, given, first, first + num))
        options = {f"{k}_" if k == "at" else k: _counted(k, v, on) for k, v in self.options}
        for index in range(num):
            x = (index + 1) / num if before else index / (num - 1) if num > 1 else 1.0
            on.values.append(float(shape.value(Place(index, num, x, begin, before, on.peak), **options)))


@dataclass(frozen=True)
class Product:
    """Schedules that are multiplied, update by update, and a number."""

    factors: tuple[Schedule, ...]
    scale: float = 1.0

    @property
    def length(self) -> Length:
        return None

    def __str__(self) -> str:
        scale = [] if self.scale == 1 else [repr(self.scale)]
        return " * ".join([*scale, *(str(f) if len(f.pieces) == 1 else f"({f})" for f in self.factors)])

    def lay(self, on: _Laying, num: int) -> None:
        products = [self.scale] * num
        for factor in self.factors:
            mine = on.within(num, anew=False)
            _lay(factor, mine, num)
            products = [a * b for a, b in zip(products, mine.values)]
        on.values += products


@dataclass(frozen=True)
class Repeat:
    """A schedule over and over; each time it begins anew, as a run of its own."""

    what: Schedule
    length: Length = None
    times: int = 0
    every: int | str = 0
    factor: float = 1.0

    def __str__(self) -> str:
        counted = [f"times={self.times}"] if self.times else [f"every={self.every!r}"]
        scaled = [] if self.factor == 1 else [f"factor={self.factor!r}"]
        return f"repeat({', '.join([str(self.what), *_written(self.length), *counted, *scaled])})"

    def lay(self, on: _Laying, num: int) -> None:
        if self.times:
            ends = [round(num * k / self.times) for k in range(1, self.times + 1)]
        else:
            each = max(1, round(on.span.part(len(on.values), num).reach(0.0, self.every)))
            ends = list(range(each, num + each, each))
        begin, start = 0, len(on.values)
        for number, end in enumerate(ends):
            mine = on.within(end - begin)
            if end > begin:
                _lay(self.what, mine, end - begin)
            on.values += [value * self.factor**number for value in mine.values]
            begin = end
        del on.values[start + num :]


@dataclass(frozen=True)
class First:
    """The first ``length`` updates of a schedule that was laid out over ``of``: what a run that goes on elsewhere had."""

    what: Schedule
    length: int
    of: int

    def __str__(self) -> str:
        return f"first({self.what}, {self.length}, of={self.of})"

    def lay(self, on: _Laying, num: int) -> None:
        mine = on.within(self.of)
        known = len(on.listening)
        _lay(self.what, mine, self.of)
        on.listening[known:] = [replace(one, stop=min(one.stop, mine.offset + num)) for one in on.listening[known:]]
        on.values += mine.values[:num]


Part = Piece | Product | Repeat | First


@dataclass(frozen=True)
class Schedule:
    """Pieces in a row. ``a >> b`` puts them together; each piece begins where the one before it ended.

    ``a * b`` and ``0.5 * a`` multiply; ``repeat`` takes a schedule over and over.

    >>> from thalweg.schedules import warmup, cosine
    >>> [round(v, 3) for v in (warmup(2) >> cosine(to=0.1)).values(6)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """

    pieces: tuple[Part, ...]

    def __rshift__(self, other: Schedule) -> Schedule:
        return Schedule(self.pieces + other.pieces)

    def __mul__(self, other: Schedule | float) -> Schedule:
        if isinstance(other, Schedule):
            mine, theirs = self._product(), other._product()
            return Schedule((Product(mine.factors + theirs.factors, mine.scale * theirs.scale),))
        if isinstance(other, bool) or not isinstance(other, (int, float)) or not 0 <= other < 1e300:
            raise RecipeError(
                f"A schedule cannot be multiplied by {other!r}.",
                "A factor is 0 or more.",
                "Give a number or a schedule.",
            )
        mine = self._product()
        scale = mine.scale * float(other)
        return mine.factors[0] if scale == 1 and len(mine.factors) == 1 else Schedule((Product(mine.factors, scale),))

    __rmul__ = __mul__

    def _product(self) -> Product:
        only = self.pieces[0]
        return only if len(self.pieces) == 1 and isinstance(only, Product) else Product((self,))

    def __str__(self) -> str:
        return " >> ".join(map(str, self.pieces))

    @property
    def feedback(self) -> set[str]:
        """What its pieces listen for, where any do: "evaluation", "loss"."""
        found: set[str] = set()
        for part in self.pieces:
            if isinstance(part, Piece):
                found |= set() if "." in part.shape else {SHAPES[part.shape].feedback} - {""}
            else:
                inner = part.factors if isinstance(part, Product) else (part.what,)
                found = found.union(*(schedule.feedback for schedule in inner))
        return found

    def values(self, span: int | Span, *, peak: float = 1.0) -> list[float]:
        """The value at each update of a run. The last value of the last piece is exact, and held if updates remain.

        Args:
            span: the run, or only its length in updates; lengths in other units need a ``Span``.
            peak: what a warm-up rises to, and where a schedule begins that has none.

        Raises:
            RecipeError: if the pieces are longer than the run, or it cannot count in one of their units.
        """
        return list(self._laid(span, peak)[0])

    def at(self, update: int, span: int | Span, *, peak: float = 1.0) -> float:
        """The value at update ``update`` (from 0); beyond the end, the last value."""
        values = self._laid(span, peak)[0]
        return values[min(update, len(values) - 1)]

    def listening(self, span: int | Span) -> tuple[Listening, ...]:
        """The pieces that listen to the run, in order."""
        return self._laid(span, 1.0)[1] if self.feedback else ()

    def in_updates(self, span: Span) -> Schedule:
        """The same schedule over ``span``, its lengths counted in updates, so that another run lays it out alike."""
        return _in_updates(self, span, span.steps, 0)

    def _laid(self, span: int | Span, peak: float) -> tuple[tuple[float, ...], tuple[Listening, ...]]:
        if isinstance(span, int):
            return _of_updates(self, span, peak)
        return _values(self, span, peak)


def _values(schedule: Schedule, span: Span, peak: float) -> tuple[tuple[float, ...], tuple[Listening, ...]]:
    if span.steps < 1:
        raise RecipeError(
            f"A schedule over {span.steps} steps has no value.", "A run has at least 1.", "Give more steps."
        )
    on = _Laying(span, peak)
    try:
        _lay(schedule, on, span.steps)
        fine = all(math.isfinite(value) for value in on.values)
    except (OverflowError, ZeroDivisionError):
        fine = False
    if not fine:
        raise RecipeError(
            f"The schedule '{str(schedule)[:200]}' leaves the range of numbers.",
            f"Over {span.steps} updates one of its values is not finite.",
            "Lower a factor or a power.",
        )
    return tuple(on.values), tuple(on.listening)


@lru_cache(maxsize=32)
def _of_updates(schedule: Schedule, steps: int, peak: float) -> tuple[tuple[float, ...], tuple[Listening, ...]]:
    return _values(schedule, Span(steps), peak)


def _lay(schedule: Schedule, on: _Laying, num: int) -> None:
    """All pieces in a row over ``num`` updates; what is left at the end holds the last value."""
    for part, length in zip(schedule.pieces, _lengths(schedule, on.span, num)):
        if length:
            part.lay(on, length)
    on.values += [on.begin] * (num - len(on.values))


def _lengths(schedule: Schedule, span: Span, steps: int) -> list[int]:
    """Updates of each piece. Ends are rounded, not lengths, so that 50% and 50% are the whole. Pieces without a length
    share equally what the others leave. Where a step takes now more of the data and now less, how many updates an amount is
    hangs on where its piece begins, and that on how long the pieces are: they are measured until both agree."""
    lengths = _measured(schedule, span, steps, None)
    for _ in range(_ROUNDS if span.varies and None in [part.length for part in schedule.pieces] else 0):
        again = _measured(schedule, span, steps, lengths)
        if again == lengths:
            break
        lengths = again
    return lengths


_ROUNDS = 64


def _measured(schedule: Schedule, span: Span, steps: int, before: Sequence[int] | None) -> list[int]:
    """The lengths, given those of the round before for the pieces that share the rest."""
    known: list[int | None] = []
    exact, begin, shift = 0.0, 0, 0
    for place, part in enumerate(schedule.pieces):
        if part.length is None:
            known.append(None)
            shift += 0 if before is None else before[place]
            continue
        exact = span.reach(exact + shift, part.length) - shift
        end = begin + part.length if isinstance(part.length, int) else max(begin + 1, round(exact))
        if isinstance(part.length, str) and part.length.endswith("%"):
            end = min(end, max(steps, begin))
        known.append(end - begin)
        begin = end
    taken = max(begin, math.ceil(exact - 1e-6 * steps))
    if taken > steps:
        raise RecipeError(
            f"The schedule '{schedule}' is longer than the run.",
            f"Its pieces take {taken} updates, the run has {steps}.",
            "Shorten a piece, give its length as a share such as '5%', or raise train.steps.",
        )
    rests = sum(length is None for length in known)
    shares = [round((steps - begin) * k / rests) for k in range(rests + 1)] if rests else []
    free = iter(b - a for a, b in zip(shares, shares[1:]))
    return [next(free) if length is None else length for length in known]


def _in_updates(schedule: Schedule, span: Span, num: int, before: int) -> Schedule:
    parts: list[Part] = []
    begin = 0
    for part, length in zip(schedule.pieces, _lengths(schedule, span, num)):
        if not length:
            continue
        here = span.part(begin, length)
        if isinstance(part, Piece):
            on = _Laying(span, 1.0, before=before)
            on.values = [1.0] * begin
            options = tuple((name, _counted(name, value, on)) for name, value in part.options)
            parts.append(Piece(part.shape, length, options))
        elif isinstance(part, Product):
            factors = tuple(_in_updates(factor, here, length, before + begin) for factor in part.factors)
            parts.append(Product(factors, part.scale))
        elif isinstance(part, Repeat):
            every = part.every and max(1, round(here.reach(0.0, part.every)))
            parts.append(Repeat(part.what, length, part.times, every, part.factor))
        else:
            parts.append(part)
        begin += length
    return Schedule(tuple(parts))


def _counted(name: str, value: Any, on: _Laying) -> Any:
    """Options that are lengths, in updates: ``every`` from here on, ``at`` from the beginning of the run."""
    if name not in LENGTHS:
        return value
    if isinstance(value, tuple):
        return tuple(round(on.span.reach(0.0, one)) for one in value)
    return value if value == 0 else max(1, round(on.span.reach(float(len(on.values)), value)) - len(on.values))


def _foreign(piece: Piece, num: int, begin: float) -> list[float]:
    room, _, name = piece.shape.partition(".")
    if room not in FOREIGN:
        raise RecipeError(
            f"'{piece.shape}' names a schedule of {room}, and none are known here.",
            f"Known: {', '.join(FOREIGN) or 'none'}.",
            "Import thalweg.optim for those of torch.",
        )
    return [begin * value for value in FOREIGN[room](name, dict(piece.options), num)]


def _written(length: Length) -> list[str]:
    return [] if length is None else [repr(length)]
