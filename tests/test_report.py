"""The page of a run: its charts as pure functions, its text, and what a browser makes of it."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from thalweg.core import (
    Decision,
    Evaluation,
    Event,
    ParameterRow,
    Plan,
    Recipe,
    Record,
    RunFolderError,
    parameter_groups,
)
from thalweg.core.plan import RECIPES_RULE
from thalweg.report import write_report
from thalweg.report.axes import Axis, fit
from thalweg.report.charts import HEIGHT, WIDTH, Chart, Series, draw, path_of
from thalweg.report.series import attempts, downsample, smooth, throughput
from thalweg.watch import Terminal

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
REASON = "by the name 'accuracy'"


def plan(**changes: Any) -> Plan:
    recipe = Recipe().override({"optimizer.lr": 0.004, "evaluate.best": "accuracy", "evaluate.goal": "max"})
    values = {
        "task": "moons",
        "recipe": recipe,
        "decisions": (Decision("evaluate.goal", "max", REASON), Decision("device", "cpu", "no accelerator here")),
        "steps": 120,
        "samples": 640,
        "loss_divisor": 64.0,
        "parameters": (
            ParameterRow("0.weight", (16, 2), True, "2 dimensions"),
            ParameterRow("0.bias", (16,), False, "a bias"),
        ),
        "unit": "samples",
        "sizes": {"parameters": 3072, "slots": 6144},
        "machine": {"device": "cpu", "name": "a processor", "memory_bytes": 2**33, "data": {"source": "two moons"}},
    }
    return Plan(**{**values, **changes})


def record(step: int, **changes: Any) -> Record:
    values = {
        "epoch": (step - 1) // 10,
        "loss": 2.0 / step + 0.1,
        "weight": 64.0,
        "grad_norm": 100.0 / step**2,
        "lr": 0.004 * min(1.0, step / 20),
        "applied": step,
        "skipped": False,
        "scale": 1.0,
        "seconds": round(0.01 * step, 4),
    }
    return Record(step, **{**values, **changes})


def run_lines() -> list[Record | Evaluation | Event]:
    lines: list[Record | Evaluation | Event] = []
    for step in range(1, 121):
        bad = {"skipped": True, "loss": math.nan, "grad_norm": math.inf} if step in (50, 51) else {}
        lines.append(record(step, **bad))
        if step % 20 == 0:
            metrics = {"loss": 2.5 / step + 0.2, "accuracy": 1 - 1 / step}
            lines.append(Evaluation(step, metrics, True, round(0.01 * step, 4)))
    lines.append(Event(120, "checkpoint passed over", "Passed over a damaged checkpoint: step-00000100."))
    return lines


def write_folder(
    folder: Path,
    lines: list[Record | Evaluation | Event] | None = None,
    outcome: dict[str, str] | None = None,
    given: str = "seed = 0\n",
    **changes: Any,
) -> Path:
    folder.mkdir()
    (folder / "plan.json").write_text(plan(**changes).to_json(), encoding="utf-8")
    (folder / "recipe.toml").write_text(given, encoding="utf-8")
    text = "".join(json.dumps(line.to_dict()) + "\n" for line in lines or [])
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    if outcome is not None:
        (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    return folder


class Reader(HTMLParser):
    """Start tags with their attributes, and the text outside of style and script."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def cards(folder: Path) -> dict[str, tuple[str, str]]:
    """The key figures: name to value and note."""
    text = write_report(folder).read_text(encoding="utf-8")
    found = re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd><dd class="note">(.*?)</dd>', text)
    return {name: (value, note) for name, value, note in found}


# Series


