"""Steps/s of thalweg over a competent hand-written PyTorch loop, in turn in one process, without compiling.

Both train the same model from the same in-memory data at the same batch, with fused AdamW, decay on matrices alone,
clipping by global norm, and a cosine schedule. thalweg also writes its record of every step to a file; the hand-written loop
writes nothing.

    python -m benchmarks.loop [--pairs 61] [--only mlp,cnn,gpt,gpt-bf16,resnet,digits] [--cpu]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.keep import keep, summary
from benchmarks.loop_models import classify, images, next_token, text
from benchmarks.speed.nets import Cnn, ResNet, mlp
from thalweg.core import Recipe, Split, Task
from thalweg.engine import Loop, build, resolve
from thalweg.recipes.models.convnet import ConvNet
from thalweg.recipes.models.gpt import GPT
from thalweg.watch import JsonLines

LR, DECAY, CLIP, STEPS = 1e-3, 0.01, 1.0, 1_000_000


@dataclass(frozen=True)
class Workload:
    """What both loops train.

    Attributes:
        batch: samples in a micro-batch.
        window: steps in a timed window.
        accumulate: micro-batches in a step.
        bf16: whether forward passes are under bfloat16 autocast.
    """

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], dict[str, torch.Tensor]]
    loss: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    batch: int
    window: int
    accumulate: int = 1
    bf16: bool = False


def gpt() -> nn.Module:
    return GPT(vocab=96, context=64)


WORKLOADS = {
    "mlp": Workload("tiny MLP 64-128-128-10", mlp, lambda: images(4096, 64), classify, 64, 400),
    "cnn": Workload("CNN 28x28", Cnn, lambda: images(2048, 1, 28, 28), classify, 128, 4),
    "gpt": Workload("GPT, 4 layers of 128", gpt, text, next_token, 12, 15),
    "gpt-bf16": Workload("the same, 4 x bf16", gpt, text, next_token, 12, 4, 4, True),
    "resnet": Workload("ResNet 32x32", ResNet, lambda: images(1024, 3, 32, 32), classify, 32, 3),
    "digits": Workload("digits net", lambda: ConvNet(dropout=0.2), lambda: images(4096, 1, 8, 8), classify, 64, 60),
}


def by_hand(model: nn.Module, data: dict[str, torch.Tensor], work: Workload) -> Iterator[None]:
    """The competent loop: one update each time it is asked."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    params, num, step, micro = matrices + others, len(data["x"]), 0, 0
    amp = torch.autocast("cpu", torch.bfloat16) if work.bf16 else contextlib.nullcontext()
    model.train()
    while True:
        order = torch.randperm(num)
        for start in range(0, num, work.batch):
            chosen = order[start : start + work.batch]
            with amp:
                value = work.loss(model, {"x": data["x"][chosen], "y": data["y"][chosen]})
            (value / work.accumulate if work.accumulate > 1 else value).backward()
            micro += 1
            if micro % work.accumulate:
                continue
            torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            yield


def ours(model: nn.Module, data: dict[str, torch.Tensor], work: Workload, folder: Path) -> Loop:
    changes = {
        "precision": "bf16" if work.bf16 else "fp32",
        "compile": "off",
        "train.steps": STEPS,
        "train.batch": work.batch * work.accumulate,
        "train.micro_batch": work.batch,
        "train.clip": CLIP,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "schedule.lr": "cosine()",
        "checkpoint.every": 0,
    }
    resolved = resolve(Task(model=model, loss=work.loss, data=Split(train=data)), Recipe().override(changes))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    lines = JsonLines(folder / "records.jsonl")
    lines.start(resolved.plan, 0)
    return Loop(resolved.plan, step, resolved.feed, [lines])


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def measure(name: str, pairs: int, clock: Callable[[], float]) -> dict[str, Any]:
    work = WORKLOADS[name]
    torch.manual_seed(0)
    data = work.data()
    hand = by_hand(work.model(), data, work)
    with tempfile.TemporaryDirectory() as folder:
        loop = ours(work.model(), data, work, Path(folder))
        one_hand = lambda: [next(hand) for _ in range(work.window)]
        one_ours = lambda: loop.run(until=loop.step.state.step + work.window)
        one_hand(), one_ours()
        times = []
        for pair in range(pairs):
            first, second = (one_hand, one_ours) if pair % 2 else (one_ours, one_hand)
            a, b = seconds(first, clock), seconds(second, clock)
            times.append((a, b) if pair % 2 else (b, a))
    rates = {"by hand, steps/s": work.window / sorted(h for h, _ in times)[pairs // 2]}
    rates["thalweg, steps/s"] = work.window / sorted(t for _, t in times)[pairs // 2]
    return {"workload": work.title, **rates, "ratio": summary([h / t for h, t in times])}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=61)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, with commas between them; keeps no row")
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor instead of the clock; keeps no row"
    )
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    rows = []
    for name in names:
        row = measure(name, asked.pairs, time.process_time if asked.cpu else time.perf_counter)
        ratio = row["ratio"]
        print(
            f"{row['workload']:24} by hand {row['by hand, steps/s']:8.1f}  thalweg {row['thalweg, steps/s']:8.1f} steps/s"
            f"  ratio {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] n={ratio['n']}",
            flush=True,
        )
        rows.append(row)
    if names == list(WORKLOADS) and not asked.cpu:
        print(keep("loop", rows, f"python -m benchmarks.loop --pairs {asked.pairs}"))


if __name__ == "__main__":
    main()
