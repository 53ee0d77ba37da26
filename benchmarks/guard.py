"""What the guard costs a step: runs with and without it in turn in one process, over the same data.

"off" is the default recipe, which skips what is not finite; the others are held against it. One copy in memory, as "rewind" takes
it every 100 steps, is timed apart. Times are CPU time of the process, with
one thread, so that others on the machine count for little.

    python -m benchmarks.guard [--pairs 31]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.keep import keep, summary
from benchmarks.loop import classify, images, mlp
from thalweg.core import Recipe, Split, Task
from thalweg.engine import Loop, build, resolve
from thalweg.recipes import find_task, recipe_for
from thalweg.watch import JsonLines

STEPS = 100_000
ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "spike = skip": {"guard.spike": "skip"},
    "nonfinite and spike = rewind": {"guard.nonfinite": "rewind", "guard.spike": "rewind"},
}


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def tiny() -> tuple[Task, dict[str, Any]]:
    task = Task(model=mlp, loss=classify, data=Split(train=images(4096, 64)))
    return task, {"train.batch": 64, "optimizer.lr": 1e-3}


def pycode() -> tuple[Task, dict[str, Any]]:
    task = find_task("pycode")
    return task, recipe_for(task).flat()


#: name: (task and recipe, steps in a timed window, windows for each "pair" asked for)
WORKLOADS: dict[str, tuple[Callable[[], tuple[Task, dict[str, Any]]], int, float]] = {
    "tiny MLP 64-128-128-10": (tiny, 400, 1.0),
    "pycode": (pycode, 4, 0.5),
}


def loop_of(task: Task, changes: dict[str, Any], folder: Path) -> Loop:
    fixed = {
        "precision": "fp32",
        "train.steps": STEPS,
        "compile": "off",
        "checkpoint.every": 0,
        "evaluate.every": 0,
        "schedule.lr": "constant()",
    }
    resolved = resolve(task, Recipe().override({**changes, **fixed}))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    lines = JsonLines(folder / "records.jsonl")
    lines.start(resolved.plan, 0)
    return Loop(resolved.plan, step, resolved.feed, [lines])


def measure(name: str, pairs: int) -> dict[str, Any]:
    make, window, share = WORKLOADS[name]
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        loops = {}
        for place, (arm, changes) in enumerate(ARMS.items()):
            (Path(folder) / str(place)).mkdir()
            torch.manual_seed(0)
            task, given = make()
            loops[arm] = loop_of(task, {**given, **changes}, Path(folder) / str(place))
        run: Callable[[Loop], object] = lambda loop: loop.run(until=loop.step.state.step + window)
        for loop in loops.values():
            run(loop)
        copies = seconds(lambda: loops["nonfinite and spike = rewind"].step.state.copied())
        for turn in range(max(5, round(pairs * share))):
            order = list(loops) if turn % 2 else list(loops)[::-1]
            for arm in order:
                times[arm].append(seconds(lambda arm=arm: run(loops[arm])) / window)  # type: ignore[misc]
    plain = summary(times["off"])["median"]
    row: dict[str, Any] = {"workload": name, "off, us a step": 1e6 * plain, "one copy, ms": 1e3 * copies}
    for arm in list(ARMS)[1:]:
        row[arm] = {
            "share of a step": summary([a / b - 1 for a, b in zip(times[arm], times["off"])]),
            "us a step": summary([1e6 * (a - b) for a, b in zip(times[arm], times["off"])]),
        }
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=31)
    pairs = parser.parse_args(arguments).pairs
    torch.set_num_threads(1)
    rows = [measure(name, pairs) for name in WORKLOADS]
    for row in rows:
        for arm in list(ARMS)[1:]:
            share, extra = row[arm]["share of a step"], row[arm]["us a step"]
            print(
                f"{row['workload']:24} {arm:30} {share['median']:+.2%} [{share['low']:+.2%}, {share['high']:+.2%}]"
                f"  {extra['median']:+.1f} us of {row['off, us a step']:.0f}  n={share['n']}"
            )
    print(keep("guard", rows, "python -m benchmarks.guard"))


if __name__ == "__main__":
    main()
