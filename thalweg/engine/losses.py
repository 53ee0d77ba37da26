"""What a user's loss function gave, as a sum and a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.core import LossError
from thalweg.data import batch_size


def sum_and_weight(value: Any, batch: Any) -> tuple[Tensor, Any]:
    """(sum of losses, weight): a ``Loss`` or pair as it is; a plain mean times the number of samples.

    Args:
        value: what the loss function returned.
        batch: what it was given; its length weighs a plain mean.
    """
    if isinstance(value, tuple):
        return value[0], value[1]
    num = batch_size(batch)
    return value * num, num


def check_loss(value: Any) -> None:
    """Refuse a value that no gradient step can be made of.

    Raises:
        LossError: unless it is one finite number, with a gradient, and a weight of 0 or more.
    """
    total, weight = value if isinstance(value, tuple) and len(value) == 2 else (value, 1)
    how = "Return Loss(total, weight): a sum and what it covers; or a mean, as one scalar tensor."
    if not isinstance(total, Tensor):
        raise LossError("The loss is no tensor.", f"Got {type(total).__name__}.", how)
    if total.numel() != 1:
        raise LossError("The loss is not a scalar.", f"Its shape is {tuple(total.shape)}.", how)
    if not total.isfinite():
        raise LossError(
            "The loss is not finite at step 0.",
            f"It is {float(total.detach())}.",
            "Look for NaN or infinity in the data, a logarithm of 0, or too large an initial scale of the weights.",
        )
    if not total.requires_grad:
        raise LossError(
            "The loss has no gradient.",
            f"requires_grad is {total.requires_grad}.",
            "Compute it from the model's output, without detach(), item() or no_grad().",
        )
    if float(weight) < 0:
        raise LossError("The weight of the loss is negative.", f"It is {float(weight)}.", "Give 0 or more.")


def check_float32(total: Tensor, asked: str) -> None:
    """Refuse a total in half precision: eight or eleven bits cannot tell a loss from the next one.

    Raises:
        LossError: for bfloat16 and float16.
    """
    if total.dtype in (torch.bfloat16, torch.float16):
        short = str(total.dtype).removeprefix("torch.")
        bits = 8 if total.dtype == torch.bfloat16 else 11
        raise LossError(
            f"The loss is in half precision, with {asked}.",
            f"Its total is {short}: {bits} significant bits, so that sums stand still from {2**bits} on.",
            "Compute it from logits.float(), or leave islands out of the recipe, or have 'logits' in them.",
        )
