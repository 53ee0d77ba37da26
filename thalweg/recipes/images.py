"""What tasks of small images have in common: images and labels in, logits out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from thalweg.core import Loss, RecipeError
from thalweg.regularize import accuracy, cross_entropy


def loss(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.1) -> Loss:
    """Cross-entropy summed over the images; held-out images are not smoothed."""
    smoothing = label_smoothing if model.training else 0.0
    return cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=smoothing)


def metrics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Loss]:
    return {"accuracy": accuracy(model(batch["images"]), batch["labels"])}


def facts(source: str, digest: str, train: Tensor, test: Tensor) -> dict[str, Any]:
    """What a plan says of the data."""
    return {"source": source, "sha256": digest, "train images": len(train), "held-out images": len(test)}


def check_limit(limit: int) -> None:
    """Raises a RecipeError if ``limit`` counts no images."""
    if limit < 0:
        raise RecipeError(
            f"data.options.limit={limit} is negative.",
            "It counts the first training images.",
            "Give 0 for all, or more.",
        )
