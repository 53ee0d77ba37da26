"""A training step in fp32 and bf16, here and in a plain torch loop with its own autocast, in turn; and what "auto" is."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.keep import keep, summary
from thalweg.core import Recipe
from thalweg.data import split
from thalweg.engine import TrainStep
from thalweg.recipes.models.gpt import GPT

LR, DECAY = 1e-3, 0.1
WAYS = ("fp32", "bf16", "bf16-pure", "torch fp32", "torch bf16")


class Residual(nn.Module):
    """Two convolutions with batch normalization, and the way past them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm_first, self.norm_second = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.past = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_first(self.first(x)))
        return F.relu(self.norm_second(self.second(y)) + self.past(x))


def resnet(width: int, classes: int = 10) -> nn.Module:
    """ResNet-18 for small images: eight residual blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    now = width
    for stage in range(4):
        for block in range(2):
            after = width << stage
            layers.append(Residual(now, after, 2 if stage and not block else 1))
            now = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, classes))


def image_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def text_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def tasks(small: bool) -> dict[str, tuple[Callable[[], nn.Module], Any, Any, int, int]]:
    """name: (model, loss, batch, samples, micro-batch)."""
    draw = torch.Generator().manual_seed(0)
    width, num = (32, 4) if small else (256, 16)
    tokens = torch.randint(0, 256, (num, 129 if not small else 17), generator=draw)
    text = {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
    pixels, side = (8, 8) if small else (64, 32)
    images = {
        "x": torch.randn(num, 3, side, side, generator=draw),
        "y": torch.randint(0, 10, (num,), generator=draw),
    }
    gpt = lambda: GPT(width=width, heads=4, layers=2 if small else 6, context=128)
    return {
        "GPT": (gpt, text_loss, text, num, num),
        "GPT, 4 micro-batches": (gpt, text_loss, text, num, num // 4),
        "ResNet-18": (lambda: resnet(pixels), image_loss, images, num, num),
    }


def ours(precision: str, model: nn.Module, loss: Any, batch: Any, micro: int) -> tuple[Callable[[], Any], TrainStep]:
    recipe = Recipe().override(
        {
            "precision": precision, "train.micro_batch": micro, "optimizer.lr": LR, "optimizer.weight_decay": DECAY,
            "schedule.lr": "constant()",
        }
    )  # fmt: skip
    step = TrainStep(model, loss, recipe)
    return lambda: step(batch), step


def plain(half: bool, model: nn.Module, loss: Any, batch: Any, num: int, micro: int) -> Callable[[], Any]:
    """The loop of torch's own documentation: autocast around the forward pass, clipping, torch's fused AdamW."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)

    def run() -> None:
        for part in split(batch, micro):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                value = loss(model, part)
            (value * (micro / num)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(name: str, task: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    make, loss, batch, num, micro = task
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {key: x.to(device) for key, x in batch.items()}
    runs: dict[str, Callable[[], Any]] = {}
    for way in WAYS:
        torch.manual_seed(0)
        model = make().to(device)
        if way.startswith("torch"):
            runs[way] = plain(way.endswith("bf16"), model, loss, batch, num, micro)
        else:
            runs[way], _ = ours(way, model, loss, batch, micro)
    torch.manual_seed(0)
    run, step = ours("auto", make(), loss, batch, micro)
    run()
    told = next(d for d in step.plan.decisions if d.path == "precision")
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for k in range(rounds + 2):
        for way in WAYS if k % 2 else WAYS[::-1]:
            began = time.perf_counter()
            runs[way]()
            if device == "cuda":
                torch.cuda.synchronize()
            if k >= 2:
                taken[way].append(time.perf_counter() - began)

    def ratio(a: str, b: str) -> dict[str, float]:
        return summary([x / y for x, y in zip(taken[a], taken[b])])

    return {
        "task": name,
        "ms": {way: summary([1e3 * x for x in seconds]) for way, seconds in taken.items()},
        "fp32 over bf16, ours": ratio("fp32", "bf16"),
        "fp32 over bf16, torch": ratio("torch fp32", "torch bf16"),
        "bf16, ours over torch": ratio("bf16", "torch bf16"),
        "fp32, ours over torch": ratio("fp32", "torch fp32"),
        "bf16-pure over bf16, ours": ratio("bf16-pure", "bf16"),
        "auto": told.value,
        "why": told.reason,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny models, nothing kept: whether it runs")
    asked = parser.parse_args(arguments)
    rows = []
    for name, task in tasks(asked.small).items():
        rows.append(measure(name, task, asked.rounds))
        row = rows[-1]
        print(f"{name:22}" + ", ".join(f"{way} {told['median']:.0f} ms" for way, told in row["ms"].items()))
        for key in [key for key in row if " over " in key]:
            print(f"  {key:26} {row[key]['median']:.2f} ({row[key]['low']:.2f} to {row[key]['high']:.2f})")
        print(f"  auto: {row['auto']}: {row['why']}")
    if not asked.small:
        print(keep("precision", rows, f"python -m benchmarks.precision --rounds {asked.rounds}"))


if __name__ == "__main__":
    main()
