"""Predicted against measured peak of training: five models, three batch sizes, with and without recomputation.

Each configuration is a run of ``thalweg.run.train_task`` in a process of its own. Predicted is what stands in the run's plan;
measured is the largest resident set that the system saw from the first step on, which a run tells after 20 steps. Two errors
are told: of the whole process, and of what training takes beyond the process's own bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.keep import keep
from benchmarks.memory_models import ResNet18, ViTTiny
from thalweg.core import Evaluation, Event, Loss, Plan, Recipe, Record, Split, StopReason, Task
from thalweg.device import choose, memory
from thalweg.recipes import find_task, recipe_for
from thalweg.recipes.models.convnet import ConvNet
from thalweg.recipes.models.gpt import GPT
from thalweg.run import train_task

STEPS = 20
SIZES = {
    "digits": (64, 256, 1024),
    "pycode": (8, 32, 64),
    "resnet18": (8, 32, 64),
    "vit-tiny": (2, 8, 16),
    "gpt-50m": (1, 2, 4),
}
MOST_STEPS = {"resnet18": 8, "vit-tiny": 8, "gpt-50m": 4}  # they take seconds a step
#: Also with two threads: (model, batch, recompute).
TWO_THREADS = (("digits", 256, "none"), ("resnet18", 8, "none"), ("vit-tiny", 8, "blocks"))


def _images(num: int, side: int) -> Any:
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(num, 3, side, side, generator=draw), "y": torch.randint(10, (num,), generator=draw)}


def _classify(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    return Loss(F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))


def _tokens() -> Any:
    return {"t": torch.randint(256, (64, 257), generator=torch.Generator().manual_seed(0))}


def _next(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    logits, wanted = model(batch["t"][:, :-1]), batch["t"][:, 1:]
    return Loss(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"), wanted.numel())


def task_of(name: str) -> tuple[Task, Recipe]:
    """A task and its recipe; what the tasks of the library hold out is left out, for the peak is training's."""
    if name in ("digits", "pycode"):
        task = find_task(name)
        split = task.data() if callable(task.data) else task.data
        assert isinstance(split, Split)
        return replace(task, data=replace(split, test=None), metrics=None, sample=None), recipe_for(task)
    tasks = {
        "resnet18": lambda: Task(name=name, model=ResNet18, loss=_classify, data=_images(128, 96)),
        "vit-tiny": lambda: Task(name=name, model=ViTTiny, loss=_classify, data=_images(32, 224)),
        "gpt-50m": lambda: Task(
            name=name, model=lambda: GPT(width=512, heads=8, layers=16, context=256), loss=_next, data=_tokens()
        ),
    }
    return tasks[name](), Recipe()


def in_blocks(width: int = 32, dropout: float = 0.2) -> nn.Module:
    """The net of digits with its layers in blocks, a block for each convolution: as it is, it has none to recompute."""
    blocks: list[nn.Module] = []
    for layer in ConvNet(classes=10, width=width, dropout=dropout):
        if isinstance(layer, (nn.Conv2d, nn.AdaptiveAvgPool2d)):
            blocks.append(nn.Sequential())
        last = blocks[-1]
        assert isinstance(last, nn.Sequential)
        last.append(layer)
    return nn.Sequential(*blocks)


class Peak:
    """A sink that asks the system for the peak whenever steps are recorded."""

    def __init__(self) -> None:
        self.device, _ = choose("cpu")
        self.steps_seen, self.bytes = 0, 0

    def start(self, plan: Plan, step: int) -> None:
        pass

    def steps(self, records: list[Record]) -> None:
        self.steps_seen += len(records)
        self.bytes = memory.peak(self.device) or 0

    def evaluation(self, evaluation: Evaluation) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def stop(self, reason: StopReason) -> None:
        pass


def one(name: str, batch: int, recompute: str, precision: str, steps: int) -> dict[str, Any]:
    """One run: what its plan predicted, and what was measured."""
    task, recipe = task_of(name)
    changes = {"train.batch": batch, "train.micro_batch": batch, "train.steps": steps, "recompute": recompute}
    recipe = recipe.override({**changes, "precision": precision, "device": "cpu", "evaluate.best": "loss"})
    if name == "digits" and recompute != "none":
        task = replace(task, model=in_blocks)
    peak = Peak()
    plan = train_task(task, recipe, sinks=[peak]).plan
    ledger, measured = plan.ledger, peak.bytes
    assert ledger is not None and peak.steps_seen == steps
    return {
        "model": name,
        "batch": batch,
        "recompute": recompute,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "predicted": ledger.peak,
        "measured": measured,
        "error": ledger.peak / measured - 1,
        "error of growth": (ledger.peak - ledger.process) / (measured - ledger.process) - 1,
        **dict(ledger.rows()),
    }


def told(row: dict[str, Any]) -> str:
    mib = {name: row[name] / 2**20 for name in ("predicted", "measured", "process")}
    return (
        f"{row['model']:9} {row['batch']:5} {row['recompute']:6} {row['threads']} threads: predicted"
        f" {mib['predicted']:7.1f} MiB, measured {mib['measured']:7.1f}: {row['error']:+6.1%};"
        f" beyond the process's {mib['process']:.0f}: {row['error of growth']:+6.1%}"
    )


def in_its_process(given: dict[str, Any], threads: int) -> dict[str, Any]:
    """``one`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--one", default="", help="one configuration, as JSON, in this process")
    parser.add_argument("--models", nargs="*", default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="*", help="batch sizes; as listed above if left out")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=0, help="20, and fewer for large models, if left out")
    asked = parser.parse_args(arguments)
    if asked.one:
        print(json.dumps(one(**json.loads(asked.one))))
        return
    whole = asked.models == list(SIZES) and not asked.sizes
    wanted = [
        (name, batch, how, 1)
        for name, how in itertools.product(asked.models, ("none", "blocks"))
        for batch in asked.sizes or SIZES[name]
    ]
    rows = []
    for name, batch, how, threads in [*wanted, *((*few, 2) for few in TWO_THREADS if whole)]:
        steps = asked.steps or MOST_STEPS.get(name, STEPS)
        given = {"name": name, "batch": batch, "recompute": how, "precision": asked.precision, "steps": steps}
        rows.append(in_its_process(given, threads))
        print(told(rows[-1]), flush=True)
    for which in ("error", "error of growth"):
        found = [abs(row[which]) for row in rows]
        print(f"{which}: median {statistics.median(found):.1%}, most {max(found):.1%}")
    if whole:
        print(keep("memory", rows, f"python -m benchmarks.memory --precision {asked.precision}"))


if __name__ == "__main__":
    main()
