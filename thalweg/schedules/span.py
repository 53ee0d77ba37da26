"""How long a run is, and how lengths are counted in it: updates, shares, examples, tokens, epochs."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from thalweg.core import RecipeError

Length = int | str | None

#: The units that a length may have, and the words for each.
UNITS = {
    "updates": ("updates", "update", "steps", "step"),
    "examples": ("examples", "example", "samples", "sample"),
    "tokens": ("tokens", "token"),
    "epochs": ("epochs", "epoch"),
}
_NUMBER = r"(\d+(?:\.\d*)?(?:[eE]\d+)?)\s?([kMG]?)"
_WORDS = "|".join(word for words in UNITS.values() for word in words)
_LENGTH = re.compile(rf"{_NUMBER}\s*({_WORDS})")
#: A length with a unit as it stands in a text without quotes, for ``parse``.
BARE = re.compile(rf"(?<!['\"\d.\w])({_NUMBER}\s+(?:{_WORDS})\b|\d+(?:\.\d+)?%)(?!['\"])")
_TIMES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Span:
    """A run, as a schedule sees it.

    Attributes:
        steps: updates in it.
        per_step: what one step takes of "examples", "tokens" and "epochs": a number, or one for each step where the batch
            size changes. What is missing cannot be counted in.
        why_not: for a unit that is missing, why, in a sentence.
    """

    steps: int
    per_step: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    why_not: Mapping[str, str] = field(default_factory=dict)

    def reach(self, begin: float, length: int | str) -> float:
        """Where a length that begins at ``begin`` ends, in updates; not rounded.

        Raises:
            RecipeError: for a unit that this run cannot count.
        """
        if isinstance(length, int):
            return begin + length
        if length.endswith("%"):
            return begin + self.steps * float(length[:-1]) / 100
        amount, unit = read_length(length)
        if unit == "updates":
            return begin + amount
        if unit not in self.per_step:
            known = ", ".join(["updates", "shares such as '5%'", *self.per_step])
            raise RecipeError(
                f"A schedule counts in {unit}: '{length}'.",
                self.why_not.get(unit, f"It is not known how many {unit} a step takes."),
                f"Count in what is known here: {known}.",
            )
        rate = self.per_step[unit]
        if isinstance(rate, (int, float)):
            return begin + amount / rate
        return self._search(unit, begin, amount)

    @property
    def varies(self) -> bool:
        """Whether a step takes now more of the data and now less."""
        return any(not isinstance(rate, (int, float)) for rate in self.per_step.values())

    def _search(self, unit: str, begin: float, amount: float) -> float:
        totals = self._totals[unit]
        whole = min(int(begin), len(totals) - 1)
        target = totals[whole] + (begin - whole) * self._rate(unit, whole) + amount
        place = bisect_left(totals, target)
        if place >= len(totals):
            return len(totals) - 1 + (target - totals[-1]) / self._rate(unit, len(totals) - 2)
        return place - (totals[place] - target) / self._rate(unit, place - 1)

    def _rate(self, unit: str, step: int) -> float:
        rates = self.per_step[unit]
        assert not isinstance(rates, (int, float))
        return rates[max(0, min(step, len(rates) - 1))]

    @cached_property
    def _totals(self) -> dict[str, list[float]]:
        return {
            unit: list(accumulate(rates, initial=0.0))
            for unit, rates in self.per_step.items()
            if not isinstance(rates, (int, float))
        }

    def part(self, first: int, steps: int) -> Span:
        """The stretch of ``steps`` updates from ``first`` on, as a run of its own."""
        rates = {
            unit: rate if isinstance(rate, (int, float)) else (rate[first : first + steps] or rate[-1:])
            for unit, rate in self.per_step.items()
        }
        return replace(self, steps=steps, per_step=rates)


def read_length(text: str) -> tuple[float, str]:
    """(amount, unit) of a length in words.

    >>> read_length("10k examples"), read_length("1.5 epochs"), read_length("20 steps")
    ((10000.0, 'examples'), (1.5, 'epochs'), (20.0, 'updates'))
    """
    found = _LENGTH.fullmatch(text)
    if found is None:
        raise ValueError(text)
    number, times, word = found.groups()
    return float(number) * _TIMES[times], next(unit for unit, words in UNITS.items() if word in words)


def is_length(length: object) -> bool:
    """Whether it is a length that can be counted: 1 update or more, a share up to 100 %, or an amount with a unit."""
    if isinstance(length, str):
        try:
            if length.endswith("%"):
                return 0 < float(length[:-1]) <= 100
            return 0 < read_length(length)[0] < 1e300
        except ValueError:
            return False
    return isinstance(length, int) and not isinstance(length, bool) and 1 <= length < 2**63
