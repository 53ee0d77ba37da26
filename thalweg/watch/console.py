"""The run on a terminal: the plan, a live progress line, evaluations; plain lines where there is no terminal."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from thalweg.core import (
    Evaluation,
    Event,
    Plan,
    Record,
    StopReason,
    human_bytes,
    human_count,
    human_seconds,
    parameter_groups,
    told_use,
)

_LINE_SECONDS = 10.0
#: Lines on the treatment of parameters; with more, those that differ by their rate alone are one.
_MOST_GROUPS = 8


class Steady(Console):
    """A console that falls silent when nobody reads any more; rich's own would end the process, and the run with it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", console: Console | None = None
) -> None:
    """A table without lines; what is too wide for the terminal is folded."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Steady(highlight=False)).print(table)


class _Figures(ProgressColumn):
    """loss, lr, gradient norm, throughput, time left, best evaluation."""

    max_refresh = 0.2

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""))


class Terminal:
    """A sink for people.

    Args:
        console: where to write; rich decides whether it is a live terminal.
        verbose: print the whole plan, every decision with its reason.
    """

    def __init__(self, console: Console | None = None, *, verbose: bool = True) -> None:
        self.console = console or Steady(highlight=False)
        self.verbose = verbose
        self.best: tuple[str, float, int] | None = None
        self._progress: Progress | None = None
        self._bar: Any = None
        self._rate = 0.0
        self._seen = 0.0  # seconds at the last flush
        self._line_at = 0.0
        self._times: list[tuple[int, float]] = []  # of some steps: how fast the run was without its evaluations
        self._away = 0.0

    def start(self, plan: Plan, step: int) -> None:
        self.plan, self.goal = plan, plan.recipe.evaluate
        self._first = step
        if self.verbose:
            self._print_plan(plan)
        if self.console.is_terminal:
            columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=18), _Figures())
            self._progress = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar = self._progress.add_task("train", total=plan.steps, completed=step)
            self._progress.start()

    def steps(self, records: list[Record]) -> None:
        last = records[-1]
        self._times = [
            *(self._times[::2] if len(self._times) > 200 else self._times),
            (last.step, last.seconds - self._away),
        ]
        figures = self._figures(records)
        if self._progress is not None:
            self._progress.update(self._bar, completed=last.step, figures=figures)
        elif time.monotonic() - self._line_at > _LINE_SECONDS or last.step == self.plan.steps:
            self._line_at = time.monotonic()
            self.console.print(f"step {last.step}/{self.plan.steps}  {figures}", soft_wrap=True)
        skipped = next((r for r in records if r.skipped), None)
        if skipped is not None and self.plan.recipe.precision != "fp16":
            finite = math.isfinite(skipped.loss) and math.isfinite(skipped.grad_norm)
            why = "the loss or the gradient is far out of line" if finite else "the gradient is not finite"
            self.console.print(f"[yellow]step {skipped.step}: {why}; the step is skipped[/yellow]")

    def evaluation(self, evaluation: Evaluation) -> None:
        self._away += max(0.0, evaluation.seconds - self._seen)
        if evaluation.best:
            self.best = (self.goal.best, evaluation.metrics[self.goal.best], evaluation.step)
        named = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        mark = "  [green]best so far[/green]" if evaluation.best else ""
        self.console.print(f"[bold]evaluation[/bold] at step {evaluation.step}  {named}{mark}", soft_wrap=True)

    def event(self, event: Event) -> None:
        self.console.print(f"[yellow]{event.text}[/yellow]", soft_wrap=True)

    def stop(self, reason: StopReason) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self.console.print(f"[bold]{reason.value}[/bold]: {reason.advice}", soft_wrap=True)
        if self._times and (use := told_use(self.plan, self._times)):
            self.console.print(use, soft_wrap=True)

    def _figures(self, records: list[Record]) -> str:
        last = records[-1]
        seconds, weight = self._seen, sum(r.weight for r in records)
        if last.seconds > seconds:
            rate = weight / (last.seconds - seconds)
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        self._seen = last.seconds
        done = last.step - self._first
        left = (self.plan.steps - last.step) * last.seconds / max(done, 1)
        best = f"  best {self.best[0]} {self.best[1]:.4f}" if self.best else ""
        return (
            f"loss {last.loss:.4f}  lr {last.lr:.2e}  |g| {last.grad_norm:.2f}  "
            f"{human_count(self._rate)} {self.plan.unit}/s  {human_seconds(left)} left{best}"
        )

    def _print_plan(self, plan: Plan) -> None:
        machine = plan.machine
        self.console.print(
            f"[bold]{plan.task}[/bold]: {plan.steps} steps of {plan.recipe.train.batch} samples"
            f" on {machine['name']} ({machine['device']}, {machine['threads']} threads)",
            soft_wrap=True,
        )
        for name, value in machine.get("data", {}).items():
            self.console.print(f"  data: {name} {value}", soft_wrap=True)
        decided = [(d.path, str(d.value), d.reason) for d in plan.decisions]
        print_table(("value", "is", "because"), decided, title="decided before step 1", console=self.console)
        peak = plan.recipe.optimizer.lr
        rows = [
            (human_count(one.elements), str(one.tensors), *one.told(peak))
            for one in parameter_groups(plan.parameters, most=_MOST_GROUPS)
        ]
        headings = ("parameters", "tensors", "rule", "peak rate", "decay", "because")
        print_table(headings, rows, title="what becomes of the parameters", console=self.console)
        for change in plan.changes:
            self.console.print(f"  model: {change}", soft_wrap=True)
        sizes = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.sizes.items() if size)
        self.console.print(f"  memory: {sizes}", soft_wrap=True)
