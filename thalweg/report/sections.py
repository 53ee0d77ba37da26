"""What a run was: the plan with its reasons, the recipe, parameters, memory, machine and data; and what happened."""

from __future__ import annotations

import math
from typing import Any

from thalweg.core import human_bytes, human_count, human_seconds, parameter_groups
from thalweg.report.axes import plain
from thalweg.report.folder import Run
from thalweg.report.markup import details, section, shown, table, tag, wrap


def sample(run: Run) -> str:
    """What the task's sample function gave."""
    text = run.outcome.get("sample", "")
    return section("Sample", wrap("pre", "\n" + tag("code", text), class_="sample", tabindex="0")) if text else ""


def events(run: Run) -> str:
    """What a person should know, such as a damaged checkpoint passed over."""
    rows = [(f"{e.step:,}", e.name, e.text, *([shown(e.detail)] if e.detail else [])) for e in run.events]
    headings = ["step", "event", "text", *(["detail"] if any(e.detail for e in run.events) else [])]
    return section("Events", table(headings, rows, numbers=[0]) if rows else "")


def decisions(run: Run) -> str:
    """Every value that the user did not give."""
    rows = [(d.path, d.value, d.reason) for d in run.plan.decisions]
    intro = tag("p", "Values that were not given, decided before step 1.", class_="note")
    changed = details("changes of the model", wrap("pre", "\n" + tag("code", "\n".join(run.plan.changes))))
    parts = [table(("value", "is", "because"), rows, names=[0]), *([changed] if run.plan.changes else [])]
    return section("Plan", intro, *parts) if rows or run.plan.changes else ""


def recipe(run: Run) -> str:
    """The complete recipe, and the file that the run began with."""
    decided = {d.path for d in run.plan.decisions}
    rows = [(path, value, "decided" if path in decided else "") for path, value in run.plan.recipe.flat().items()]
    half = (len(rows) + 1) // 2
    whole = wrap("div", _recipe_table(rows[:half]) + _recipe_table(rows[half:]), class_="halves")
    given = details("recipe.toml, as the run began", wrap("pre", "\n" + tag("code", run.given))) if run.given else ""
    return section("Recipe", whole, given)


def _recipe_table(rows: list[tuple[str, Any, str]]) -> str:
    return table(("field", "value", "by the plan"), rows, names=[0]) if rows else ""


def parameters(run: Run) -> str:
    """How they are treated, in sum, and the full table folded away."""
    if not run.plan.parameters:
        return ""
    peak = run.plan.recipe.optimizer.lr
    summary = [
        (f"{one.tensors:,}", human_count(one.elements), *one.told(peak))
        for one in parameter_groups(run.plan.parameters)
    ]
    brief = table(("tensors", "elements", "rule", "peak rate", "decay", "because"), summary, numbers=[0, 1], names=[2])
    rows = []
    for row in run.plan.parameters:
        shape = " \u00d7 ".join(map(str, row.shape)) or "scalar"
        (one,) = parameter_groups([row])
        rows.append((row.name, shape, f"{math.prod(row.shape):,}", *one.told(peak)))
    headings = ("name", "shape", "elements", "rule", "peak rate", "decay", "because")
    full = table(headings, rows, numbers=[2], names=[0, 3])
    return section("Parameters", brief, details(f"All {len(rows):,} parameters", full))


def memory(run: Run) -> str:
    """Bytes by purpose."""
    sizes = run.plan.sizes
    rows = [(name, human_bytes(size)) for name, size in [*sizes.items(), ("in all", sum(sizes.values()))]]
    return section("Memory", table(("purpose", "size"), rows, numbers=[1]) if sizes else "")


def goodput(run: Run) -> str:
    """Where the wall time went, over all starts of the run."""
    if run.goodput is None:
        return ""
    whole = sum(run.goodput.seconds.values()) or 1.0
    rows = [
        (name, human_seconds(number), f"{number / whole:.1%}") for name, number in run.goodput.seconds.items() if number
    ]
    return section("Time", table(("purpose", "time", "share"), rows, numbers=[1, 2]) if rows else "")


def machine(run: Run) -> str:
    """What the run was on."""
    facts = {name: value for name, value in run.plan.machine.items() if name not in ("data", "peak_flops")}
    return section("Machine", _facts(facts))


def data(run: Run) -> str:
    """What the task told of its data."""
    facts = run.plan.machine.get("data") or {}
    told = dict(facts) if isinstance(facts, dict) else {"data": facts}
    if run.plan.samples:
        told["samples in an epoch"] = f"{run.plan.samples:,}"
    return section("Data", _facts(told))


def _facts(facts: dict[str, Any]) -> str:
    rows = []
    for name, value in facts.items():
        if name.endswith("_bytes") and isinstance(value, (int, float)):
            rows.append((name.removesuffix("_bytes"), human_bytes(int(value))))
        else:
            rows.append((name, plain(value) if isinstance(value, float) else value))
    return table(("fact", "value"), [(name.replace("_", " "), value) for name, value in rows]) if rows else ""
