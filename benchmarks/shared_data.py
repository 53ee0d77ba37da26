"""Where the real data of the benchmarks lie; none of it is part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def folder() -> Path:
    """The folder that the environment variable THALWEG_DATA names, else ``shared/data`` beside the repository.

    Raises:
        SystemExit: if it is not there.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    found = Path(os.environ.get("THALWEG_DATA") or beside)
    if not found.is_dir():
        raise SystemExit(f"The data folder {found} is not there. Set THALWEG_DATA to one that holds fashion_mnist.npz.")
    return found


def fashion_mnist(num: int = 60_000) -> dict[str, tuple[Tensor, Tensor]]:
    """The first ``num`` training images and all 10,000 test images of Fashion-MNIST.

    Returns:
        "train" and "test": images (n, 1, 28, 28) float32 of mean 0 and deviation 1 over the training set, labels (n,) int64.

    Raises:
        SystemExit: if the file is not there.
    """
    file = folder() / "fashion_mnist.npz"
    if not file.is_file():
        raise SystemExit(f"{file} is not there. Fashion-MNIST: x_train, y_train, x_test and y_test as arrays of uint8.")
    arrays = np.load(file)

    def part(name: str, most: int) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(arrays[f"x_{name}"][:most]).unsqueeze(1).float() / 255
        return (images - 0.286) / 0.353, torch.from_numpy(arrays[f"y_{name}"][:most].astype(np.int64))

    return {"train": part("train", num), "test": part("test", 10_000)}
