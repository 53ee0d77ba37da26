"""Predicted against measured peak of training: five models, three batch sizes, with and without recomputation.

Each configuration runs in a process of its own: the plan is made, the peak predicted, steps are taken, the system is asked for
the largest resident set. Two errors are told: of the whole process, and of what training added to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.keep import keep
from benchmarks.memory_models import ResNet18, ViTTiny
from thalweg.core import Loss, Recipe, Task
from thalweg.device import memory
from thalweg.engine import build, resolve
from thalweg.engine.memory.predict import predict
from thalweg.engine.memory.trace import trace_line
from thalweg.optim import named_trainable, parameter_table
from thalweg.optim.sizes import state_sizes
from thalweg.recipes import find_task, recipe_for
from thalweg.recipes.models.gpt import GPT

STEPS = 20
SIZES = {
    "digits": (64, 256, 1024),
    "pycode": (8, 32, 64),
    "resnet18": (8, 32, 64),
    "vit-tiny": (2, 8, 16),
    "gpt-50m": (1, 4, 8),
}
MOST_STEPS = {"gpt-50m": 4, "resnet18": 8, "vit-tiny": 8}  # a peak is reached in the first few


def _images(side: int) -> Any:
    draw = torch.Generator().manual_seed(0)
    return {"x": torch.randn(256, 3, side, side, generator=draw), "y": torch.randint(10, (256,), generator=draw)}


def _classify(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    return Loss(F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))


def _tokens() -> Any:
    return {"t": torch.randint(256, (128, 257), generator=torch.Generator().manual_seed(0))}


def _next(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    logits, wanted = model(batch["t"][:, :-1]), batch["t"][:, 1:]
    return Loss(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"), wanted.numel())


def task_of(name: str) -> tuple[Task, Recipe]:
    if name in ("digits", "pycode"):
        task = find_task(name)
        return task, recipe_for(task)
    task = {
        "resnet18": lambda: Task(name=name, model=ResNet18, loss=_classify, data=_images(96)),
        "vit-tiny": lambda: Task(name=name, model=ViTTiny, loss=_classify, data=_images(224)),
        "gpt-50m": lambda: Task(
            name=name, model=lambda: GPT(width=512, heads=8, layers=16, context=256), loss=_next, data=_tokens()
        ),
    }[name]()
    return task, Recipe()


class Again(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False) if self.training else self.block(x)


def recomputing(model: nn.Module) -> nn.Module:
    blocks = getattr(model, "blocks", model)
    for name, block in list(blocks.named_children()):
        if any(True for _ in block.parameters()):
            setattr(blocks, name, Again(block))
    return model


def one(name: str, batch: int, recompute: bool, precision: str, steps: int) -> dict[str, Any]:
    """Predict, then train."""
    task, recipe = task_of(name)
    recipe = recipe.override(
        {
            "train.batch": batch,
            "train.steps": steps,
            "precision": precision,
            "device": "cpu",
            "train.micro_batch": batch,
        }
    )
    resolved = resolve(task, recipe)
    device, plan = resolved.device, resolved.plan
    model = recomputing(resolved.model) if recompute else resolved.model
    first = next(iter(resolved.feed.windows(0, 1)))
    rows = plan.parameters
    if recompute:
        rows = parameter_table(model, optimizer=plan.recipe.optimizer, schedule=plan.recipe.schedule)
        plan = replace(plan, parameters=rows)
    sizes = state_sizes(named_trainable(model), rows, plan.recipe.optimizer, average=plan.recipe.regularize.averages)
    line = trace_line(model, resolved.loss, first[0], device, resolved.policy)  # of shapes alone
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    ledger = predict(line.at(batch), sizes, device, micro_batches=len(first), buffers=buffers)
    step = build(plan, model, resolved.loss, device, resolved.policy)
    memory.release(device)
    memory.reset_peak(device)
    for window in resolved.feed.windows(0, steps):
        step.run(window)
    measured = memory.peak(device)
    assert measured is not None
    return {
        "model": name,
        "batch": batch,
        "recompute": recompute,
        "precision": resolved.policy.name,
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
        f"{row['model']:9} {row['batch']:5} {'again' if row['recompute'] else 'kept':5} predicted {mib['predicted']:7.1f} MiB,"
        f" measured {mib['measured']:7.1f}: {row['error']:+6.1%}; beyond the process's {mib['process']:.0f}:"
        f" {row['error of growth']:+6.1%}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--one", default="", help="one configuration, as JSON, in this process")
    parser.add_argument("--models", nargs="*", default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="*", help="batch sizes; as listed above if left out")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args(arguments)
    if asked.one:
        print(json.dumps(one(**json.loads(asked.one))))
        return
    rows = []
    for name, recompute in itertools.product(asked.models, (False, True)):
        for batch in asked.sizes or SIZES[name]:
            given = {"name": name, "batch": batch, "recompute": recompute}
            given |= {"precision": asked.precision, "steps": min(asked.steps, MOST_STEPS.get(name, asked.steps))}
            command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(given)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(told(rows[-1]), flush=True)
    for which in ("error", "error of growth"):
        found = [abs(row[which]) for row in rows]
        print(f"{which}: median {statistics.median(found):.1%}, most {max(found):.1%}")
    if asked.models == list(SIZES) and not asked.sizes:
        print(keep("memory", rows, f"python -m benchmarks.memory --precision {asked.precision}"))


if __name__ == "__main__":
    main()
