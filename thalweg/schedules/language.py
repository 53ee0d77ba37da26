"""``warmup(100) >> cosine(to=0.1)``: pieces in a row, as Python objects or as text.

A schedule is a pure function of the number of applied updates. It knows no trainer, keeps no state, and is never stepped.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from thalweg.core import RecipeError, did_you_mean
from thalweg.schedules.shapes import SHAPES, Place, options_of

Length = int | str | None


@dataclass(frozen=True)
class Piece:
    """One shape over a length: a number of updates, a share of the run such as "5%", or (None) the rest."""

    shape: str
    length: Length
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        length = (
            [] if self.length is None else [f"'{self.length}'" if isinstance(self.length, str) else f"{self.length}"]
        )
        return f"{self.shape}({', '.join([*length, *(f'{k}={v}' for k, v in self.options)])})"


@dataclass(frozen=True)
class Schedule:
    """Pieces in a row. ``a >> b`` puts them together; each piece begins where the one before it ended.

    >>> from thalweg.schedules import warmup, cosine
    >>> [round(v, 3) for v in (warmup(2) >> cosine(to=0.1)).values(6)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """

    pieces: tuple[Piece, ...]

    def __rshift__(self, other: Schedule) -> Schedule:
        return Schedule(self.pieces + other.pieces)

    def __str__(self) -> str:
        return " >> ".join(map(str, self.pieces))

    def values(self, steps: int) -> list[float]:
        """The factor at each of ``steps`` updates. The last value of the last piece is exact, and held if steps remain.

        Raises:
            RecipeError: if the pieces are longer than the run, or one before the last has no length.
        """
        return list(_values(self, steps))

    def at(self, update: int, steps: int) -> float:
        """The factor for update ``update`` (from 0) of ``steps``; beyond the end, the last value."""
        return _values(self, steps)[min(update, steps - 1)]


@lru_cache(maxsize=16)
def _values(schedule: Schedule, steps: int) -> tuple[float, ...]:
    if steps < 1:
        raise RecipeError(f"A schedule over {steps} steps has no value.", "A run has at least 1.", "Give more steps.")
    values: list[float] = []
    lengths = _lengths(schedule, steps)
    known = sum(length or 0 for length in lengths)
    if known > steps:
        raise RecipeError(
            f"The schedule '{schedule}' is longer than the run.",
            f"Its pieces take {known} updates, the run has {steps}.",
            "Shorten a piece, give its length as a share such as '5%', or raise train.steps.",
        )
    for place, (piece, length) in enumerate(zip(schedule.pieces, lengths)):
        if length is None and place < len(lengths) - 1:
            raise RecipeError(
                f"'{piece}' has no length, and '{schedule.pieces[place + 1]}' comes after it.",
                f"Piece {place + 1} of {len(lengths)} in '{schedule}'.",
                f"Give it one, such as {piece.shape}(100) or {piece.shape}('10%').",
            )
        num = steps - len(values) if length is None else length
        value = SHAPES[piece.shape].value
        before, begin, options = len(values), values[-1] if values else 1.0, dict(piece.options)
        for index in range(num):
            x = (index + 1) / num if before else index / (num - 1) if num > 1 else 1.0
            values.append(float(value(Place(index, num, x, begin, before), **options)))
    return tuple(values + [values[-1] if values else 1.0] * (steps - len(values)))


def _lengths(schedule: Schedule, steps: int) -> list[int | None]:
    """Updates of each piece. Shares are rounded where they end, not one by one, so that 50% and 50% are the whole."""
    lengths: list[int | None] = []
    exact, begin = 0.0, 0
    for piece in schedule.pieces:
        if piece.length is None:
            lengths.append(None)
            continue
        if isinstance(piece.length, str):
            exact += steps * float(piece.length.removesuffix("%")) / 100
            end = min(max(begin + 1, round(exact)), max(steps, begin))
        else:
            exact += piece.length
            end = begin + piece.length
        lengths.append(end - begin)
        begin = end
    return lengths


def piece(name: str, length: Length = None, /, **options: Any) -> Schedule:
    """A schedule of one piece; its name, length and options are checked."""
    known = options_of(name)
    for key, value in options.items():
        if key not in known:
            raise RecipeError(
                f"{name}() takes no option '{key}'.", f"Given: {key}={value!r}.", did_you_mean(key, known)
            )
        if not _fits(key, value, known[key]):
            raise RecipeError(
                f"{name}({key}={_short(value)}) is not possible.",
                f"The default is {known[key]!r}.",
                "Give a finite value of the same kind; a power is above 0, all else 0 or above.",
            )
    _check_length(name, length)
    return Schedule((Piece(name, length, tuple(options.items())),))


def _fits(key: str, value: Any, default: Any) -> bool:
    """Whether an option is of its default's kind, finite, and in its range."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return False
    return value > 0 if key == "power" else value >= 0


def _short(value: Any) -> str:
    """For messages: Python refuses to print very long numbers."""
    return "..." if isinstance(value, int) and abs(value) > 2**63 else repr(value)[:80]


def _check_length(name: str, length: Length) -> None:
    ok = length is None or (isinstance(length, int) and not isinstance(length, bool) and 1 <= length < 2**63)
    if isinstance(length, str) and length.endswith("%"):
        try:
            ok = 0 < float(length[:-1]) <= 100
        except ValueError:
            ok = False
    if not ok:
        raise RecipeError(
            f"{name}({_short(length)}) has no length that can be counted.",
            "A length is a whole number of updates, or a share of the run.",
            f"Write {name}(100) or {name}('5%').",
        )


def _maker(name: str) -> Callable[..., Schedule]:
    def make(length: Length = None, **options: Any) -> Schedule:
        return piece(name, length, **options)

    make.__name__, make.__doc__ = name, SHAPES[name].about
    return make


warmup, hold, constant = _maker("warmup"), _maker("hold"), _maker("constant")
linear, cosine, polynomial, inverse_sqrt = map(_maker, ("linear", "cosine", "polynomial", "inverse_sqrt"))


def parse(text: str | Schedule) -> Schedule:
    """Read the schedule language; percent lengths may stand without quotes: ``warmup(5%)``.

    >>> str(parse("warmup(5%) >> cosine(to=0.1)"))
    "warmup('5%') >> cosine(to=0.1)"
    """
    if isinstance(text, Schedule):
        return text
    import re

    quoted = re.sub(r"(?<!['\"\d.])(\d+(?:\.\d+)?%)(?!['\"])", r"'\1'", text)
    try:
        return _read(ast.parse(quoted.strip(), mode="eval").body, text)
    except RecipeError:
        raise
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise _unreadable(text, "It is not an expression.") from None


def _unreadable(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"The schedule {text[:200]!r} cannot be read.",
        why,
        "Write pieces in a row, such as 'warmup(100) >> cosine(to=0.1)'.",
    )


def _read(node: ast.expr, text: str) -> Schedule:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _read(node.left, text) >> _read(node.right, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) <= 1:
        if len({k.arg for k in node.keywords}) < len(node.keywords):
            raise _unreadable(text, f"An option of {node.func.id} is given twice.")
        try:
            lengths = [ast.literal_eval(arg) for arg in node.args]
            options = {k.arg or "**": ast.literal_eval(k.value) for k in node.keywords}
        except (ValueError, TypeError):
            raise _unreadable(text, f"The arguments of {node.func.id} are not plain values.") from None
        return piece(node.func.id, *lengths, **options)
    raise _unreadable(text, f"'{ast.unparse(node)[:80]}' is not a piece.")
