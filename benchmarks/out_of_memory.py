"""Runs that are made to run out of memory against runs that are not: how many end with the same weights.

Two models with dropout keyed by sample, each forced in three ways: every 7th micro-batch fails at an operator drawn by chance;
micro-batches above a size fail at an operator drawn by chance; and a real limit of the address space that the given
micro-batch does not fit into. In float64, where another order of summation is far below any mistake, and in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.keep import keep
from thalweg.core import Loss, Recipe, Split, Task
from thalweg.data import batch_size
from thalweg.engine import Step, build, resolve
from thalweg.engine.losses import sum_and_weight
from thalweg.recipes.models.gpt import GPT

EVERY = 7
CLOSE = {
    "float64": 1e-10,
    "float32": 1e-3,
}  # largest difference of a weight, over the largest weight, that is called equal
KINDS = ("every 7th micro-batch", "above a size", "address space")
Fails = Callable[[int, int], bool]


class Faults(TorchDispatchMode):
    """An allocator that fails: inside, a micro-batch that is to fail does so at one of its operators, drawn by chance.

    Args:
        fails: ``fails(attempt, samples)``, attempts counted from 1.
        share: of the operators of a micro-batch, from where to where the failure may strike.
    """

    def __init__(self, fails: Fails, seed: int, share: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fails, self.draw, self.share = fails, random.Random(seed), share
        self.range = 0, 1
        self.attempts = self.struck = self.count = 0
        self.at = -1

    def begin(self, ops: int) -> None:
        """Training begins, with so many operators a micro-batch; attempts before it do not count."""
        self.range = int(self.share[0] * ops), max(int(self.share[1] * ops), 1)
        self.attempts, self.at = 0, -1

    def loss(self, function: Callable[..., Any]) -> Callable[[nn.Module, Any], Any]:
        """The loss function, told to this: each call in training is an attempt."""

        def attempt(model: nn.Module, batch: Any) -> Any:
            if torch.is_grad_enabled():
                self.attempts += 1
                self.count = 0
                self.at = self.draw.randrange(*self.range) if self.fails(self.attempts, batch_size(batch)) else -1
            return function(model, batch)

        return attempt

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 != self.at:
            return func(*args, **(kwargs or {}))
        self.at, self.struck = -1, self.struck + 1
        if self.draw.random() < 0.5:  # before or behind the operator: what it writes is written, or not
            func(*args, **(kwargs or {}))
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")


def operators(model: nn.Module, loss: Callable[..., Any], batch: Any) -> int:
    """How many operators the forward and backward pass of a micro-batch have, with the addition of its gradients."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    counter = Faults(lambda attempt, samples: False, 0)
    with torch.random.fork_rng(devices=[]), counter:
        total, _ = sum_and_weight(counter.loss(loss)(twin, batch), batch)
        total.backward()
    return counter.count


