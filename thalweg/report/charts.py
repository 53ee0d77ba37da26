"""Line charts as SVG, drawn here so that they can be read without a script; the script adds the crosshair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from thalweg.report.axes import Axis, fit, plain
from thalweg.report.markup import tag, wrap
from thalweg.report.series import Point, downsample, drawable

WIDTH, HEIGHT = 560, 240
LEFT, TOP, RIGHT, BOTTOM = 60, 30, WIDTH - 18, HEIGHT - 38  # the frame that the lines are drawn in
_MOST_DOTS = 60


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        points: pairs (step, value) by rising step; a value that is not finite is a gap.
        tone: which of the page's colours, from 1.
        faint: drawn thin and pale, as the ground that a smoothed line stands on.
        dots: mark each point, where there are few.
    """

    name: str
    points: Sequence[Point]
    tone: int = 1
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over steps.

    Attributes:
        unit: what the values are, written at the axis.
        last_step: where the axis of steps ends; charts with one end can be read against each other.
        zero, may_log: see ``fit``.
        marks: steps to mark at the foot of the chart, and ``mark_name`` for the legend.
    """

    title: str
    unit: str
    series: Sequence[Series]
    last_step: int
    zero: bool = False
    may_log: bool = False
    marks: Sequence[int] = field(default=())
    mark_name: str = ""


def draw(chart: Chart) -> str:
    """A chart as a ``figure``: title, legend and SVG, with the values for the script in ``data-chart``."""
    thinned = [Series(s.name, downsample(s.points), s.tone, s.faint, s.dots) for s in chart.series]
    x = Axis(0.0, float(max(1, chart.last_step)), whole=True)
    y = fit((v for s in thinned for _, v in s.points), zero=chart.zero, may_log=chart.may_log)
    empty = not any(drawable(v) for s in thinned for _, v in s.points)
    parts = [] if empty else [_y_axis(y)]
    parts += [_x_axis(x), _label(chart.unit + (", log scale" if y.log else ""), 8, 13, "start", "unit")]
    parts += [_line(s, x, y) for s in thinned]
    parts += _marks(chart.marks, x)
    if empty:
        parts.append(_label("nothing recorded", (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, "middle", "empty"))
    svg = wrap(
        "svg",
        "\n".join(parts),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        tabindex="0",
        aria_label=_in_words(chart),
    )
    legend = wrap("ul", "".join(_key(s) for s in thinned) + _mark_key(chart), class_="legend")
    caption = wrap("figcaption", tag("h3", chart.title) + '<span class="at"></span>')
    return wrap("figure", caption + legend + svg, class_="chart", data_chart=_data(thinned, x, y)) + "\n"


def _place(point: Point, x: Axis, y: Axis) -> tuple[float, float] | None:
    across, up = x.place(point[0]), y.place(point[1])
    if across is None or up is None:
        return None
    return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)


def path_of(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The path through ``points``; a point that has no place lifts the pen, and one alone between gaps is a dot."""
    pieces: list[list[str]] = [[]]
    for point in points:
        place = _place(point, x, y)
        if place is not None:
            pieces[-1].append(f"{place[0]:.1f} {place[1]:.1f}")
        elif pieces[-1]:
            pieces.append([])
    drawn = [f"M{piece[0]}" + ("L" + " ".join(piece[1:]) if len(piece) > 1 else "h0") for piece in pieces if piece]
    return "".join(drawn)


def _line(series: Series, x: Axis, y: Axis) -> str:
    path = path_of(series.points, x, y)
    if not path:
        return ""
    parts = [f'<path d="{path}"/>']
    if series.dots and len(series.points) <= _MOST_DOTS:
        places = (_place(point, x, y) for point in series.points)
        parts += [f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3"/>' for at in places if at]
    return wrap("g", "".join(parts), class_=_style("series", series))


def _style(kind: str, series: Series) -> str:
    return f"{kind} tone{series.tone}" + (" faint" if series.faint else "")


def _label(text: str, x: float, y: float, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _y_axis(y: Axis) -> str:
    parts = []
    for value, text in y.ticks():
        at = _place((0.0, value), Axis(0.0, 1.0), y)
        if at is not None:
            parts.append(f'<path class="grid" d="M{LEFT} {at[1]:.1f}H{RIGHT}"/>')
            parts.append(_label(text, LEFT - 8, at[1] + 4, "end"))
    return "".join(parts)


def _x_axis(x: Axis) -> str:
    parts = [f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>']
    for value, text in x.ticks(6):
        at = LEFT + (x.place(value) or 0.0) * (RIGHT - LEFT)
        parts.append(f'<path class="axis" d="M{at:.1f} {BOTTOM}v4"/>' + _label(text, at, BOTTOM + 17, "middle"))
    return "".join(parts) + _label("step", RIGHT, HEIGHT - 4, "end", "unit")


def _marks(steps: Sequence[int], x: Axis) -> list[str]:
    places = sorted({f"{LEFT + (x.place(step) or 0.0) * (RIGHT - LEFT):.0f}" for step in steps})
    return [f'<path class="mark" d="M{at} {BOTTOM}v-8"/>' for at in places]


def _key(series: Series) -> str:
    name = tag("span", series.name)
    return wrap("li", f'<i class="{_style("swatch", series)}"></i>{name}<b class="value"></b>')


def _mark_key(chart: Chart) -> str:
    return wrap("li", '<i class="swatch marked"></i>' + tag("span", chart.mark_name)) if chart.marks else ""


def _in_words(chart: Chart) -> str:
    told = []
    for series in chart.series:
        values = [value for _, value in series.points if drawable(value)]
        if values:
            low, high = plain(min(values)), plain(max(values))
            told.append(f"{series.name} from {low} to {high}, {plain(values[-1])} at the end")
    return f"Line chart of {chart.title.lower()} over steps: " + ("; ".join(told) or "nothing recorded") + "."


def _data(series: Sequence[Series], x: Axis, y: Axis) -> str:
    tree = {
        "frame": [LEFT, TOP, RIGHT, BOTTOM],
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "log": y.log,
        "series": [[[p, float(f"{v:.5g}") if drawable(v) else None] for p, v in s.points] for s in series],
    }
    return json.dumps(tree, separators=(",", ":"))
