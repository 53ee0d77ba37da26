"""Pictures of results as SVG, readable on light and dark pages: bars with intervals, lines over sizes, curves over seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thalweg.report.axes import Axis, fit
from thalweg.report.markup import tag, wrap

#: Text, grid and three tones; the dark ones where the reader's page is dark.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 }
.note { fill: #57606a; font-size: 11px } .grid { stroke: #d0d7de; stroke-width: 1 }
.one { stroke: #57606a; stroke-dasharray: 3 3 } .whisker { stroke: #24292f; stroke-width: 1.5 }
.ours { fill: #0969da; stroke: #0969da } .hand { fill: #6e7781; stroke: #6e7781 }
.trainer { fill: #afb8c1; stroke: #afb8c1 } .line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note { fill: #9198a1 } .grid { stroke: #3d444d } .one { stroke: #9198a1 }
.whisker { stroke: #e6edf3 } .ours { fill: #4493f8; stroke: #4493f8 } .hand { fill: #9198a1; stroke: #9198a1 }
.trainer { fill: #59636e; stroke: #59636e } .line { fill: none } }
"""
#: Of curves: (on a light page, on a dark one).
TONES = (
    ("#0969da", "#4493f8"),
    ("#bf5700", "#db8a3c"),
    ("#6e7781", "#9198a1"),
    ("#1a7f37", "#3fb950"),
    ("#8250df", "#ab7df8"),
)
_WIDTH, _ROW, _LEFT, _RIGHT = 820, 18, 230, 690


@dataclass(frozen=True)
class Bar:
    """A value with its interval; ``tone`` is "ours", "hand" or "trainer"."""

    name: str
    median: float
    low: float
    high: float
    tone: str


