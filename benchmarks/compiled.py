"""The compiled step on a CPU: plain operators, compile = "step" and a plain loop of torch with a fused AdamW, in turn.

All train the same model on the same windows in one process with one thread. Times are CPU time of the process, so that others on
the machine count for little; what is compared are steps done one after the other. The seconds to the first step, which compiling
takes, are told apart.

    python -m benchmarks.compiled [--pairs 21]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.keep import keep, summary
from thalweg.core import Recipe, Split, Task
from thalweg.engine import build, resolve
from thalweg.recipes import find_task, recipe_for

LR, DECAY = 1e-3, 0.1


def tiny() -> tuple[Task, dict[str, Any]]:
    """The MLP of 64-128-10 that every step of is overhead."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def loss(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    draw = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(4096, 64, generator=draw), "y": torch.randint(0, 10, (4096,), generator=draw)}
    return Task(model=model, loss=loss, data=Split(train=data)), {"train.batch": 64}


def digits() -> tuple[Task, dict[str, Any]]:
    task = find_task("digits")
    return task, recipe_for(task).flat()


#: name: (task and recipe, steps in a timed window)
WORKLOADS: dict[str, tuple[Callable[[], tuple[Task, dict[str, Any]]], int]] = {
    "tiny MLP 64-128-10": (tiny, 200),
    "digits": (digits, 4),
}


def engine(task: Task, given: dict[str, Any], compiled: str) -> tuple[Callable[[int], None], float]:
    """(something that takes so many steps, seconds until the first was done)."""
    fixed = {
        "device": "cpu",
        "precision": "fp32",
        "train.steps": 1_000_000,
        "schedule.lr": "constant()",
        "optimizer.rule": "adamw",
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "checkpoint.every": 0,
        "evaluate.every": 0,
        "compile": compiled,
    }
    resolved = resolve(task, Recipe().override({**given, **fixed}))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    windows = resolved.feed.windows(0, 1_000_000)
    begun = time.perf_counter()
    step.run(next(windows))
    first = time.perf_counter() - begun

    def run(steps: int) -> None:
        for _ in range(steps):
            step.run(next(windows))

    return run, first


def by_hand(task: Task, given: dict[str, Any]) -> Callable[[int], None]:
    """The loop that everybody writes: AdamW(fused=True), clipping to norm 1, on the windows of the same feed."""
    resolved = resolve(
        task, Recipe().override({**given, "device": "cpu", "precision": "fp32", "train.steps": 1_000_000})
    )
    model, windows = resolved.model, resolved.feed.windows(0, 1_000_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            for batch in next(windows):
                value = resolved.loss(model, batch)
                loss = value[0] / value[1] if isinstance(value, tuple) else value
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


def measure(name: str, pairs: int) -> dict[str, Any]:
    make, steps = WORKLOADS[name]
    runs: dict[str, Callable[[int], None]] = {"by hand": by_hand(*make())}
    firsts: dict[str, float] = {}
    for compiled in ("off", "step"):
        runs[compiled], firsts[compiled] = engine(*make(), compiled)
    times: dict[str, list[float]] = {arm: [] for arm in runs}
    for run in runs.values():
        run(steps)
    for turn in range(pairs):
        for arm in list(runs) if turn % 2 else list(runs)[::-1]:
            begun = time.process_time()
            runs[arm](steps)
            times[arm].append((time.process_time() - begun) / steps)
    return {
        "workload": name,
        "us a step": {arm: summary([1e6 * t for t in values]) for arm, values in times.items()},
        "step over off": summary([a / b for a, b in zip(times["off"], times["step"])]),
        "step over by hand": summary([a / b for a, b in zip(times["by hand"], times["step"])]),
        "seconds to the first step": firsts,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    pairs = parser.parse_args(arguments).pairs
    torch.set_num_threads(1)
    rows = [measure(name, pairs) for name in WORKLOADS]
    for row in rows:
        figures = ", ".join(f"{arm} {value['median']:.0f} us" for arm, value in row["us a step"].items())
        over, hand = row["step over off"], row["step over by hand"]
        print(
            f"{row['workload']:20} {figures}; step is {over['median']:.2f} [{over['low']:.2f}, {over['high']:.2f}] times off, "
            f"{hand['median']:.2f} times by hand; {row['seconds to the first step']['step']:.1f} s to the first step"
        )
    print(keep("compiled", rows, "python -m benchmarks.compiled"))


if __name__ == "__main__":
    main()