def test_downsampling_keeps_the_extremes_and_the_ends():
    points = [(float(i), math.sin(i / 50)) for i in range(100_000)]
    points[12_345] = (12_345.0, 40.0)
    points[77_777] = (77_777.0, -30.0)
    kept = downsample(points)
    assert 700 <= len(kept) <= 800
    assert {points[0], points[12_345], points[77_777], points[-1]} <= set(kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    width = 100_000 / 399
    for part in range(0, 100_000, 10_000):  # no part of the line loses its range
        inside = [y for x, y in points[part : part + 10_000]]
        near = [y for x, y in kept if part - width <= x <= part + 10_000 + width]
        assert min(near) <= min(inside) and max(near) >= max(inside)


def test_downsampling_leaves_a_short_line_alone_and_keeps_long_gaps():
    short = [(1.0, 2.0), (2.0, math.nan)]
    assert downsample(short) == short
    assert downsample([]) == []
    points = [(float(i), math.nan if 3_000 <= i < 5_000 else 1.0) for i in range(10_000)]
    kept = downsample(points)
    inside = [y for x, y in kept if 3_050 <= x < 4_950]
    assert inside and all(math.isnan(y) for y in inside)
    assert all(y == 1.0 for x, y in kept if x < 2_950 or x > 5_050)


def test_smoothing_is_a_mean_over_near_points_only():
    points = [(float(i), 1.0 + (-1) ** i * 0.5) for i in range(4_000)]
    points[2_000] = (2_000.0, 1e200)
    points[1_000] = (1_000.0, math.nan)
    smoothed = smooth(points, 50)
    assert len(smoothed) <= 401 and smoothed[-1][0] == 3_999.0
    far = [y for x, y in smoothed if x >= 100 and abs(x - 2_000) > 50]
    assert far and all(abs(y - 1.0) < 0.02 for y in far)
    assert all(y > 1e100 for x, y in smoothed if abs(x - 2_000) <= 50)
    assert smooth([], 5) == []
    assert all(math.isnan(y) for _, y in smooth([(1.0, math.inf), (2.0, math.nan)], 1))


def test_throughput_leaves_out_evaluations_and_warm_ups_and_survives_a_resume():
    lines = [
        record(1, seconds=5.0),  # warms up
        record(2, seconds=5.1),
        record(3, seconds=5.2),
        Evaluation(3, {"loss": 1.0}, True, 9.2),
        record(4, seconds=9.3),
        record(5, seconds=3.0),  # another process: its clock began at 0
        record(6, seconds=3.2, weight=32.0),
    ]
    expected = [(2, 640.0), (3, 640.0), (4, 640.0), (6, 160.0)]
    assert throughput(lines, 0.05) == [(step, pytest.approx(rate)) for step, rate in expected]
    assert attempts(lines) == [(1, 9.3), (5, 3.2)]
    assert throughput(lines, 100.0) == [(6, pytest.approx(160.0))]
    assert throughput([], 0.1) == throughput(lines[:1], 0.1) == []


def test_throughput_of_steps_faster_than_the_clock_is_taken_over_several():
    lines = [record(i, seconds=round(i // 10 * 1e-3, 4)) for i in range(1, 1_001)]
    rates = [rate for _, rate in throughput(lines, 0.01)]
    assert len(rates) in (9, 10) and rates == [pytest.approx(640_000.0, rel=0.02)] * len(rates)


# Axes


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0),
        (0.1422, 2.34),
        (0.9972, 0.9979),
        (0.0, 3e-4),
        (-5.0, 12.0),
        (1.0, 87_654_321.0),
        (1e-12, 3e-12),
        (3e38, 1e299),
        (7.0, 7.0),
        (0.0, 0.0),
        (5e-324, 5e-324),
        (-1e299, 1e299),
        (math.nan, math.inf),
    ],
)
@pytest.mark.parametrize("may_log", [True, False])
def test_ticks_are_few_distinct_and_in_range(values, may_log):
    axis = fit(values, may_log=may_log)
    assert axis.low < axis.high
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 11
    assert len({text for _, text in ticks}) == len(ticks)
    air = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - air <= value <= axis.high + air for value, _ in ticks)
    assert [value for value, _ in ticks] == sorted(value for value, _ in ticks)


