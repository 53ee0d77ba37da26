"""What dropout, mixup, augmentation and the weight average cost of a training step on Fashion-MNIST.

Four loops take turns in one process: a run of ours without any of them and one with all; a competent loop by hand without, and
one with all in the usual way: a data set that augments item by item, collation, mixup of the batch, torch's ``AveragedModel``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from benchmarks.keep import keep, summary
from benchmarks.shared_data import fashion_mnist
from thalweg.core import Loss, Recipe, Split, Task
from thalweg.data import uniforms
from thalweg.engine import Loop, build, resolve
from thalweg.recipes.models.convnet import ConvNet
from thalweg.regularize import Mixing, cross_entropy, pipeline

BATCH, WIDTH, LR, DECAY, CLIP, STEPS = 128, 16, 1e-3, 0.01, 1.0, 1_000_000
PAD, HOLE, DROPOUT, ALPHA, AVERAGE = 2, 8, 0.2, 0.2, 0.999
AUGMENT = (f"crop({PAD})", "flip", f"cutout({HOLE})")
WINDOW = 5  # steps in a timed window


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    return cross_entropy(model(batch["images"]), batch["labels"])


def ours(data: dict[str, Tensor], *, everything: bool) -> Callable[[], object]:
    """A window of steps of the engine."""
    changes: dict[str, Any] = {
        "precision": "fp32",
        "train.steps": STEPS,
        "compile": "off",
        "train.batch": BATCH,
        "train.clip": CLIP,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "checkpoint.every": 0,
    }
    if everything:
        changes |= {"regularize.augment": AUGMENT, "regularize.mixup": ALPHA, "regularize.average": AVERAGE}
    task = Task(model=ConvNet(width=WIDTH, dropout=DROPOUT if everything else 0.0), loss=loss, data=Split(train=data))
    resolved = resolve(task, Recipe().override(changes))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    loop = Loop(resolved.plan, step, resolved.feed, [])
    return lambda: loop.run(until=loop.step.state.step + WINDOW)


class Items(Dataset[tuple[Tensor, Tensor]]):
    """Item by item, as torchvision's transforms work: a padded crop, a flip, a square hole."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.images, self.labels = data["images"], data["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = F.pad(self.images[index], (PAD,) * 4)
        top, left = (int(torch.randint(0, 2 * PAD + 1, (1,))) for _ in range(2))
        image = image[:, top : top + 28, left : left + 28]
        if torch.rand(1) < 0.5:
            image = image.flip(-1)
        y, x = (int(torch.randint(0, 28, (1,))) for _ in range(2))
        image = image.clone()
        image[:, max(0, y - HOLE // 2) : y + HOLE // 2, max(0, x - HOLE // 2) : x + HOLE // 2] = 0
        return image, self.labels[index]


def mixed_batch(images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One share for the batch, each sample with its opposite, as timm does."""
    share = float(random.beta(ALPHA, ALPHA))
    soft = F.one_hot(labels, 10).to(images.dtype)
    return images * share + images.flip(0) * (1 - share), soft * share + soft.flip(0) * (1 - share)


def plain_batches(data: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for chosen in torch.randperm(len(data["labels"])).split(BATCH):
            if len(chosen) == BATCH:
                yield data["images"][chosen], data["labels"][chosen]


def item_batches(data: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    random = np.random.default_rng(0)
    while True:
        for images, labels in DataLoader(Items(data), batch_size=BATCH, shuffle=True, drop_last=True):
            yield mixed_batch(images, labels, random)


def by_hand(data: dict[str, Tensor], *, everything: bool) -> Callable[[], object]:
    """A window of steps of the competent loop."""
    model = ConvNet(width=WIDTH, dropout=DROPOUT if everything else 0.0)
    params = list(model.parameters())
    matrices, others = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE)) if everything else None
    batches = item_batches(data) if everything else plain_batches(data)

    def window() -> None:
        for _ in range(WINDOW):
            images, labels = next(batches)
            F.cross_entropy(model(images), labels).backward()
            nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update_parameters(model)

    return window


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parts(data: dict[str, Tensor], num: int) -> dict[str, float]:
    """Milliseconds of augmentation and of mixing alone, for one batch (medians)."""
    batch = {name: values[:BATCH] for name, values in data.items()}
    augment = pipeline(AUGMENT)
    mixing = Mixing(num_classes=10, mixup=ALPHA)
    works: dict[str, Callable[[], object]] = {
        "augmentation": lambda: augment(batch, lambda n: torch.from_numpy(uniforms(1, np.arange(BATCH), n))),
        "mixup": lambda: mixing([batch], 5),
    }
    return {name: 1e3 * statistics.median(seconds(work) for _ in range(num)) for name, work in works.items()}


def measure(rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    images, labels = fashion_mnist(20_000)["train"]
    data = {"images": images, "labels": labels}
    loops = {
        ("thalweg", False): ours(data, everything=False),
        ("thalweg", True): ours(data, everything=True),
        ("by hand, per item", False): by_hand(data, everything=False),
        ("by hand, per item", True): by_hand(data, everything=True),
    }
    times: dict[tuple[str, bool], list[float]] = {name: [] for name in loops}
    for work in loops.values():
        work()
    order = list(loops)
    for turn in range(rounds):
        for name in order if turn % 2 else reversed(order):
            times[name].append(seconds(loops[name]) / WINDOW)
    rows = []
    for way in ("thalweg", "by hand, per item"):
        without, with_all = times[(way, False)], times[(way, True)]
        rows.append(
            {
                "way": way,
                "step without, ms": 1e3 * statistics.median(without),
                "step with all, ms": 1e3 * statistics.median(with_all),
                "cost as a share of the step": summary([b / a - 1 for a, b in zip(without, with_all)]),
            }
        )
    rows[0]["alone, ms"] = parts(data, 5 * rounds)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--try", action="store_true", dest="only_try", help="print, and keep nothing")
    chosen = parser.parse_args(arguments)
    rows = measure(chosen.rounds)
    for row in rows:
        cost = row["cost as a share of the step"]
        print(
            f"{row['way']:18} {row['step without, ms']:7.2f} -> {row['step with all, ms']:7.2f} ms a step"
            f"  +{100 * cost['median']:.1f} % [{100 * cost['low']:.1f}, {100 * cost['high']:.1f}] n={cost['n']}"
        )
    print("alone, ms a batch:", ", ".join(f"{name} {value:.3f}" for name, value in rows[0]["alone, ms"].items()))
    if not chosen.only_try:
        print(keep("inputs", rows, "python -m benchmarks.inputs"))


if __name__ == "__main__":
    main()
