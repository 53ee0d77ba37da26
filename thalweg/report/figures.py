"""What a run came to: the outcome, the key figures, and the charts that its record makes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from thalweg.core import Evaluation, flops_use, human_bytes, human_count, human_seconds, training_times
from thalweg.report.axes import plain
from thalweg.report.charts import Chart, Series, draw
from thalweg.report.folder import Run
from thalweg.report.markup import tag, wrap
from thalweg.report.series import Point, attempts, drawable, smooth, throughput, window_seconds


def header(run: Run) -> str:
    """Task, run folder and how the run ended."""
    reason = run.outcome.get("reason", "not finished")
    advice = run.outcome.get("advice", "The folder has no outcome: the run goes on, or was cut off.")
    pills = {
        "finished": "finished",
        "stopped early": "finished",
        "target reached": "finished",
        "interrupted": "interrupted",
        "diverged": "diverged",
    }
    known = pills.get(reason, "open")
    ended = tag("span", reason, class_=f"pill {known}")
    title = wrap("h1", tag("span", run.plan.task) + " " + tag("small", f"run folder {run.name}"))
    return wrap("header", title + wrap("p", f"{ended} " + tag("span", advice), class_="outcome")) + "\n"


def key_figures(run: Run) -> str:
    """A row of cards: evaluation, steps, time, speed, size."""
    cards = [*_evaluation_cards(run), *_progress_cards(run)]
    rates = [rate for _, rate in _throughput(run)]
    if rates:
        cards.append(("throughput", f"{human_count(statistics.median(rates))} {run.plan.unit}/s", "median"))
    share = flops_use(run.plan, training_times(run.lines))
    if share is not None:
        stated = f"of {run.plan.machine['peak_flops'] / 1e12:g} TFLOP/s, {run.plan.machine['chip']}"
        cards.append(("model FLOPs use", f"{share:.1%}", stated))
    sizes, weights = run.plan.sizes, sum(math.prod(row.shape) for row in run.plan.parameters)
    held = f"{human_bytes(sum(sizes.values()))} with gradients and slots" if sizes else ""
    cards.append(("parameters", human_count(weights), held))
    shown = (tag("dt", name) + tag("dd", value) + tag("dd", note, class_="note") for name, value, note in cards)
    return wrap("dl", "\n".join(wrap("div", card) for card in shown), class_="cards") + "\n"


def charts(run: Run) -> str:
    """Loss, every evaluation metric, learning rate and what else is scheduled, gradient norm, throughput."""
    records, evaluations = run.records, run.evaluations
    last = max((line.step for line in run.lines), default=0)
    loss: list[Point] = [(r.step, r.loss) for r in records]
    norm: list[Point] = [(r.step, r.grad_norm) for r in records]
    drawn = [
        Chart(
            "Loss",
            "loss",
            (
                *_with_mean("training, each step", "training, smoothed", loss),
                *(s for s in [Series("evaluation", _metric(evaluations, "loss"), 2, dots=True)] if s.points),
            ),
            last,
            may_log=True,
            marks=[r.step for r in records if r.skipped],
            mark_name="skipped step",
        )
    ]
    for name in dict.fromkeys(name for e in evaluations for name in e.metrics if name != "loss"):
        points = _metric(evaluations, name)
        unbounded = any(value > 1 for _, value in points)
        drawn.append(Chart(f"Evaluation: {name}", name, [Series(name, points, 2, dots=True)], last, may_log=unbounded))
    rate = [Series("learning rate", [(r.step, r.lr) for r in records])]
    drawn += [Chart("Learning rate", "learning rate", rate, last, zero=True)]
    for name in dict.fromkeys(name for r in records for name in r.values):
        moved = [(r.step, r.values[name]) for r in records if name in r.values]
        drawn.append(Chart(f"Scheduled: {name}", name, [Series(name, moved)], last, zero=True))
    drawn += [
        Chart("Gradient norm", "norm before clipping", _with_mean("each step", "smoothed", norm), last, may_log=True),
        Chart("Throughput", f"{run.plan.unit}/s", [Series(run.plan.unit + "/s", _throughput(run))], last, zero=True),
    ]
    return wrap("div", "".join(map(draw, drawn)), class_="charts") + "\n"


def _with_mean(name: str, mean_name: str, points: list[Point]) -> list[Series]:
    """Every step, pale, below its running mean; a run too short to smooth is a plain line."""
    width = len(points) // 40
    if width < 1:
        return [Series(name, points)]
    return [Series(name, points, faint=True), Series(mean_name, smooth(points, width))]


def _metric(evaluations: Iterable[Evaluation], name: str) -> list[Point]:
    return [(e.step, e.metrics[name]) for e in evaluations if name in e.metrics]


def _throughput(run: Run) -> list[Point]:
    device = str(run.plan.machine.get("device", "cpu"))
    return throughput(run.lines, window_seconds(run.lines, device))


def _evaluation_cards(run: Run) -> Iterable[tuple[str, str, str]]:
    evaluations, wanted = run.evaluations, run.plan.recipe.evaluate
    if not evaluations:
        last = next((r.loss for r in reversed(run.records) if drawable(r.loss)), None)
        yield "training loss", "none" if last is None else plain(last), "the last step's; nothing was evaluated"
        return
    name, sign = wanted.best, -1 if wanted.goal == "max" else 1
    points = [(step, value) for step, value in _metric(evaluations, name) if drawable(value)]
    if points:
        step, value = min(points, key=lambda p: (sign * p[1], p[0]))
        yield f"best {name}", plain(value), f"at step {step:,.0f}; {'larger' if sign < 0 else 'smaller'} is better"
    last_one = evaluations[-1]
    for name, value in sorted(last_one.metrics.items(), key=lambda item: (item[0] != wanted.best, item[0])):
        yield f"final {name}", plain(value), f"evaluation at step {last_one.step:,}"


def _progress_cards(run: Run) -> Iterable[tuple[str, str, str]]:
    records, took = run.records, attempts(run.lines)
    done = records[-1] if records else None
    applied = f"{done.applied:,} updates applied" if done else "none recorded"
    yield "steps", f"{done.step if done else 0:,} of {run.plan.steps:,}", applied
    skipped = [r.step for r in records if r.skipped]
    where = ", ".join(f"{step:,}" for step in skipped[:4]) + (", …" if len(skipped) > 4 else "")
    note = f"at {where}" if skipped else "every gradient was finite"
    yield "skipped steps", f"{len(skipped):,}", note if records else "none recorded"
    resumed = ", ".join(f"{step:,}" for step, _ in took[1:4]) + (", …" if len(took) > 4 else "")
    yield (
        "wall time",
        human_seconds(sum(s for _, s in took)),
        f"resumed at step {resumed}" if resumed else "one process",
    )