def test_tick_labels_say_the_value_of_their_tick():
    sizes = {"k": 1e3, "M": 1e6, "G": 1e9}
    for high in (3e-5, 0.004, 0.3, 12.0, 950.0, 8_000.0, 45_000.0, 2.5e6, 7e7):
        for value, text in fit([0.0, high], zero=True).ticks():
            told = float(text.rstrip("kMG")) * sizes.get(text[-1], 1.0)
            assert told == pytest.approx(value, rel=1e-9, abs=high * 1e-9)


def test_an_axis_of_steps_has_whole_ticks():
    assert [text for _, text in Axis(0.0, 2.0, whole=True).ticks()] == ["0", "1", "2"]


def test_a_wide_positive_range_gets_a_log_axis_where_that_is_allowed():
    assert fit([0.01, 5.0], may_log=True).log
    assert not fit([0.01, 5.0]).log
    assert not fit([0.1, 5.0], may_log=True).log
    assert not fit([0.0, 5.0], may_log=True).log
    assert not fit([-1.0, 500.0], may_log=True).log
    wide = fit([0.01, 100.0], may_log=True)
    assert wide.place(1.0) == pytest.approx(0.5)
    assert wide.place(0.0) is None and wide.place(math.inf) is None


# Charts


def test_a_value_without_a_place_lifts_the_pen():
    axis = Axis(0.0, 10.0)
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 4.0), (4.0, math.inf), (5.0, 5.0), (6.0, 6.0)]
    path = path_of(points, axis, axis)
    assert [piece.count(" ") for piece in path.split("M")[1:]] == [2, 1, 2]  # pairs of each stroke
    assert "h0" in path.split("M")[2]
    assert path_of([(0.0, math.nan)], axis, axis) == path_of([], axis, axis) == ""


def numbers_of_paths(markup: str) -> list[tuple[float, float]]:
    strokes = [
        path for group in re.findall(r'<g class="series.*?</g>', markup) for path in re.findall(r' d="(.*?)"', group)
    ]
    pairs = [re.findall(r"(-?[\d.]+) (-?[\d.]+)", stroke) for stroke in strokes]
    return [(float(x), float(y)) for found in pairs for x, y in found]


@pytest.mark.parametrize("may_log", [True, False])
def test_a_chart_stays_inside_its_frame(may_log):
    points = [(float(i), 1e-3 + (i * 7919 % 1000) ** 2) for i in range(1, 5_001)]
    markup = draw(Chart("Loss", "loss", [Series("training", points)], 5_000, may_log=may_log))
    pairs = numbers_of_paths(markup)
    assert 700 <= len(pairs) <= 800
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs)
    assert ("log scale" in markup) == may_log


def test_a_chart_tells_what_it_shows():
    series = [Series("training", [(1, 3.0), (2, 1.5)]), Series("evaluation", [(2, 1.25)], 2, dots=True)]
    reader = Reader(draw(Chart("Loss", "nats", series, 2, marks=[1, 1], mark_name="skipped step")))
    (svg,) = reader.named("svg")
    assert svg["role"] == "img"
    assert svg["aria-label"] == (
        "Line chart of loss over steps: training from 1.5 to 3, 1.5 at the end; "
        "evaluation from 1.25 to 1.25, 1.25 at the end."
    )
    assert {"Loss", "training", "evaluation", "skipped step", "nats", "step", "1.5"} <= set(reader.words)
    assert len(reader.named("circle")) == 1
    assert [path["class"] for path in reader.named("path") if path.get("class") == "mark"] == ["mark"]
    (figure,) = reader.named("figure")
    assert json.loads(figure["data-chart"] or "")["series"] == [[[1, 3.0], [2, 1.5]], [[2, 1.25]]]


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, math.nan)], [(0, 0.0)], [(1, math.nan), (2, math.inf)]])
def test_a_chart_of_hardly_anything_is_drawn(points):
    reader = Reader(draw(Chart("Loss", "loss", [Series("training", points)], 1, may_log=True)))
    drawable = any(math.isfinite(y) for _, y in points)
    assert ("nothing recorded" in reader.words) != drawable
    (figure,) = reader.named("figure")
    assert json.loads(figure["data-chart"] or "", parse_constant=pytest.fail)


