"""What each lever of a CPU is worth for a step, alone and together, and what a run chooses by itself (docs/on-a-cpu.md).

Each model is trained by the engine in a process of its own: windows of steps of all arms in turn, all but "as it chooses" held to
what they name. "plain" is fp32, contiguous, all processors, the C library as it is. Wall time, since threads are a lever.

    python -m benchmarks levers
    python -m benchmarks.levers [--rounds 9] [--only NAME]     # --rounds 3 is the short form
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.keep import keep, summary
from benchmarks.loop import classify, images, mlp, next_token, text
from benchmarks.memory_models import ResNet18
from thalweg.core import Recipe, Split, Task
from thalweg.device import allocator, threads
from thalweg.engine import build, levers, resolve
from thalweg.recipes.models.gpt import GPT

_WINDOW_S, _MOST_STEPS = 0.4, 200


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if after < 128 else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def resnet() -> nn.Module:
    model = ResNet18()
    model.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return model


#: name: (model, loss, data, batch)
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Any], int]] = {
    "tiny MLP 64-128-128-10, batch 64": (mlp, classify, lambda: images(4096, 64), 64),
    "CNN 28x28, batch 128": (cnn, classify, lambda: images(2048, 1, 28, 28), 128),
    "GPT 4 x 128, T 64, batch 12": (
        lambda: GPT(vocab=96, context=64),
        next_token,
        text,
        12,
    ),
    "ResNet-18 32x32, batch 32": (resnet, classify, lambda: images(1024, 3, 32, 32), 32),
}


def arms_of(most: int, convolutional: bool) -> dict[str, dict[str, Any]]:
    """Name: what of the recipe differs from "plain"; "keeps" is the C library's."""
    arms: dict[str, dict[str, Any]] = {"plain": {}}
    if most > 1:
        arms["1 thread"] = {"threads": 1}
    arms["bf16"] = {"precision": "bf16"}
    if convolutional:
        arms["channels last"] = {"memory_format": "channels_last"}
        arms["bf16, channels last"] = {"precision": "bf16", "memory_format": "channels_last"}
    if not allocator.against():
        arms["keeps what is freed"] = {"keeps": True}
    return {**arms, "as it chooses": {"precision": "auto", "memory_format": "auto", "threads": None, "keeps": None}}


class Arm:
    """One engine, and the state of the process that belongs to it."""

    def __init__(self, name: str, changes: dict[str, Any], most: int) -> None:
        make, loss, data, batch = MODELS[name]
        torch.manual_seed(0)
        recipe = {"precision": "fp32", "memory_format": "contiguous", "threads": most, **changes}
        keeps = recipe.pop("keeps", False)
        if keeps is False:
            os.environ[allocator.VARIABLE] = "keep"
        given = {name: value for name, value in recipe.items() if value is not None}
        given |= {"device": "cpu", "train.batch": batch, "train.steps": 2000, "schedule.lr": "constant()"}
        task = Task(model=make, loss=loss, data=Split(train=data()))
        torch.set_num_threads(most)
        begun = time.perf_counter()
        found = resolve(task, Recipe().override(given))
        self.resolved_s = time.perf_counter() - begun
        os.environ.pop(allocator.VARIABLE, None)
        self.keeps = allocator.is_raised() if keeps is None else keeps
        allocator.lower_thresholds()
        self.plan, self.feed = found.plan, found.feed
        self.step = build(found.plan, found.model, found.loss, found.device, found.policy)
        self.threads = torch.get_num_threads()
        self.num = 1

    def window(self) -> tuple[float, float]:
        """(seconds, fresh bytes) of a step."""
        torch.set_num_threads(self.threads)
        if self.keeps:
            allocator.raise_thresholds()
        windows = self.feed.windows(self.step.state.step, self.step.state.step + self.num + 1)
        self.step.run(next(windows))
        fresh, begun = allocator.fresh_bytes(), time.perf_counter()
        for window in windows:
            self.step.run(window)
        seconds, fresh, num = time.perf_counter() - begun, allocator.fresh_bytes() - fresh, self.num
        allocator.lower_thresholds()
        self.num = max(1, min(_MOST_STEPS, round(_WINDOW_S * num / seconds)))
        return seconds / num, fresh / num


def measure(name: str, rounds: int) -> dict[str, Any]:
    most = threads.cores()
    arms = {arm: Arm(name, changes, most) for arm, changes in arms_of(most, "Net" in name or "CNN" in name).items()}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    fresh: dict[str, float] = {}
    for turn in range(rounds + 1):
        for arm in list(arms) if turn % 2 else list(arms)[::-1]:
            seconds, fresh[arm] = arms[arm].window()
            if turn:
                times[arm].append(seconds)
    chosen = arms["as it chooses"].plan
    row: dict[str, Any] = {
        "model": name,
        "arms": {
            arm: {
                "ms a step": summary([1e3 * s for s in found]),
                "times as fast as plain": summary([a / b for a, b in zip(times["plain"], found)]),
                "fresh MiB a step": fresh[arm] / 2**20,
            }
            for arm, found in times.items()
        },
    }
    paths = ("precision", "memory_format", "threads", "allocator")
    row["chosen"] = {made.path: f"{made.value}: {made.reason}" for made in chosen.decisions if made.path in paths}
    row["choosing, s"] = arms["as it chooses"].resolved_s - arms["plain"].resolved_s
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside:
        with levers.kept():
            print(json.dumps(measure(given.inside, given.rounds)))
        return
    rows = []
    for name in MODELS:
        if given.only and given.only not in name:
            continue
        call = [sys.executable, "-m", "benchmarks.levers", "--inside", name, "--rounds", str(given.rounds)]
        free = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        ran = subprocess.run(call, capture_output=True, text=True, check=True, env=free)
        row = json.loads(ran.stdout)
        rows.append(row)
        for arm, told in row["arms"].items():
            ms, gain = told["ms a step"], told["times as fast as plain"]
            print(
                f"{name:34} {arm:22} {ms['median']:9.3f} ms  x{gain['median']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
                f"  {told['fresh MiB a step']:.1f} MiB fresh  n={ms['n']}",
                flush=True,
            )
        print(f"{name:34} choosing took {row['choosing, s']:.2f} s: {row['chosen']}", flush=True)
    if not given.only:
        print(keep("levers", rows, "python -m benchmarks levers"))


if __name__ == "__main__":
    main()
