"""Evaluation accuracy of averaged weights with precise batch statistics, whatever the split into micro-batches.

A small convolutional net on Fashion-MNIST, trained with a weight average in batches of 256: at once, and as 8 micro-batches of
32, from the same weights over the same samples. The averaged weights are evaluated with three kinds of statistics: those of
the live weights (what a plain loop has), their average over the steps, and precise ones, estimated for the averaged weights.
Seeds are paired: figures are differences of accuracy within a seed, with a 95 % interval (Student's t).

    THALWEG_DATA=FOLDER python -m benchmarks.batchnorm [--seeds 5] [--images 10000] [--epochs 2]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.keep import keep
from benchmarks.shared_data import fashion_mnist
from thalweg.recipes.models.convnet import ConvNet
from thalweg.regularize import PooledStatistics, PreciseStatistics

BATCH, WIDTH, DECAY, PEAK = 256, 16, 0.95, 1e-2
ESTIMATED_FROM = 16  # batches of 256 training images
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
REFERENCE = ("1 x 256", "averaged statistics")


def train(seed: int, micro_batch: int, images: Tensor, labels: Tensor, epochs: int) -> Any:
    """(model with live weights, averaged parameters, averaged statistics, the pool)."""
    torch.manual_seed(seed)
    model = ConvNet(width=WIDTH, dropout=0.0)
    pool = PooledStatistics(model, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.05)
    steps = epochs * (len(labels) // BATCH)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    live = [*model.parameters(), *pool.buffers()]
    average = [tensor.detach().clone() for tensor in live]
    order = torch.cat([torch.randperm(len(labels))[: steps // epochs * BATCH] for _ in range(epochs)])
    for step, chosen in enumerate(order.split(BATCH), 1):
        optimizer.zero_grad()
        pool.begin()
        parts = chosen.split(micro_batch)
        for place, part in enumerate(parts):
            (F.cross_entropy(model(images[part]), labels[part], reduction="sum") / BATCH).backward()
            pool.collect(last=place == len(parts) - 1)
        pool.end(torch.tensor(True))
        optimizer.step()
        rates.step()
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mine, now in zip(average, live):
                mine.lerp_(now, share)
    return model, average, live, pool


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500))]
    return 100 * int(torch.stack(right).sum()) / len(labels)


def figures(seed: int, micro_batch: int, data: dict[str, tuple[Tensor, Tensor]], epochs: int) -> dict[str, float]:
    """Accuracy in percent of the averaged weights, by the statistics that they are evaluated with."""
    model, average, live, pool = train(seed, micro_batch, *data["train"], epochs)
    precise = PreciseStatistics(model, lambda: data["train"][0][: ESTIMATED_FROM * BATCH].split(BATCH))
    num = len([*model.parameters()])
    with torch.no_grad():
        for mine, now in zip(average[:num], live):
            now.copy_(mine)
    found = {}
    ways: dict[str, Callable[[], Any]] = {"live statistics": nullcontext, "precise statistics": precise.put_in}
    for name, way in ways.items():
        with way():
            found[name] = accuracy(model, *data["test"])
    with torch.no_grad():
        for mine, now in zip(average[num:], pool.buffers()):
            now.copy_(mine)
    return {**found, "averaged statistics": accuracy(model, *data["test"])}


def interval(differences: list[float]) -> dict[str, float]:
    """Mean and its 95 % interval by Student's t."""
    mean, num = statistics.mean(differences), len(differences)
    half = STUDENT[num] * statistics.stdev(differences) / num**0.5
    return {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args(arguments)
    data = fashion_mnist(given.images)
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(given.seeds):
        for split, micro_batch in (("1 x 256", 256), ("8 x 32", 32)):
            for name, value in figures(seed, micro_batch, data, given.epochs).items():
                found.setdefault((split, name), []).append(value)
                print(f"seed {seed}  {split:8} {name:20} {value:.2f} %", flush=True)
    rows = []
    for (split, name), values in found.items():
        against = [mine - other for mine, other in zip(values, found[REFERENCE])]
        row = {
            "split": split,
            "statistics": name,
            "seeds": given.seeds,
            "accuracy, %": {"mean": round(statistics.mean(values), 3), "least": min(values), "most": max(values)},
            f"minus {' with '.join(REFERENCE)}, points": interval(against),
            "settings": {
                "training images": given.images,
                "epochs": given.epochs,
                "width": WIDTH,
                "average": DECAY,
                "estimated from images": ESTIMATED_FROM * BATCH,
            },
        }
        rows.append(row)
        gap = interval(against)
        print(
            f"{split:8} {name:20} {statistics.mean(values):.2f} %  {gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"
        )
    print(f"kept in {keep('batchnorm', rows, 'python -m benchmarks.batchnorm')}")


if __name__ == "__main__":
    main(sys.argv[1:])