def test_no_text_of_a_chart_becomes_markup():
    markup = draw(Chart(HOSTILE, HOSTILE, [Series(HOSTILE, [(1, 2.0)])], 1, marks=[1], mark_name=HOSTILE))
    reader = Reader(markup)
    assert not reader.named("script") and not reader.named("img")
    assert reader.words.count(HOSTILE) == 4


# The page


def test_the_page_tells_of_the_run(tmp_path):
    outcome = {"reason": "finished", "advice": "All steps are done.", "sample": "def f(x):\n    return x"}
    folder = write_folder(tmp_path / "moons-3", run_lines(), outcome, given='schedule.lr = "constant"\n')
    reader = read(folder)
    assert reader.text.startswith("moons: run folder moons-3")
    for told in (
        "finished All steps are done.",
        f"evaluate.goal max {REASON}",
        "device cpu no accelerator here",
        "optimizer.lr 0.004",
        "optimizer.no_decay bias, norm, 1d, token",
        'schedule.lr = "constant"',
        "1 32 adamw 0.004 (x1) 0 decay: 2 dimensions 1 16 adamw 0.004 (x1) no decay: a bias",
        "0.bias 16 16 adamw 0.004 (x1) no decay: a bias",
        "parameters 3.00 KiB slots 6.00 KiB in all 9.00 KiB",
        "memory 8.00 GiB",
        "source two moons samples in an epoch 640",
        "120 checkpoint passed over Passed over a damaged checkpoint: step-00000100.",
    ):
        assert told in reader.text
    assert "def f(x):\n    return x" in reader.words
    titles = re.findall(r"<h3>(.*?)</h3>", (folder / "report.html").read_text(encoding="utf-8"))
    assert titles == ["Loss", "Evaluation: accuracy", "Learning rate", "Gradient norm", "Throughput"]


def treated() -> tuple[ParameterRow, ...]:
    """Two rules, two rates, decay and none, and options that differ."""
    muon, rest = (
        {"rule": "muon", "rule_reason": RECIPES_RULE, "weight_decay": 0.1},
        "muon takes hidden matrices, and this is",
    )
    return (
        ParameterRow("table", (50, 8), False, "matches", rule="adamw", rule_reason=f"{rest} a table", lr=0.05),
        ParameterRow("0.weight", (8, 8), True, "2 dimensions", options={"steps": 5, "b2": 0.9}, **muon),
        ParameterRow("1.weight", (8, 4), True, "3 dimensions", options={"steps": 5, "b2": 0.9}, **muon),
        ParameterRow("2.weight", (4, 4), True, "2 dimensions", options={"steps": 9, "b2": 0.9}, **muon),
        ParameterRow("0.bias", (8,), False, "a bias", rule="adamw", rule_reason=f"{rest} a vector", lr=0.05),
    )


def test_parameters_are_told_of_by_their_treatment():
    found = {one.told(0.02): (one.tensors, one.elements) for one in parameter_groups(treated())}
    because = "rule: muon takes hidden matrices, and this is a table, muon takes hidden matrices, and this is a vector;"
    assert found == {
        ("adamw", "0.001 (x0.05)", "no", f"{because} decay: matches, a bias"): (2, 408),
        ("muon steps=5", "0.02 (x1)", "0.1", "decay: 2 dimensions, 3 dimensions"): (2, 96),
        ("muon steps=9", "0.02 (x1)", "0.1", "decay: 2 dimensions"): (1, 16),
    }


