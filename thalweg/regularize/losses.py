"""Losses that say what they cover, so that their gradients can be put together exactly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from thalweg.core import Loss


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100) -> Loss:
    """Sum of cross-entropies and the number of targets that count; an all-ignored batch weighs 0 and is no NaN.

    Args:
        logits: (..., num_classes), float.
        targets: (...), int64 in [0, num_classes) or ``ignore_index``.
        label_smoothing: share of the target mass that is spread over all classes, in [0, 1]
            (Szegedy et al. 2015, arXiv:1512.00567). Pass 0 when evaluating.

    Returns:
        Loss(total, weight): in nats, and in targets.

    >>> import torch
    >>> loss = cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, -100]))
    >>> round(float(loss.total), 4), int(loss.weight)
    (2.7726, 2)
    """
    num_classes = logits.shape[-1]
    flat, wanted = logits.reshape(-1, num_classes), targets.reshape(-1)
    total = F.cross_entropy(flat, wanted, reduction="sum", label_smoothing=label_smoothing, ignore_index=ignore_index)
    return Loss(total, (wanted != ignore_index).sum())
