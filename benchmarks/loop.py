"""Steps/s of thalweg over a competent hand-written PyTorch loop, in turn in one process, without compiling.

Both train the same model from the same in-memory data at the same batch, in fp32, with fused AdamW, decay on matrices alone,
clipping by global norm, and a cosine schedule. thalweg also writes its record of every step to a file; the hand-written loop
writes nothing.

    python -m benchmarks.loop [--pairs 61]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.keep import keep, summary
from thalweg.core import Recipe, Split, Task
from thalweg.engine import Loop, build, resolve
from thalweg.recipes.models.convnet import ConvNet
from thalweg.recipes.models.gpt import GPT
from thalweg.watch import JsonLines

LR, DECAY, CLIP, STEPS = 1e-3, 0.01, 1.0, 1_000_000


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def classify(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def next_token(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def images(*shape: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4096, *shape), "y": torch.randint(0, 10, (4096,))}


def text() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 96, (4096, 65))
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}


#: name: (model, data, loss, batch, steps in a timed window)
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, int, int]] = {
    "tiny MLP 64-128-128-10": (mlp, lambda: images(64), classify, 64, 400),
    "digits net": (lambda: ConvNet(dropout=0.2), lambda: images(1, 8, 8), classify, 64, 60),
    "GPT, 4 layers of 128": (lambda: GPT(vocab=96, context=64), text, next_token, 12, 15),
}


def by_hand(model: nn.Module, data: dict[str, torch.Tensor], loss: Any, batch: int) -> Iterator[None]:
    """The competent loop: one update each time it is asked."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    params, num, step = matrices + others, len(data["x"]), 0
    model.train()
    while True:
        order = torch.randperm(num)
        for start in range(0, num, batch):
            chosen = order[start : start + batch]
            value = loss(model, {"x": data["x"][chosen], "y": data["y"][chosen]})
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            yield


def ours(model: nn.Module, data: dict[str, torch.Tensor], loss: Any, batch: int, folder: Path) -> Loop:
    changes = {
        "precision": "fp32",
        "compile": "off",
        "train.steps": STEPS,
        "train.batch": batch,
        "train.clip": CLIP,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "schedule.lr": "cosine()",
        "checkpoint.every": 0,
    }
    resolved = resolve(Task(model=model, loss=loss, data=Split(train=data)), Recipe().override(changes))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    lines = JsonLines(folder / "records.jsonl")
    lines.start(resolved.plan, 0)
    loop = Loop(resolved.plan, step, resolved.feed, [lines])
    return loop


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, pairs: int) -> dict[str, Any]:
    make, make_data, loss, batch, window = WORKLOADS[name]
    torch.manual_seed(0)
    data = make_data()
    hand = by_hand(make(), data, loss, batch)
    with tempfile.TemporaryDirectory() as folder:
        loop = ours(make(), data, loss, batch, Path(folder))
        one_hand = lambda: [next(hand) for _ in range(window)]
        one_ours = lambda: loop.run(until=loop.step.state.step + window)
        one_hand(), one_ours()
        times = []
        for pair in range(pairs):
            first, second = (one_hand, one_ours) if pair % 2 else (one_ours, one_hand)
            a, b = seconds(first), seconds(second)
            times.append((a, b) if pair % 2 else (b, a))
    rates = {"by hand, steps/s": window / sorted(h for h, _ in times)[pairs // 2]}
    rates["thalweg, steps/s"] = window / sorted(t for _, t in times)[pairs // 2]
    return {"workload": name, **rates, "ratio": summary([h / t for h, t in times])}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=61)
    pairs = parser.parse_args(arguments).pairs
    rows = [measure(name, pairs) for name in WORKLOADS]
    for row in rows:
        ratio = row["ratio"]
        print(
            f"{row['workload']:24} by hand {row['by hand, steps/s']:8.1f}  thalweg {row['thalweg, steps/s']:8.1f} steps/s"
            f"  ratio {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] n={ratio['n']}"
        )
    print(keep("loop", rows, "python -m benchmarks.loop"))


if __name__ == "__main__":
    main()
