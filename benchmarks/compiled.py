"""The compiled step on a CPU: a loop by hand, plain operators, compile = "step" one and several a call, and "auto", in turn.

All train the same model on the same data in one process with one thread, in windows of steps in turn; times are of the clock, so
run it on a quiet machine. Every arm but the loop by hand writes its records. "auto" leaves precision and compile to the plan, for
a run of the steps that are told: where it compiles nothing it is the eager step, in the precision that was found faster.

    python -m benchmarks.compiled [--pairs 15] [--only tiny] [--arms hand,off,auto]

The model and its repeated blocks beside the whole step, for GPTs of 4 and 12 layers, nothing in the cache (about four minutes):

    python -m benchmarks.compiled --blocks [--pairs 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.keep import keep, rows_of, summary
from benchmarks.loop import CLIP, DECAY, LR, Workload, by_hand, classify, images, mlp, next_token, text
from thalweg.core import Recipe, Split, Task
from thalweg.engine import Loop, build, resolve
from thalweg.engine.compiled_backend import Compiler
from thalweg.engine.compiled_cache import use_cache
from thalweg.recipes.models.convnet import ConvNet
from thalweg.recipes.models.gpt import GPT
from thalweg.watch import JsonLines

#: name: (model, data, loss, batch, steps in a timed window, steps of a run as "auto" is told)
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, int, int, int]] = {
    "tiny MLP 64-128-128-10": (mlp, lambda: images(4096, 64), classify, 64, 400, 1_000_000),
    "digits net": (lambda: ConvNet(dropout=0.2), lambda: images(4096, 1, 8, 8), classify, 64, 40, 276),
    "GPT, 4 layers of 128": (lambda: GPT(vocab=96, context=64), text, next_token, 12, 10, 2000),
}
#: As these, for ``--blocks``.
DEEP: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, int, int, int]] = {
    "GPT, 4 layers of 128": WORKLOADS["GPT, 4 layers of 128"],
    "GPT, 12 layers of 128": (lambda: GPT(vocab=96, context=64, layers=12), text, next_token, 12, 5, 2000),
}
ARMS: dict[str, dict[str, Any]] = {
    "off": {"compile": "off", "precision": "fp32"},
    "step 1": {"compile": "step", "precision": "fp32", "steps_per_call": 1},
    "step": {"compile": "step", "precision": "fp32"},
    "auto": {},
}
PARTS: dict[str, dict[str, Any]] = {
    "off": ARMS["off"],
    "model": {"compile": "model", "precision": "fp32"},
    "blocks": {"compile": "blocks", "precision": "fp32"},
    "step": ARMS["step"],
}


class Arm:
    """One way of taking the steps of a workload.

    Attributes:
        told: what it is, and the seconds that its plan and its first step took.
    """

    def __init__(self, workload: str, changes: dict[str, Any], folder: Path) -> None:
        make, make_data, loss, batch, _, steps = {**WORKLOADS, **DEEP}[workload]
        torch.manual_seed(0)
        fixed = {
            "device": "cpu",
            "train.steps": steps,
            "train.batch": batch,
            "train.clip": CLIP,
            "optimizer.lr": LR,
            "optimizer.weight_decay": DECAY,
            "schedule.lr": "cosine()",
            "checkpoint.every": 0,
        }
        begun = time.perf_counter()
        task = Task(model=make(), loss=loss, data=Split(train=make_data()))
        resolved = resolve(task, Recipe().override({**fixed, **changes}))
        plan = replace(resolved.plan, steps=1_000_000)  # decided for a run of few, it is timed for longer
        step = build(plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
        lines = JsonLines(folder / "records.jsonl")
        lines.start(plan, 0)
        self.loop = Loop(plan, step, resolved.feed, [lines])
        planned = time.perf_counter()
        self.loop.run(until=1)
        recipe = resolved.plan.recipe
        self.told = {
            "compile": recipe.compile,
            "precision": recipe.precision,
            "why": [d.reason for d in resolved.plan.decisions if d.path == "compile"][-1:],
            "seconds to plan": planned - begun,
            "seconds of the first step": time.perf_counter() - planned,
        }

    def run(self, steps: int) -> None:
        self.loop.run(until=self.loop.step.state.step + steps)


def measure(name: str, pairs: int, arms: list[str]) -> dict[str, Any]:
    make, make_data, loss, batch, steps, _ = {**WORKLOADS, **DEEP}[name]
    torch.manual_seed(0)
    work = Workload(name, make, make_data, loss, batch, steps)
    hand = by_hand(make(), make_data(), work)
    runs: dict[str, Callable[[int], object]] = {"by hand": lambda steps: [next(hand) for _ in range(steps)]}
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            at = Path(folder) / arm
            at.mkdir()
            one = Arm(name, {**ARMS, **PARTS}[arm], at)
            runs[arm], told[arm] = one.run, one.told
        times: dict[str, list[float]] = {arm: [] for arm in runs}
        for run in runs.values():
            run(steps)
        for turn in range(pairs):
            for arm in list(runs) if turn % 2 else list(runs)[::-1]:
                begun = time.perf_counter()
                runs[arm](steps)
                times[arm].append((time.perf_counter() - begun) / steps)
    return {
        "workload": name,
        "us a step": {arm: summary([1e6 * t for t in values]) for arm, values in times.items()},
        "over by hand": {arm: summary([a / b for a, b in zip(times["by hand"], times[arm])]) for arm in runs},
        "arms": told,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=None, help="turns; 15, with --blocks 5")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--arms", default="", help="of those, by name")
    parser.add_argument("--blocks", action="store_true", help="the model and its blocks, nothing in the cache")
    words = parser.parse_args(arguments)
    if words.blocks and words.only not in DEEP:  # a process each: blocks of one would be in the memory of the next
        for name in (name for name in DEEP if words.only in name):
            given = ["--pairs", str(words.pairs or 5), "--arms", words.arms, "--only", name]
            subprocess.run([sys.executable, "-m", "benchmarks.compiled", "--blocks", *given], check=True)
        return
    torch.set_num_threads(1)
    rows = []
    arms, pairs = (PARTS, 5) if words.blocks else (ARMS, 15)
    folder = tempfile.TemporaryDirectory()
    if words.blocks:
        os.environ["THALWEG_CACHE"] = folder.name
        _warm()
    for name in DEEP if words.blocks else WORKLOADS:
        if words.only not in name:
            continue
        row = measure(name, words.pairs or pairs, words.arms.split(",") if words.arms else list(arms))
        rows.append(row)
        print(f"{name}: by hand {row['us a step']['by hand']['median']:.0f} us a step")
        for arm, told in row["arms"].items():
            us, over = row["us a step"][arm]["median"], row["over by hand"][arm]
            print(
                f"  {arm:18} {us:8.0f} us, {over['median']:.2f} [{over['low']:.2f}, {over['high']:.2f}] times by hand; "
                f"compile={told['compile']}, {told['precision']}; plan {told['seconds to plan']:.1f} s, "
                f"first step {told['seconds of the first step']:.1f} s"
            )
    name, command = ("compiled_blocks", " --blocks") if words.blocks else ("compiled", "")
    if words.only:  # the others stay as they were
        known = DEEP if words.blocks else WORKLOADS
        rows += [row for row in rows_of(name) if row["workload"] in known and words.only not in row["workload"]]
    print(keep(name, rows, f"python -m benchmarks.compiled{command}"))
    folder.cleanup()


def _warm() -> None:
    """What the first graph of a process pays for all: the compiler's import, and headers that it compiles beforehand."""
    compiled = Compiler("inductor").shared()
    use_cache()
    compiled(nn.Linear(8, 8), torch.ones(2, 8)).sum().backward()


if __name__ == "__main__":
    main()