def test_many_treatments_are_told_of_together():
    rows = [ParameterRow(f"{k}", (2,), k > 0, "why", lr=0.5**k, weight_decay=0.1) for k in range(4)]
    assert len(parameter_groups(rows)) == len(parameter_groups(rows, most=4)) == 4
    decayed, exempt = parameter_groups(rows, most=3)
    assert decayed.told(1.0) == ("adamw", "x0.125 to x0.5", "0.1", "decay: why") and decayed.tensors == 3
    assert exempt.told(None) == ("adamw", "x1", "no", "decay: why")
    assert [one.rates[1] for one in parameter_groups(rows)] == [0.5, 0.25, 0.125, 1.0], "decayed first, then by rate"


def test_the_plan_on_a_terminal(tmp_path):
    written = io.StringIO()
    rows = [*treated(), *(ParameterRow(f"{k}", (2,), False, "[red]", lr=0.5**k) for k in range(1, 14))]
    machine = {"device": "cpu", "name": "a processor", "threads": 1, "data": {}}
    decided = (Decision("train.last", ["a", "[b]"], "[bold]so it is[/bold]"),)
    Terminal(Console(file=written, width=160)).start(
        plan(parameters=tuple(rows), machine=machine, decisions=decided), 0
    )
    lines = [" ".join(line.split()) for line in written.getvalue().splitlines()]
    assert "train.last ['a', '[b]'] [bold]so it is[/bold]" in lines
    place = lines.index("what becomes of the parameters")
    assert lines[place + 1] == "parameters tensors rule peak rate decay because"
    assert any(line.startswith("434 15 adamw x0.0001221 to x0.5 no rule: muon takes") for line in lines[place:])
    assert "96 2 muon steps=5 0.004 (x1) 0.1 decay: 2 dimensions, 3 dimensions" in lines[place:]
    assert "memory: parameters 3.00 KiB, slots 6.00 KiB" in lines[place:]


def test_the_key_figures(tmp_path):
    lines = run_lines()
    lines.insert(-1, Evaluation(120, {"loss": 0.3, "accuracy": math.nan}, False, 1.25))
    told = cards(write_folder(tmp_path / "run", lines))
    assert told["best accuracy"] == ("0.9917", "at step 120; larger is better")
    assert told["final accuracy"][0] == "nan"
    assert told["final loss"] == ("0.3", "evaluation at step 120")
    assert told["steps"] == ("120 of 120", "120 updates applied")
    assert told["skipped steps"] == ("2", "at 50, 51")
    assert told["wall time"] == ("1.2 s", "one process")
    assert told["throughput"] == ("6.4k samples/s", "median")
    assert told["parameters"][0] == "48"


def test_a_goal_of_min_takes_the_least(tmp_path):
    recipe = Recipe().override({"evaluate.best": "loss", "evaluate.goal": "min"})
    told = cards(write_folder(tmp_path / "run", run_lines(), recipe=recipe, steps=240))
    assert told["best loss"] == ("0.2208", "at step 120; smaller is better")
    assert told["steps"][0] == "120 of 240"


def test_a_resumed_run_adds_up_its_processes(tmp_path):
    lines = [record(step, seconds=0.01 * (step if step <= 70 else step - 70)) for step in range(1, 121)]
    told = cards(write_folder(tmp_path / "run", lines))
    assert told["wall time"] == ("1.2 s", "resumed at step 71")
    assert told["throughput"][0] == "6.4k samples/s"


@pytest.mark.parametrize("lines", [[], [record(1)], [record(1, loss=math.nan, grad_norm=math.inf, skipped=True)]])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path, lines):
    folder = write_folder(tmp_path / "run", lines)
    reader = read(folder)
    assert "not finished" in reader.text
    assert "Sample" not in reader.words and "Events" not in reader.words
    assert len(reader.named("svg")) == 4
    assert cards(folder)["steps"][0] == f"{len(lines)} of 120"


def test_a_folder_with_a_plan_alone_has_a_page(tmp_path):
    folder = write_folder(tmp_path / "run", decisions=(), parameters=(), sizes={}, machine={}, samples=0)
    for name in ("records.jsonl", "recipe.toml"):
        (folder / name).unlink()
    assert "not finished" in read(folder).text


