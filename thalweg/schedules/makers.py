"""Pieces by name, checked; and what is built of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thalweg.core import RecipeError, did_you_mean
from thalweg.schedules.language import First, Piece, Repeat, Schedule
from thalweg.schedules.shapes import LENGTHS, SHAPES, options_of
from thalweg.schedules.span import Length, is_length


def piece(name: str, length: Length = None, /, **options: Any) -> Schedule:
    """A schedule of one piece; its name, length and options are checked."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if "." not in name:
        known = options_of(name)
        for key, value in options.items():
            if key not in known:
                raise RecipeError(
                    f"{name}() takes no option '{key}'.", f"Given: {key}={value!r}.", did_you_mean(key, known)
                )
            if not _fits(name, key, value, known[key]):
                raise RecipeError(
                    f"{name}({key}={short(value)}) is not possible.",
                    f"The default is {known[key]!r}.",
                    "Give a finite value of the same kind; a power, and what a decay ends at, is above 0; all else 0 or above.",
                )
    check_length(name, length)
    return Schedule((Piece(name, length, tuple(options.items())),))


#: Options that lie in an interval of their own: (above, below).
_RANGES = {"power": (0.0, 1e300), "rise": (0.0, 1.0), "longer": (0.0, 1e300)}
_COUNTS = ("patience", "times")


def _fits(name: str, key: str, value: Any, default: Any) -> bool:
    """Whether an option is of its default's kind, finite, and in its range."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(is_length(one) for one in value)
    if isinstance(value, str):
        return key in LENGTHS and is_length(value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return False
    if isinstance(default, int) and not isinstance(value, int):
        return False
    listens = bool(SHAPES[name].feedback)
    if key in _RANGES or (name == "exponential" and key == "to") or (listens and key == "factor"):
        low, high = _RANGES.get(key, (0.0, 1.0 if listens else 1e300))
        return low < value < high
    if key == "smooth":
        return 0 <= value < 1
    if name == "cyclic" and key == "factor":
        return 0 <= value <= 1
    if key in _COUNTS or (name in ("decay", "step") and key == "every"):
        return value >= 1
    return value >= 0


def short(value: Any) -> str:
    """For messages: Python refuses to print very long numbers."""
    return "..." if isinstance(value, int) and abs(value) > 2**63 else repr(value)[:80]


def check_length(name: str, length: Length) -> None:
    if length is not None and not is_length(length):
        raise RecipeError(
            f"{name}({short(length)}) has no length that can be counted.",
            "A length is a whole number of updates, a share of the run, or an amount in updates, examples, tokens or epochs.",
            f"Write {name}(100), {name}('5%') or {name}('2 epochs').",
        )


def _maker(name: str) -> Callable[..., Schedule]:
    def make(length: Length = None, **options: Any) -> Schedule:
        return piece(name, length, **options)

    make.__name__, make.__doc__ = name, SHAPES[name].about
    return make


warmup, hold, constant = _maker("warmup"), _maker("hold"), _maker("constant")
linear, cosine, polynomial, inverse_sqrt = map(_maker, ("linear", "cosine", "polynomial", "inverse_sqrt"))
exponential, decay, step, multistep = map(_maker, ("exponential", "decay", "step", "multistep"))
power, cooldown, rex, one_cycle = map(_maker, ("power", "cooldown", "rex", "one_cycle"))
cyclic, restarts, plateau, loss_plateau = map(_maker, ("cyclic", "restarts", "plateau", "loss_plateau"))


def wsd(*, warm: Length = "5%", cool: Length = "20%", to: float = 0.0) -> Schedule:
    """Warm-up, stable, decay (arXiv:2404.06395, 2405.18392): warmup(warm) >> hold() >> cooldown(cool, to=to)."""
    return warmup(warm) >> hold() >> cooldown(cool, to=to)


def repeat(
    what: Schedule, length: Length = None, *, times: int = 0, every: int | str = 0, factor: float = 1.0
) -> Schedule:
    """``what`` over and over, each time begun anew; shares such as "5%" in it are shares of one time.

    Args:
        length: of all together; None: the rest of the run.
        times: how often; or
        every: the length of one time; the last one is cut where the length ends.
        factor: each time is multiplied by so much more.

    >>> repeat(linear(to=0.5), times=2).values(6)
    [1.0, 0.75, 0.5, 1.0, 0.75, 0.5]
    """
    check_length("repeat", length)
    ok = isinstance(times, int) and isinstance(factor, (int, float)) and not isinstance(times, bool)
    if not isinstance(what, Schedule) or not ok or times < 0 or not 0 <= factor < 1e300:
        raise RecipeError(
            "repeat() takes a schedule, a number of times and a factor.",
            f"Given: times={short(times)}, factor={short(factor)}.",
            "Write repeat(cosine(), times=3).",
        )
    if bool(times) == bool(every) or (every and not is_length(every)):
        raise RecipeError(
            "repeat() is told how often, or how long each time is.",
            f"Given: times={short(times)}, every={short(every)}.",
            "Write repeat(cosine(), times=3) or repeat(cosine(), every=100).",
        )
    return Schedule((Repeat(what, length, times, every, float(factor)),))


_LONGEST = 10**8  # updates; what ``first`` leaves out is laid out too


def first(what: Schedule, length: int, *, of: int) -> Schedule:
    """The first ``length`` updates of a schedule laid out over ``of`` updates."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (length, of))
    if not isinstance(what, Schedule) or not whole or not 1 <= length <= of <= _LONGEST:
        raise RecipeError(
            "first() takes a schedule, and how many of its updates.",
            f"Given: {short(length)} of {short(of)}.",
            "Write first(cosine(), 60, of=100).",
        )
    return Schedule((First(what, length, of),))


#: What is built of the shapes, and takes schedules or makes several pieces.
COMPOSITIONS: dict[str, Callable[..., Schedule]] = {"wsd": wsd, "repeat": repeat, "first": first}