@dataclass(frozen=True)
class Line:
    """Points (x, value, low, high) by rising x."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    tone: str


@dataclass(frozen=True)
class Panel:
    title: str
    x: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class _Frame:
    """Where values lie between four edges."""

    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        return self.left + (self.right - self.left) * (self.x.place(value) or 0.0)

    def up(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (self.y.place(max(value, self.y.low)) or 0.0)


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], note: str) -> str:
    """Groups of bars, each with a scale of its own from 0, and a line at 1; a mark shows the interval."""
    parts, y = [], 12.0
    for title, group in groups:
        y += 16
        parts.append(_text(title, 8, y, "start", "title"))
        most = max([1.0, *(bar.high for bar in group)]) * 1.02
        frame = _Frame(_LEFT, _RIGHT, y + 6, y + 8 + _ROW * len(group), Axis(0.0, most), Axis(0.0, 1.0))
        parts.append(_stroke("one", frame.across(1.0), frame.top, frame.across(1.0), frame.bottom))
        for bar in group:
            y += _ROW
            parts += _bar(bar, frame, y)
        y += 12
    parts.append(_text(note, 8, y + 16, "start", "note"))
    return _svg(parts, _WIDTH, y + 26)


def _bar(bar: Bar, frame: _Frame, y: float) -> list[str]:
    told = f"{bar.median:.2f} ({bar.low:.2f} to {bar.high:.2f})"
    return [
        _text(bar.name, _LEFT - 8, y + 3, "end"),
        _box(bar.tone, _LEFT, y - 7, frame.across(bar.median) - _LEFT, 12),
        _stroke("whisker", frame.across(bar.low), y - 1, frame.across(bar.high), y - 1),
        _text(told, _RIGHT + 8, y + 3, "start", "note"),
    ]


def panels(drawn: Sequence[Panel], unit: str, note: str) -> str:
    """Lines over logarithmic axes, two panels a row, all of one y axis; marks show intervals.

    All panels have the lines of the first, which are named at the foot.
    """
    wide, high = 410, 260
    values = [v for panel in drawn for line in panel.lines for _, *all_of in line.points for v in all_of if v > 0]
    y = Axis(min(values) / 1.3, max(values) * 1.3, log=True)
    parts = []
    for i, panel in enumerate(drawn):
        left, top = (i % 2) * wide + 62.0, (i // 2) * high + 44.0
        xs = [x for line in panel.lines for x, *_ in line.points]
        x = Axis(min(xs) / 1.2, max(xs) * 1.2, log=True)
        parts += _panel(panel, _Frame(left, left + wide - 78, top, top + high - 78, x, y), unit)
    foot = -(-len(drawn) // 2) * high + 12.0
    for i, line in enumerate(drawn[0].lines):
        parts.append(_box(line.tone, 62 + 150.0 * i, foot - 8, 14, 6))
        parts.append(_text(line.name, 82 + 150.0 * i, foot, "start", "note"))
    parts.append(_text(note, 62, foot + 20, "start", "note"))
    return _svg(parts, 2 * wide, foot + 30)


def _panel(panel: Panel, frame: _Frame, unit: str) -> list[str]:
    left, right, bottom = frame.left, frame.right, frame.bottom
    parts = [
        _text(panel.title, left, frame.top - 24, "start", "title"),
        _text(unit, left, frame.top - 8, "start", "note"),
    ]
    for value, told in frame.y.ticks():
        parts.append(_stroke("grid", left, frame.up(value), right, frame.up(value)))
        parts.append(_text(told, left - 6, frame.up(value) + 4, "end", "note"))
    parts += [_text(told, frame.across(x), bottom + 15, "middle", "note") for x, told in frame.x.ticks(5)]
    parts.append(_text(panel.x, right, bottom + 29, "end", "note"))
    for line in panel.lines:
        path = "L".join(f"{frame.across(x):.1f} {frame.up(v):.1f}" for x, v, *_ in line.points)
        parts.append(wrap("path", "", class_=f"line {line.tone}", d=f"M{path}"))
        for x, _, low, most in line.points:
            parts.append(_stroke("whisker", frame.across(x), frame.up(low), frame.across(x), frame.up(most)))
    return parts


Curve = tuple[str, Sequence[tuple[float, float]]]


def curves(title: str, unit: str, drawn: Sequence[Curve], *, targets: Sequence[float], note: str) -> str:
    """Values over seconds on a logarithmic axis, so that short and long runs are read together; a dashed line at each target.

    Args:
        drawn: (name, pairs of seconds, above 0, and value); curves of one name have one tone.
    """
    seconds = [x for _, points in drawn for x, _ in points]
    y = fit([*(value for _, points in drawn for _, value in points), *targets])
    frame = _Frame(56.0, 700.0, 44.0, 296.0, Axis(min(seconds) / 1.1, max(seconds) * 1.1, log=True), y)
    parts = [_text(title, frame.left, 18, "start", "title"), _text(unit, frame.left, 34, "start", "note")]
    for value, told in y.ticks():
        parts.append(_stroke("grid", frame.left, frame.up(value), frame.right, frame.up(value)))
        parts.append(_text(told, frame.left - 6, frame.up(value) + 4, "end", "note"))
    for value, told in frame.x.ticks():
        parts.append(_stroke("grid", frame.across(value), frame.top, frame.across(value), frame.bottom))
        parts.append(_text(f"{told} s", frame.across(value), frame.bottom + 16, "middle", "note"))
    parts += [_stroke("one", frame.left, frame.up(at), frame.right, frame.up(at)) for at in targets]
    names = list(dict.fromkeys(name for name, _ in drawn))
    for name, points in drawn:
        tone = f"tone{names.index(name) % len(TONES)}"
        placed = [(f"{frame.across(x):.1f}", f"{frame.up(value):.1f}") for x, value in points]
        parts.append(wrap("path", "", class_=f"line {tone}", d="M" + "L".join(" ".join(place) for place in placed)))
        parts += [wrap("circle", "", class_=tone, cx=x, cy=value, r="2.5") for x, value in placed]
    for i, name in enumerate(names):
        parts.append(_text(name, frame.right, frame.top + 14 + 16 * i, "end", f"title tone{i % len(TONES)}"))
    parts.append(_text(note, frame.left, frame.bottom + 36, "start", "note"))
    return _svg(parts, 720, frame.bottom + 46, _tones())


def _tones() -> str:
    """Lines are stroked, dots and names filled."""
    one = lambda i, tone: f".tone{i} {{ fill: {tone} }} .line.tone{i} {{ fill: none; stroke: {tone} }}"
    light, dark = ("\n".join(one(i, pair[k]) for i, pair in enumerate(TONES)) for k in (0, 1))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark} }}\n"


def _text(text: str, x: float, y: float, anchor: str, style: str = "") -> str:
    return tag("text", text, class_=style or "name", x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _box(style: str, x: float, y: float, width: float, height: float) -> str:
    sizes = {"width": f"{max(0.0, width):.1f}", "height": f"{height:.1f}"}
    return wrap("rect", "", class_=style, x=f"{x:.1f}", y=f"{y:.1f}", **sizes)


def _stroke(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return wrap("path", "", class_=style, d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


def _svg(parts: Sequence[str], width: float, height: float, more: str = "") -> str:
    body = wrap("style", STYLE + more) + "\n" + "\n".join(parts) + "\n"
    return (
        wrap("svg", body, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width:.0f} {height:.0f}", role="img")
        + "\n"
    )