def test_a_torn_last_line_is_passed_over(tmp_path):
    folder = write_folder(tmp_path / "run", [record(1), record(2)])
    with open(folder / "records.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    assert cards(folder)["steps"][0] == "2 of 120"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"(?s)cannot be reported on\..*plan\.json: .*Give the folder of a run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named_and_the_last_page_is_kept(tmp_path):
    folder = write_folder(tmp_path / "run", [record(1)])
    before = write_report(folder).read_bytes()
    (folder / "outcome.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"outcome\.json: "):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_one_folder_gives_one_page_and_leaves_no_other_file(tmp_path):
    folder = write_folder(tmp_path / "run", run_lines())
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    names = {path.name for path in folder.iterdir()}
    assert names == {"plan.json", "recipe.toml", "records.jsonl", "report.html"}


def hostile_folder(folder: Path) -> Path:
    lines = [
        record(1),
        Evaluation(1, {"loss": 1.0, HOSTILE: 2.0}, True, 0.1),
        Event(1, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}),
    ]
    return write_folder(
        folder,
        lines,
        {"reason": HOSTILE, "advice": HOSTILE, "sample": HOSTILE + "</pre>"},
        given=HOSTILE,
        task=HOSTILE,
        recipe=Recipe().override({"model": {"name": HOSTILE}, "evaluate.best": HOSTILE}),
        decisions=(Decision(HOSTILE, [HOSTILE, {"a": HOSTILE}], HOSTILE),),
        parameters=(ParameterRow(HOSTILE, (2,), True, HOSTILE),),
        unit=HOSTILE,
        sizes={HOSTILE: 4},
        machine={"device": HOSTILE, HOSTILE: HOSTILE, "data": {HOSTILE: HOSTILE}},
    )


def test_no_text_of_a_run_becomes_markup(tmp_path):
    reader = read(hostile_folder(tmp_path / "<b onclick=alert(3)>run"))
    assert len(reader.named("script")) == len(reader.named("style")) == 1
    assert not reader.named("img") and not reader.named("b onclick=alert(3)")
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    assert sum(word.count(HOSTILE) for word in reader.words) >= 25
    assert "run folder <b onclick=alert(3)>run" in reader.words


def test_a_text_that_is_no_unicode_is_told_by_its_code(tmp_path):
    folder = write_folder(tmp_path / "run", [], {"reason": "finished", "sample": "a\ud800b"})
    assert "a\\ud800b" in read(folder).words


def test_the_page_asks_for_nothing(tmp_path):
    text = write_report(write_folder(tmp_path / "run", run_lines())).read_text(encoding="utf-8")
    reader = Reader(text)
    addresses = [
        value for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href", "action")
    ]
    assert addresses == ["data:,"]
    assert "url(" not in text and "@import" not in text
    (policy,) = [meta["content"] for meta in reader.named("meta") if meta.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_a_report_needs_neither_torch_nor_numpy(tmp_path):
    folder = write_folder(tmp_path / "run", run_lines())
    code = (
        "import sys; from pathlib import Path; from thalweg.report import write_report; "
        f"write_report(Path({str(folder)!r})); print({{'torch', 'numpy', 'rich', 'tomli_w'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# In a browser


CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    for program in (CHROMIUM, DRIVER):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Opens a run's page; afterwards, all that the browser asked for and complained of is looked at."""

    def open_(folder: Path) -> Any:
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(write_report(folder).as_uri())
        return browser

    yield open_
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [browser.current_url]


def prefer(browser: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_a_browser_shows_charts_reasons_and_sample(tmp_path, open_page):
    outcome = {"reason": "finished", "advice": "All steps are done.", "sample": "once upon a time"}
    page = open_page(write_folder(tmp_path / "run", run_lines(), outcome))
    body = page.find_element("tag name", "body").text
    assert REASON in body and "once upon a time" in body and "All steps are done." in body
    boxes = page.execute_script(
        "return [...document.querySelectorAll('figure.chart svg')].map(svg => {"
        " const lines = [...svg.querySelectorAll('.series path')];"
        " const view = svg.viewBox.baseVal;"
        " const inside = lines.every(line => { const b = line.getBBox(); return b.x >= view.x && b.y >= view.y"
        "  && b.x + b.width <= view.width && b.y + b.height <= view.height; });"
        " const shown = svg.getBoundingClientRect();"
        " return [lines.length, Math.min(...lines.map(l => l.getTotalLength())), inside, shown.width, shown.height]; })"
    )
    assert [lines for lines, *_ in boxes] == [3, 1, 1, 2, 1]
    assert all(length > 100 and inside and width > 300 and height > 100 for _, length, inside, width, height in boxes)


def test_hovering_a_chart_tells_the_values_on_all_of_them(tmp_path, open_page):
    from selenium.webdriver.common.action_chains import ActionChains

    page = open_page(write_folder(tmp_path / "run", run_lines()))
    charts = page.find_elements("css selector", "figure.chart")
    values = lambda chart: [e.text for e in chart.find_elements("css selector", ".value")]
    assert [value for chart in charts for value in values(chart) if value] == []
    svg = charts[2].find_element("tag name", "svg")
    middle = (60 + (WIDTH - 18)) / 2 - WIDTH / 2  # the middle of the frame, which is step 60, from the picture's middle
    ActionChains(page).move_to_element_with_offset(svg, round(middle * svg.size["width"] / WIDTH), 0).perform()
    assert charts[2].find_element("class name", "at").text == "step 60"
    assert values(charts[2]) == ["0.004"]
    assert values(charts[1]) == ["0.98333"]
    assert values(charts[0])[0] == f"{2 / 60 + 0.1:.5g}"
    assert all(any(values(chart)) for chart in charts)
    crosses = page.find_elements("css selector", ".cross")
    assert len(crosses) == 5 and all(cross.get_attribute("visibility") == "visible" for cross in crosses)
    ActionChains(page).move_to_element(page.find_element("tag name", "h1")).perform()
    assert [value for chart in charts for value in values(chart) if value] == []


def test_the_crosshair_moves_by_keyboard_and_tells_of_gaps(tmp_path, open_page):
    lines = [record(step, loss=math.nan if step == 2 else 1.5) for step in range(1, 4)]
    page = open_page(write_folder(tmp_path / "run", lines))
    chart = page.find_element("css selector", "figure.chart")
    told = []
    for _ in range(3):
        chart.find_element("tag name", "svg").send_keys("\ue012")  # arrow left
        told.append((chart.find_element("class name", "at").text, chart.find_element("class name", "value").text))
    assert told == [("step 3", "1.5"), ("step 2", "not finite"), ("step 1", "1.5")]


def test_dark_mode_has_another_ground_and_readable_text(tmp_path, open_page):
    page = open_page(write_folder(tmp_path / "run", run_lines()))

    def brightness(name: str) -> float:
        text = page.execute_script(f"return getComputedStyle(document.body).{name}")
        return sum(map(float, re.findall(r"[\d.]+", text)[:3])) / 765

    prefer(page, "light")
    light = brightness("backgroundColor"), brightness("color")
    prefer(page, "dark")
    dark = brightness("backgroundColor"), brightness("color")
    assert light[0] > 0.9 and light[1] < 0.25
    assert dark[0] < 0.15 and dark[1] > 0.8


def test_a_narrow_screen_does_not_scroll_sideways(tmp_path, open_page):
    page = open_page(write_folder(tmp_path / "run", run_lines(), {"reason": "finished", "sample": "x" * 400}))
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = page.execute_script(widths)
    assert client <= 360 and scroll <= client


def test_hostile_texts_do_nothing_in_a_browser(tmp_path, open_page):
    page = open_page(hostile_folder(tmp_path / "run"))
    assert HOSTILE in page.find_element("css selector", "pre.sample").text
    assert page.find_elements("tag name", "img") == []
    assert page.execute_script("return document.scripts.length") == 1
