"""The tables of docs/what-it-is-worth.md, made from the rows that ``benchmarks.worth`` keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.worth_arms import METRIC, RESIDUAL

PAGE = Path(__file__).parents[1] / "docs" / "what-it-is-worth.md"
BEGIN, END = "<!-- made by python -m benchmarks.worth --page -->", "<!-- end of what is made -->"
TITLES = {
    "digits": "Digits",
    "fashion": "Fashion-MNIST",
    "fashion_few": "Fashion-MNIST, few images",
    "pycode": "pycode",
}

Row = dict[str, Any]


def verdict(row: Row) -> str:
    """gain, harm, or neither: whether the interval of the task's metric lies on one side of 0."""
    gain = row["gain"][METRIC[row["task"]]]
    return "gain" if gain["low"] > 0 else "harm" if gain["high"] < 0 else "no gain here"


def with_tables(text: str, tree: dict[str, Any]) -> str:
    """A page with all that stands between its two marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made(tree)}\n{END}{after}"


def made(tree: dict[str, Any]) -> str:
    """A section with a table for each task, and where it was measured."""
    machine = tree["machine"]
    where = (
        f"Measured on {tree['date']}: {machine['name']}, {machine['cores']} cores of which {machine['threads']} was used, "
        f"torch {machine['torch']}, Python {machine['python']}, commit {tree['commit']}. All figures, each seed's too: "
        "[benchmarks/results/worth.json](../benchmarks/results/worth.json).\n"
    )
    tasks = [task for task in TITLES if any(row["task"] == task for row in tree["rows"])]
    return "\n".join([where, *(_section(task, [row for row in tree["rows"] if row["task"] == task]) for task in tasks)])


def _section(task: str, rows: list[Row]) -> str:
    metric = METRIC[task]
    techniques = [row for row in rows if "gain" in row and row["arm"] != RESIDUAL]
    arms = sorted(techniques, key=lambda row: -float(row["gain"][metric]["mean"]))
    unit = "held-out loss lower by, nats" if metric == "loss" else "accuracy higher by, points"
    second = " loss lower by |" if metric == "accuracy" else ""
    lines = [
        f"## {TITLES[task]}\n",
        f"{_size(rows[0])}\n\n{_counts(arms)}\n",
        f"| technique | changes | of | {unit} | |{second} cost |",
        f"|---|---|---|---|---|{'---|' if second else ''}---|",
        *(_line(row, metric) for row in arms),
    ]
    return "\n".join(lines) + "\n"


def _size(row: Row) -> str:
    recipe, data, mean = row["settings"]["recipe"], row["settings"]["data"], row["mean"]
    batch = recipe["train.batch"]
    if "train.steps" in recipe:
        steps, of = recipe["train.steps"], f"{batch} windows of {recipe['model.context']} bytes"
        trained = f"a GPT of width {recipe['model.width']} and {recipe['model.layers']} layers"
        told = f"held-out loss {mean['loss']:.3f} nats a byte"
    else:
        steps = round(recipe["train.epochs"] * math.ceil(data["train images"] / batch))
        of = f"{batch} images"
        trained = f"a convolutional net of width {recipe['model.width']}"
        told = f"accuracy {mean['accuracy']:.2f} % on {data['held-out images']:,} held-out images"
        trained += f" on {data['train images']:,} training images"
    return (
        f"{trained[0].upper()}{trained[1:]}: {steps} steps of {of}, {row['settings']['seeds']} seeds. "
        f"With everything off (`{row['arm']}`): {told}."
    )


def _counts(arms: list[Row]) -> str:
    found = [verdict(row) for row in arms]
    return (
        f"{len(arms)} comparisons: gain {found.count('gain')}, harm {found.count('harm')}, no gain here "
        f"{found.count('no gain here')}. By chance alone about {0.05 * len(arms):.1f} would be a gain or harm."
    )


def _line(row: Row, metric: str) -> str:
    changes = "<br>".join(f"`{path}={_written(value)}`" for path, value in row["changes"].items())
    digits = 3 if metric == "loss" else 2
    cells = [row["arm"], changes, row["against"], _interval(row["gain"][metric], digits), verdict(row)]
    if metric == "accuracy":
        cells.append(_interval(row["gain"]["loss"], 3))
    return f"| {' | '.join([*cells, row['cost'] or 'same'])} |"


def _written(value: Any) -> str:
    """As on the command line, behind --set."""
    return ",".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else f"{value}"


def _interval(gain: dict[str, float], digits: int) -> str:
    mean, low, high = (f"{gain[name] + 0.0:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
