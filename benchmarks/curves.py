"""Curves of a loss or a score as SVG, over seconds on a logarithmic axis, so that short and long runs are read together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_TONES = ("#0969da", "#bf5700", "#6e7781", "#1a7f37", "#8250df")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 340, 56, 20, 40, 46
Curve = tuple[str, Sequence[tuple[float, float]]]


def draw(title: str, unit: str, curves: Sequence[Curve], *, target: float, note: str) -> str:
    """The curves, a line at ``target``, and ``note`` below.

    Args:
        curves: (name, pairs of seconds, above 0, and value).
    """
    seconds = [x for _, points in curves for x, _ in points]
    values = [y for _, points in curves for _, y in points] + [target]
    x0, x1 = math.log(min(seconds) / 1.1), math.log(max(seconds) * 1.1)
    pad = 0.05 * (max(values) - min(values))
    y0, y1 = min(values) - pad, max(values) + pad

    def across(x: float) -> float:
        return _LEFT + (math.log(x) - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _TOP + (y1 - y) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 18, title, weight="600"), _text(_LEFT, 33, unit)]
    for tick in _ticks(math.exp(x0), math.exp(x1)):
        parts.append(_text(across(tick), _HEIGHT - _BOTTOM + 16, f"{tick:g} s", anchor="middle"))
        parts.append(_line([(across(tick), _TOP), (across(tick), _HEIGHT - _BOTTOM)], "#8c959f", 0.3))
    step = 10 ** math.floor(math.log10(y1 - y0)) / 2
    for k in range(math.ceil(y0 / step), math.floor(y1 / step) + 1):
        parts.append(_text(_LEFT - 6, up(k * step) + 4, f"{k * step:.3g}", anchor="end"))
        parts.append(_line([(_LEFT, up(k * step)), (_WIDTH - _RIGHT, up(k * step))], "#8c959f", 0.3))
    parts.append(_line([(_LEFT, up(target)), (_WIDTH - _RIGHT, up(target))], "#8c959f", 1.5, dashes="4 4"))
    for number, (name, points) in enumerate(curves):
        tone = _TONES[number % len(_TONES)]
        parts.append(_line([(across(x), up(y)) for x, y in points], tone, 2))
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" fill="{tone}"/>' for x, y in points]
        parts.append(_text(_WIDTH - _RIGHT, _TOP + 14 + 16 * number, name, anchor="end", fill=tone, weight="600"))
    parts.append(_text(_LEFT, _HEIGHT - 10, note))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#24292f", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}" font-weight="{weight}">{escape(text)}</text>'


def _line(points: Sequence[tuple[float, float]], tone: str, width: float, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{tone}" stroke-width="{width}"{dashed}/>'
