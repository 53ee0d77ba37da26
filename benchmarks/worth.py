"""What each technique is worth: one change to a recipe at a time, on four tasks, paired by seed, with as many steps.

    python -m benchmarks.worth [--only digits fashion fashion_few pycode] [--seeds 5] [--again]
    python -m benchmarks.worth --page

Rows are kept after every arm. A run that was cut off goes on where it stopped, on the same machine with the same
settings; ``--again`` measures everything anew. ``--page`` writes the tables into docs/what-it-is-worth.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.batchnorm import STUDENT, interval
from benchmarks.keep import RESULTS, keep
from benchmarks.worth_arms import ARMS, METRIC, NAMED, TASKS, Arm, recipe_of
from benchmarks.worth_page import PAGE, with_tables
from thalweg.core import StopReason, Task
from thalweg.device import choose, facts
from thalweg.recipes import recipe_for
from thalweg.run import train_task

FILE = RESULTS / "worth.json"

Row = dict[str, Any]


def measure(task: Task, arm: Arm, seeds: int) -> dict[str, list[float]]:
    """Held-out accuracy in percent and loss of the arm, a value for each seed.

    Raises:
        RuntimeError: for a run that does not finish.
    """
    found: dict[str, list[float]] = {"accuracy": [], "loss": []}
    for seed in range(seeds):
        recipe = recipe_for(task).override({**recipe_of(arm, task.name), "seed": seed})
        result = train_task(task, recipe, folder=None)
        if result.reason is StopReason.INTERRUPTED:
            raise KeyboardInterrupt
        if result.reason is not StopReason.FINISHED:
            raise RuntimeError(f"{task.name}, {arm.name}, seed {seed}: {result.reason.advice}")
        found["accuracy"].append(round(100 * result.metrics["accuracy"], 4))
        found["loss"].append(round(result.metrics["loss"], 6))
    return found


def row_of(task: str, arm: Arm, settings: Row, values: dict[str, list[float]], base: Row | None) -> Row:
    """What is kept of an arm; gains are paired by seed, and above 0 where the arm is better."""
    row: Row = {
        "task": task,
        "arm": arm.name,
        "against": arm.against,
        "changes": arm.on(task),
        "cost": arm.cost,
        "settings": settings,
        "values": values,
        "mean": {name: round(statistics.mean(each), 4) for name, each in values.items()},
    }
    if base is not None:
        pairs = {name: zip(values[name], base["values"][name], strict=True) for name in values}
        row["gain"] = {
            "accuracy": interval([mine - other for mine, other in pairs["accuracy"]]),
            "loss": interval([other - mine for mine, other in pairs["loss"]]),
        }
    return row


def kept(path: Path) -> list[Row]:
    """The rows of the results file that are of this machine, and of arms that are still there."""
    if not path.is_file():
        return []
    tree = json.loads(path.read_text())
    here = {**facts(choose("auto")[0]), "platform": platform.platform()}
    return [row for row in tree["rows"] if tree["machine"] == here and (row["arm"], row["task"]) in NAMED]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    parser.add_argument("--again", action="store_true", help="measure what is kept already, too")
    parser.add_argument("--page", action="store_true", help="write the tables into the page, and measure nothing")
    given = parser.parse_args(arguments)
    if given.page:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), json.loads(FILE.read_text())), encoding="utf-8")
        return
    rows = {(row["task"], row["arm"]): row for row in ([] if given.again else kept(FILE))}
    failed = [name for name in given.only for name in run_task(name, given.seeds, rows)]
    if failed:
        raise SystemExit(f"Not measured: {'; '.join(failed)}. What went wrong stands above.")


def run_task(name: str, seeds: int, rows: dict[tuple[str, str], Row]) -> list[str]:
    """Measure the arms of a task that ``rows`` lacks, and keep all after each; returns those that failed."""
    task, failed = TASKS[name](), []
    for arm in ARMS:
        if name not in arm.tasks:
            continue
        settings = json.loads(json.dumps({"seeds": seeds, "recipe": recipe_of(arm, name), "data": task.data().facts}))
        old = rows.get((name, arm.name))
        try:
            began = time.perf_counter()
            new = old is None or old["settings"] != settings
            values = measure(task, arm, seeds) if new or old is None else old["values"]
            rows[name, arm.name] = row_of(name, arm, settings, values, rows.get((name, arm.against)))
        except Exception:
            traceback.print_exc()
            failed.append(f"{name}, {arm.name}")
            rows.pop((name, arm.name), None)
            continue
        if rows[name, arm.name] != old:
            keep("worth", list(rows.values()), "python -m benchmarks.worth")
        if new:
            tell(rows[name, arm.name], time.perf_counter() - began)
    return failed


def tell(row: Row, seconds: float) -> None:
    metric = METRIC[row["task"]]
    gain = row["gain"][metric] if "gain" in row else {"mean": 0.0, "low": 0.0, "high": 0.0}
    print(
        f"{row['task']:11} {row['arm']:38} {row['mean'][metric]:8.3f}  "
        f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]  {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
