"""digits: a convolutional net on scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.core import Loss, MissingExtra, Split, Task
from thalweg.data import permute
from thalweg.recipes.models.convnet import ConvNet
from thalweg.regularize import accuracy, cross_entropy

_HELD_OUT = 360


def model(width: int = 32, dropout: float = 0.2) -> nn.Module:
    return ConvNet(classes=10, width=width, dropout=dropout)


def loss(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.1) -> Loss:
    smoothing = label_smoothing if model.training else 0.0
    return cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=smoothing)


def data(max_shift: int = 1) -> Split:
    """Images scaled to [0, 1]; 360 of them, chosen by a fixed permutation, are held out.

    Args:
        max_shift: training images are shifted by up to so many pixels each way; 0: not at all.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise MissingExtra(
            "The task digits needs scikit-learn's data set.",
            "The package scikit-learn is not installed.",
            "Install it: pip install 'thalweg[digits]'.",
        )
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"  # read without importing all of sklearn
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    order = permute(len(table), 0, np.arange(len(table)))
    images = torch.from_numpy(table[order, :64] / 16).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[order, 64].astype(np.int64))
    train = {"images": images[_HELD_OUT:], "labels": labels[_HELD_OUT:]}
    test = {"images": images[:_HELD_OUT], "labels": labels[:_HELD_OUT]}
    facts = {"source": "scikit-learn digits", "train images": len(train["labels"]), "held-out images": _HELD_OUT}
    return Split(train=train, test=test, augment=_shift(max_shift) if max_shift else None, facts=facts)


def _shift(most: int) -> Callable[[Any, Callable[[int], Tensor]], Any]:
    """Shift each image by whole pixels; which way is a function of (seed, epoch, sample)."""

    def augment(batch: dict[str, Tensor], draw: Callable[[int], Tensor]) -> dict[str, Tensor]:
        images = batch["images"]
        size = images.shape[-1]
        moves = (draw(2) * (2 * most + 1)).long()
        padded = nn.functional.pad(images, (most, most, most, most))
        rows = (moves[:, 0, None] + torch.arange(size))[:, None, :, None]
        columns = (moves[:, 1, None] + torch.arange(size))[:, None, None, :]
        samples = torch.arange(len(images))[:, None, None, None]
        return {**batch, "images": padded[samples, 0, rows, columns]}

    return augment


def metrics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Loss]:
    return {"accuracy": accuracy(model(batch["images"]), batch["labels"])}


TASK = Task(
    name="digits",
    about="a convolutional net on scikit-learn's handwritten digits",
    unit="images",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    recipe={
        "train.epochs": 12.0,
        "train.batch": 64,
        "optimizer.rule": "adamw",
        "optimizer.lr": 4e-3,
        "optimizer.weight_decay": 0.05,
        "schedule.lr": "warmup(10%) >> cosine(to=0.02)",
        "regularize.average": 0.98,
        "evaluate.best": "accuracy",
        "evaluate.batch": 360,
    },
)
