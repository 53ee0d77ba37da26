"""fashion_mnist: a small convolutional net on 60,000 images of clothes, for three epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from thalweg.core import Split, Task
from thalweg.recipes.files import arrays, data_file, digest
from thalweg.recipes.images import check_limit, facts, loss, metrics
from thalweg.recipes.models.quicknet import QuickNet

_MEAN, _DEVIATION = 0.2860, 0.3530  # of the training pixels


def model(stem: int = 32, patch: int = 5, widths: Sequence[int] = (64, 128), residual: bool = False) -> nn.Module:
    return QuickNet(1, 10, stem, patch, widths=widths, residual=residual, mean=_MEAN, deviation=_DEVIATION)


def data(limit: int = 0) -> Split:
    """60,000 images of 28 x 28 pixels, uint8; the 10,000 test images are held out.

    Args:
        limit: training images, the first ones; 0: all.
    """
    check_limit(limit)
    path = data_file(
        "fashion_mnist.npz",
        what="Fashion-MNIST",
        source="Zalando (github.com/zalandoresearch/fashion-mnist; on Debian the package dataset-fashion-mnist), "
        "as arrays x_train, y_train, x_test, y_test of one npz",
        sha256="5b6d2c4c694a9188",
    )
    found = arrays(path, ("x_train", "y_train", "x_test", "y_test"), what="Fashion-MNIST")
    parts = {name: torch.from_numpy(array) for name, array in found.items()}
    images, labels = parts["x_train"].unsqueeze(1), parts["y_train"].long()
    if limit:
        images, labels = images[:limit], labels[:limit]
    test = {"images": parts["x_test"].unsqueeze(1), "labels": parts["y_test"].long()}
    told = facts("Fashion-MNIST", digest(path), images, test["images"])
    return Split(train={"images": images, "labels": labels}, test=test, facts=told)


TASK = Task(
    name="fashion_mnist",
    about="a small net on Fashion-MNIST, for three epochs",
    unit="images",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    classes=10,
    recipe={
        "precision": "bf16",
        "train.epochs": 3.0,
        "train.batch": 256,
        "train.last": "drop",
        "train.clip": 0.0,
        "optimizer.rule": "muon",
        "optimizer.lr": 0.24,
        "optimizer.otherwise_lr": 0.01,
        "optimizer.options": {"momentum": 0.8},
        "schedule.lr": "warmup(10%) >> linear()",
        "initialise.whiten": ["stem"],
        "evaluate.best": "accuracy",
        "evaluate.batch": 500,
    },
)
