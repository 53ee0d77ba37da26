"""Axes: the range of a chart, where its ticks stand, and what is written at them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thalweg.report.series import drawable

_WIDE = 100.0  # greatest over least, from which on an axis that may be logarithmic is


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic; ``whole`` axes count things and have no ticks between whole numbers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def place(self, value: float) -> float | None:
        """Where in the range a value stands, from 0 to 1; None if it has no place on this axis."""
        if not drawable(value) or (self.log and value <= 0):
            return None
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Round values in the range, near ``about`` of them, and their labels."""
        values = _log_ticks(self.low, self.high, about) if self.log else []
        if len(values) >= 2:
            return [(value, plain(value)) for value in values]
        spacing = _spacing(self.low, self.high, about)
        spacing = max(1.0, spacing) if self.whole else spacing
        first, last = math.ceil(self.low / spacing - 1e-9), math.floor(self.high / spacing + 1e-9)
        values = [k * spacing for k in range(first, last + 1)]
        return list(zip(values, tick_labels(values, spacing)))


def fit(values: Iterable[float], *, zero: bool = False, may_log: bool = False) -> Axis:
    """The axis that shows ``values`` with a little air.

    Args:
        zero: begin at 0 if no value is negative.
        may_log: take a logarithmic axis where all values are positive and the greatest is 100 times the least or more.
    """
    shown = [value for value in values if drawable(value)]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    if may_log and low > 0 and high / low >= _WIDE:
        return Axis(low / 1.2, high * 1.2, log=True)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):
        air = 0.1 * abs(high) if abs(high) > 1e-280 else 1.0
    else:
        air = 0.06 * (high - low)
    from_zero = zero and low >= 0
    return Axis(0.0 if from_zero else low - air, high + air)


def tick_labels(values: Sequence[float], spacing: float) -> list[str]:
    """Labels of evenly spaced ticks, with as many figures as tell them apart.

    >>> tick_labels([0.0, 0.5, 1.0], 0.5), tick_labels([0.0, 20000.0], 20000), tick_labels([0.0, 5e-5, 1e-4], 5e-5)
    (['0.0', '0.5', '1.0'], ['0', '20k'], ['0', '5e-5', '1.0e-4'])
    """
    largest = max(map(abs, values), default=0.0)
    if 1e-3 <= largest < 1e4:
        return [f"{value:.{_decimals(spacing)}f}" for value in values]
    for size, suffix in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if size <= largest < 1e3 * size:
            return [f"{v / size:.{_decimals(spacing / size)}f}{suffix}" if v else "0" for v in values]
    return [_exponent(value, spacing) for value in values]


def plain(value: float) -> str:
    """A number in at most four figures.

    >>> plain(0.25), plain(12345.678), plain(0.00012), plain(math.nan)
    ('0.25', '1.235e4', '1.2e-4', 'nan')
    """
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _decimals(spacing: float) -> int:
    return max(0, -math.floor(math.log10(spacing) + 1e-9))


def _exponent(value: float, spacing: float) -> str:
    if value == 0:
        return "0"
    figures = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(spacing) + 1e-9))
    mantissa, exponent = f"{value:.{figures}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _spacing(low: float, high: float, about: int) -> float:
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    return next((size * step for step, most in ((1, 1.5), (2, 3.5), (5, 7.5)) if raw < size * most), size * 10)


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    """Powers of ten; where they are few, 2 and 5 times them too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        stride = math.ceil((last - first) / (about + 2))
        values = [10.0**k for k in range(first, last + 1, stride)]
    else:
        values = [step * 10.0**k for k in range(first, last + 1) for step in (1, 2, 5)]
    return [value for value in values if low <= value <= high]