class Images(nn.Module):
    """A small convolutional net without batch normalization."""

    def __init__(self, width: int, dropout: float, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(2 * width * side * side // 4, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def images_loss(model: nn.Module, batch: Any) -> Loss:
    return Loss(F.cross_entropy(model(batch["images"]), batch["labels"], reduction="sum"), len(batch["labels"]))


def text_loss(model: nn.Module, batch: Any) -> Loss:
    logits, targets = model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:]
    return Loss(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel())


def task(name: str, seed: int, dtype: torch.dtype, *, large: bool = False) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """(model, loss, data). ``large``: a micro-batch takes hundreds of megabytes."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if name == "digits":
        side = 32 if large else 8
        x = torch.randn(256, 1, side, side, generator=draw, dtype=dtype)
        data = {"images": x, "labels": torch.randint(0, 10, (256,), generator=draw)}
        return Images(32 if large else 8, 0.3, side).to(dtype), images_loss, data
    size: dict[str, Any] = (
        {"context": 64, "width": 128, "layers": 2} if large else {"context": 16, "width": 32, "layers": 2}
    )
    model = GPT(vocab=64, heads=4, dropout=0.1, **size).to(dtype)
    return model, text_loss, {"tokens": torch.randint(0, 64, (256, size["context"] + 1), generator=draw)}


def train(
    name: str, seed: int, dtype: torch.dtype, *, steps: int, batch: int, micro_batch: int, fails: Fails | None = None,
    large: bool = False, before: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Step, int]:  # fmt: skip
    """(weights at the end, the step, failures), of a run in this process.

    Args:
        before: called when all is built and nothing has been trained.
    """
    model, loss, data = task(name, seed, dtype, large=large)
    faults = Faults(fails or (lambda attempt, samples: False), seed)
    recipe = Recipe().override({
        "seed": seed, "precision": "fp32", "train.steps": steps, "train.batch": batch, "train.micro_batch": micro_batch,
        "schedule.lr": "warmup(1) >> cosine(to=0.1)", "regularize.by_sample": True, "regularize.average": 0.9,
        "optimizer.weight_decay": 0.1,
    })  # fmt: skip
    resolved = resolve(Task(model=model, loss=faults.loss(loss), data=Split(train=data)), recipe)
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    faults.begin(operators(resolved.model, loss, {k: v[:2] for k, v in data.items()}) if fails else 1)
    before()
    for window in resolved.feed.windows(0, steps):
        if fails is None:
            step.run(window)
        else:
            with faults:
                step.run(window)
    return torch.cat([p.detach().flatten() for p in resolved.model.parameters()]), step, faults.struck


def difference(forced: Tensor, free: Tensor) -> float:
    """Largest difference of a weight, over the largest weight."""
    return float((forced - free).abs().max() / free.abs().max())


def limited(name: str, seed: int, dtype: torch.dtype, steps: int, room: int) -> dict[str, Any]:
    """A run in a process of its own whose address space ends ``room`` bytes beyond what it has when training begins."""
    spec = {"name": name, "seed": seed, "dtype": str(dtype).removeprefix("torch."), "steps": steps, "room": room}
    code = "import sys, json; from benchmarks.out_of_memory import in_process; in_process(json.loads(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(spec)], capture_output=True, text=True, env=environment,
                          cwd=Path(__file__).parent.parent, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_process(spec: dict[str, Any]) -> None:
    """Both runs of ``limited``, the free one first; prints what came of them."""
    torch.set_num_threads(1)

    def limit() -> None:
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + spec["room"], resource.RLIM_INFINITY))

    dtype = getattr(torch, spec["dtype"])
    common: dict[str, Any] = {"steps": spec["steps"], "batch": 64, "large": True}
    free, _, _ = train(spec["name"], spec["seed"], dtype, micro_batch=4, **common)
    forced, step, _ = train(spec["name"], spec["seed"], dtype, micro_batch=64, before=limit, **common)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps({"difference": difference(forced, free), "micro-batch at the end": step.state.limit.most}))


ROOM = {
    ("digits", 8): 48 << 20,
    ("digits", 4): 24 << 20,
    ("gpt", 8): 64 << 20,
    ("gpt", 4): 32 << 20,
}  # by bytes a number


def measure(kind: str, name: str, dtype: torch.dtype, *, runs: int, steps: int) -> dict[str, Any]:
    found, sizes, failures = [], [], 0
    for seed in range(runs):
        common: dict[str, Any] = {"steps": steps, "batch": 32, "micro_batch": 8 if kind == KINDS[0] else 32}
        if kind == KINDS[2]:
            told = limited(name, seed, dtype, min(steps, 4), ROOM[name, dtype.itemsize])
            found.append(told["difference"])
            sizes.append(told["micro-batch at the end"])
            failures += bool(sizes[-1])
            continue
        most = random.Random(seed).choice((1, 3, 8, 16))
        fails: Fails = (lambda attempt, num: attempt % EVERY == 0) if kind == KINDS[0] else (lambda attempt, num, m=most: num > m)  # type: ignore[misc]  # fmt: skip
        free, _, _ = train(name, seed, dtype, **common)
        forced, step, struck = train(name, seed, dtype, fails=fails, **common)
        found.append(difference(forced, free))
        sizes.append(step.state.limit.most)
        failures += struck
    precision = str(dtype).removeprefix("torch.")
    equal = sum(value <= CLOSE[precision] for value in found)
    return {"forced by": kind, "model": name, "dtype": precision, "runs": runs, "failures": failures, "equal": equal,
            "equal means": CLOSE[precision], "largest difference": max(found), "micro-batches": sizes}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.out_of_memory", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args(arguments)
    rows = []
    for kind in KINDS:
        for name in ("digits", "gpt"):
            for dtype in (torch.float64, torch.float32):
                row = measure(kind, name, dtype, runs=asked.runs, steps=asked.steps)
                rows.append(row)
                print(f"{kind:22} {name:7} {row['dtype']:8} {row['equal']} of {row['runs']} equal,"
                      f" largest difference {row['largest difference']:.1e}, {row['failures']} failures", flush=True)  # fmt: skip
    print(keep("out_of_memory", rows, f"python -m benchmarks.out_of_memory --runs {asked.runs} --steps {asked.steps}"))


if __name__ == "__main__":
    main()
