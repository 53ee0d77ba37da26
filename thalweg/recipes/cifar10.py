"""cifar10: airbench94's net, tricks and schedule on CIFAR-10, through thalweg's own options (Jordan 2024, arXiv:2404.00498)."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thalweg.core import DataError, MissingExtra, Split, Task
from thalweg.recipes.files import NO_ARCHIVE, arrays, data_file, digest, unpacked
from thalweg.recipes.images import check_limit, facts, loss, metrics
from thalweg.recipes.models.quicknet import QuickNet

_MEAN, _DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels
_DIGITS = {"index.npz": "1633c46da3334684", "train.jpgs.xz": "2ee030cbd16659c3", "test.jpgs.xz": "0b549023c128ec67"}


def model(widths: Sequence[int] = (64, 256, 256), stem: int = 24, patch: int = 2, pooled: bool = False) -> nn.Module:
    return QuickNet(3, 10, stem, patch, 1, pooled, widths, mean=_MEAN, deviation=_DEVIATION)


def data(limit: int = 0) -> Split:
    """50,000 colour images of 32 x 32 pixels, uint8; the 10,000 test images are held out.

    They are read from JPEG files in one archive for each part; what Pillow makes of them is kept in the user's cache.

    Args:
        limit: training images, the first ones; 0: all.
    """
    check_limit(limit)
    files = {name: _file(name, sha) for name, sha in _DIGITS.items()}
    key = digest(files["train.jpgs.xz"])
    found = _decoded(files, _cache() / f"cifar10-{key}.npz")
    num = limit or None
    train, test = (
        {"images": torch.from_numpy(found[f"x_{part}"]), "labels": torch.from_numpy(found[f"y_{part}"]).long()}
        for part in ("train", "test")
    )
    train = {name: tensor[:num] for name, tensor in train.items()}
    return Split(train=train, test=test, facts=facts("CIFAR-10 as JPEG", key, train["images"], test["images"]))


def _file(name: str, sha256: str) -> Path:
    return data_file(
        f"cifar10_jpg/{name}",
        what="CIFAR-10",
        source="cs.toronto.edu/~kriz/cifar.html, as JPEG files in a row (docs/image-tasks.md says how)",
        sha256=sha256,
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thalweg"


def _decoded(files: dict[str, Path], cache: Path) -> dict[str, Any]:
    """Images (n, 3, 32, 32) uint8 and labels by name: from the cache, or decoded and put there."""
    try:
        with open(cache, "rb") as file, np.load(file) as kept:
            return dict(kept)
    except NO_ARCHIVE:  # none yet, or half of one
        pass
    print(
        f"cifar10: its JPEG images are decoded once, which takes seconds, and kept in {cache}.",
        file=sys.stderr,
        flush=True,
    )
    index = arrays(files["index.npz"], ("off_train", "off_test", "y_train", "y_test"), what="CIFAR-10's index")
    decoded: dict[str, Any] = {}
    for part in ("train", "test"):
        packed = unpacked(files[f"{part}.jpgs.xz"])
        try:
            decoded[f"x_{part}"] = _images(packed, index[f"off_{part}"])
        except (OSError, ValueError) as err:  # Pillow's error for what is no image is an OSError
            raise DataError(f"{files['index.npz'].parent} is not CIFAR-10.", f"{err}.", "Get its files anew.") from None
        decoded[f"y_{part}"] = index[f"y_{part}"]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part_file = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        np.savez(part_file, **decoded)
        part_file.replace(cache)
    except OSError:  # a cache that cannot be written saves no time, and costs nothing
        pass
    return decoded


def _images(packed: bytes, offsets: Any) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra(
            "The task cifar10 reads JPEG files.",
            "The package Pillow is not installed.",
            "Install it: pip install pillow.",
        ) from None
    images = np.empty((len(offsets) - 1, 3, 32, 32), dtype=np.uint8)
    for i, (start, end) in enumerate(zip(offsets, offsets[1:])):
        with Image.open(io.BytesIO(packed[start:end])) as image:
            images[i] = np.asarray(image).transpose(2, 0, 1)
    return images


TASK = Task(
    name="cifar10",
    about="airbench94's net and schedule on CIFAR-10",
    unit="images",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    classes=10,
    recipe={
        "train.epochs": 8.0,
        "train.batch": 2000,
        "train.last": "drop",
        "train.clip": 0.0,
        "optimizer.rule": "muon",
        "optimizer.lr": 0.24,
        "optimizer.otherwise_lr": 0.01,
        "optimizer.options": {"momentum": 0.6},
        "schedule.lr": "linear()",
        "regularize.augment": ["flip(alternate=1)", "crop(2, reflect=1)"],
        "initialise.whiten": ["stem"],
        "initialise.dirac": ["blocks.*"],
        "loss": {"label_smoothing": 0.2},
        "evaluate.best": "accuracy",
        "evaluate.batch": 2000,
        "evaluate.every": 0,
    },
)
