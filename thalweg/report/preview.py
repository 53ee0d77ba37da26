"""Schedules drawn before a run: in the terminal with braille dots, as one SVG file, and as a table. Does not know torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from thalweg.core import RunFolderError
from thalweg.report.axes import Axis, fit
from thalweg.report.series import downsample
from thalweg.schedules.curve import Curve

ROWS = 6  # of characters in a terminal's chart
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # a braille character's, by row and column
_BLANK = 0x2800
_LABEL = 10  # columns of a terminal's chart before its frame
_PLACES = 20  # rows of the table

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 210, 70, 702, 52, 178
_STYLE = """
svg { background: #ffffff; font: 12px system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
text { fill: #5c6878; } .name { fill: #1d2530; font-size: 14px; font-weight: 600; }
polyline { fill: none; stroke: #2a6bb0; stroke-width: 2; stroke-linejoin: round; }
circle { fill: #2a6bb0; } .grid { stroke: #e2e6eb; } .axis { stroke: #98a4b3; }
@media (prefers-color-scheme: dark) {
  svg { background: #191f27; } text { fill: #98a4b3; } .name { fill: #e3e8ee; }
  polyline { stroke: #6cb0f2; } circle { fill: #6cb0f2; } .grid { stroke: #2a323d; }
}
"""


def number(value: float) -> str:
    """
    >>> number(0.1 * 0.003), number(0.0), number(64.0)
    ('0.0003', '0', '64')
    """
    return f"{value:.6g}"


def in_words(curve: Curve) -> str:
    """
    >>> in_words(Curve("lr", "", (0.5, 1.0, 0.1)))
    'first 0.5 at update 1, peak 1 at update 2, last 0.1 at update 3'
    """
    return ", ".join(f"{word} {number(value)} at {curve.counted} {at}" for word, value, at in curve.ends())


def in_terminal(curve: Curve, width: int = 80, *, braille: bool = True) -> str:
    """A chart of ``ROWS`` lines under its name, and its figures in words.

    Args:
        width: columns of the terminal.
        braille: 2 x 4 dots a character; else one star, for terminals that know ASCII alone.
    """
    wide = max(20, min(width, 120) - _LABEL - 2)
    low, high = _range(curve.values)
    lines = [_clean(f"{curve.name}  {curve.text}".rstrip()), *([_clean(f"  {curve.about}")] if curve.about else [])]
    for row, drawn in enumerate(_canvas(curve.values, low, high, wide, braille)):
        label = number(high) if row == 0 else number(low) if row == ROWS - 1 else ""
        lines.append(f"{label:>{_LABEL}} |{drawn}".rstrip())
    last = str(len(curve.values))
    lines.append(f"{'':{_LABEL}}  1{last:>{wide - 1}}" if len(curve.values) > 1 else f"{'':{_LABEL}}  1")
    lines.append(f"  {in_words(curve)}")
    lines += [_clean(f"  note: {note}") for note in curve.notes]
    return "\n".join(lines)


def _canvas(values: Sequence[float], low: float, high: float, wide: int, braille: bool) -> list[str]:
    across, down = (2, 4) if braille else (1, 1)
    cells = [[0] * wide for _ in range(ROWS)]
    for column, (least, most) in enumerate(_columns(values, wide * across)):
        top, bottom = (round((high - value) / (high - low) * (ROWS * down - 1)) for value in (most, least))
        for place in range(top, bottom + 1):
            cells[place // down][column // across] |= _DOTS[place % down][column % across]
    drawn = [[chr(_BLANK + dots) if braille else "*" for dots in row] for row in cells]
    return ["".join(c if dots else " " for c, dots in zip(row, cell)) for row, cell in zip(drawn, cells)]


def _columns(values: Sequence[float], num: int) -> list[tuple[float, float]]:
    """(least, largest) of each of ``num`` equal parts of the line through the values; each begins where the last ended."""
    scale = (len(values) - 1) / (num - 1)
    found, before = [], 0.0
    for column in range(num):
        here = min(column * scale, float(len(values) - 1))
        part = [_between(values, before), *values[int(before) + 1 : int(here) + 1], _between(values, here)]
        found.append((min(part), max(part)))
        before = here
    return found


def _between(values: Sequence[float], place: float) -> float:
    whole = int(place)
    following = values[min(whole + 1, len(values) - 1)]
    return values[whole] + (place - whole) * (following - values[whole])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From 0 where that leaves the line at least half of the height."""
    low, high = min(values), max(values)
    if low == high:
        return (0.0, high) if high > 0 else (high, high + 1.0)
    return (0.0 if 0 <= low <= 0.5 * high else low), high


def table(curves: Sequence[Curve]) -> str:
    """The values at about 20 places of the run, the first and the last among them.

    >>> print(table([Curve("lr", "", (0.5, 1.0, 0.1))]))
    update   lr
         1  0.5
         2    1
         3  0.1
    """
    longest = max(len(curve.values) for curve in curves)
    places = sorted({round(k * (longest - 1) / (_PLACES - 1)) for k in range(_PLACES)})
    rows = [["update", *(_clean(curve.name) for curve in curves)]]
    rows += [[str(at + 1), *(number(c.values[min(at, len(c.values) - 1)]) for c in curves)] for at in places]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(row, widths)) for row in rows)


def as_svg(curves: Sequence[Curve], title: str) -> str:
    """One file with a chart for each value, which needs nothing beside it."""
    height = _HEIGHT * len(curves)
    drawn = "\n".join(
        f'<g transform="translate(0 {_HEIGHT * k})">{_chart(curve)}</g>' for k, curve in enumerate(curves)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img">\n<title>{escape(_clean(title))}</title>\n<style>{_STYLE}</style>\n{drawn}\n</svg>\n'
    )


def _chart(curve: Curve) -> str:
    x = Axis(1.0, float(max(2, len(curve.values))), whole=True)
    y = fit(curve.values, zero=_range(curve.values)[0] == 0)
    points = downsample([(float(k), value) for k, value in enumerate(curve.values, 1)])
    places = [_place(x, y, *point) for point in points]
    parts = [_text(_short(curve.name, 40), 12, 20, "name"), _text(_short(f"{curve.text}: {curve.about}"), 12, 38)]
    parts.append(_text(in_words(curve), _RIGHT, 20, anchor="end"))
    for value, label in y.ticks(4):
        at = _place(x, y, 1.0, value)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_RIGHT}"/>')
        parts.append(_text(label, _LEFT - 8, at + 4, anchor="end"))
    for value, label in [(1.0, "1"), *(tick for tick in x.ticks(6) if tick[0] > 1)]:
        parts.append(_text(label, _place(x, y, value, y.low)[0], _BOTTOM + 17, anchor="middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>')
    parts.append(_text(curve.counted, _RIGHT, _BOTTOM + 28, anchor="end"))
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    told = _clean("; ".join([in_words(curve), *curve.notes]))
    name = escape(_clean(curve.name))
    parts.append(f'<polyline data-name="{name}" points="{line}"><title>{name}: {escape(told)}</title></polyline>')
    parts += [_dot(*_place(x, y, float(at), value)) for _, value, at in curve.ends()]
    return "".join(parts)


def _place(x: Axis, y: Axis, update: float, value: float) -> tuple[float, float]:
    across, up = x.place(update) or 0.0, y.place(value) or 0.0
    return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)


def _dot(across: float, down: float) -> str:
    return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3"/>'


def _text(text: str, across: float, down: float, style: str = "", anchor: str = "start") -> str:
    chosen = f' class="{style}"' if style else ""
    return f'<text{chosen} x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{escape(_clean(text))}</text>'


def _short(text: str, most: int = 110) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _clean(text: str) -> str:
    """Without characters that steer a terminal or that XML does not have."""
    return "".join(c if c.isprintable() else "?" for c in text)


def write_svg(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Write ``as_svg`` to a file.

    Raises:
        RunFolderError: if it cannot be written.
    """
    try:
        path.write_text(as_svg(curves, title), encoding="utf-8")
    except OSError as err:
        raise RunFolderError(f"{path} cannot be written.", f"{err}.", "Name another file with --svg.") from None
