"""Targets as distributions over classes, and the switch for checks that must read values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from thalweg.core import DataError, RecipeError

_CHECKS: ContextVar[bool] = ContextVar("thalweg_checks", default=False)


@contextmanager
def checking() -> Iterator[None]:
    """Inside, losses and mixing also check what they must read values for; a training step never waits for that."""
    token = _CHECKS.set(True)
    try:
        yield
    finally:
        _CHECKS.reset(token)


def checks() -> bool:
    """Whether this is inside ``checking()``; never while compiled, where nothing can be read."""
    return not torch.compiler.is_compiling() and _CHECKS.get()


def check_smoothing(smoothing: float | Tensor) -> None:
    """
    Raises:
        RecipeError: for a number outside [0, 1]. A tensor is scheduled, and not read.
    """
    if not isinstance(smoothing, Tensor) and not 0.0 <= smoothing <= 1.0:
        raise RecipeError(
            f"label_smoothing={smoothing} is not a share of the targets.",
            "It must lie in [0, 1].",
            "0.1 is common; 0 turns it off.",
        )


def soft_targets(
    labels: Tensor,
    num_classes: int,
    smoothing: float | Tensor = 0.0,
    *,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Class indices as distributions: ``(1 - smoothing) * onehot + smoothing / num_classes``.

    Args:
        labels: (...), integers in [0, num_classes) or ``ignore_index``, whose rows are all 0: they weigh nothing.
        num_classes: 2 or more.
        smoothing: share of the mass that is spread over all classes, in [0, 1]
            (Szegedy et al. 2015, arXiv:1512.00567). Smooth here or in the loss, not in both.
        dtype: of the result.

    Returns:
        (..., num_classes).

    Raises:
        DataError: for labels that are no integers; on the CPU, and inside ``checking()``, for those out of range.
        RecipeError: for ``smoothing`` outside [0, 1], or fewer than 2 classes.

    >>> soft_targets(torch.tensor([2, 0]), 4, 0.2).tolist()[0]
    [0.05000000074505806, 0.05000000074505806, 0.8500000238418579, 0.05000000074505806]
    """
    check_smoothing(smoothing)
    if num_classes < 2:
        raise RecipeError(
            f"num_classes={num_classes} leaves nothing to tell apart.", "2 is the least.", "Give 2 or more."
        )
    check_indices(labels, num_classes, ignore_index)
    counted = labels != ignore_index
    soft = torch.zeros(*labels.shape, num_classes, dtype=dtype, device=labels.device)
    places = torch.where(counted, labels, 0).to(torch.int64)
    try:
        soft.scatter_(-1, places.unsqueeze(-1), counted.to(dtype).unsqueeze(-1))
    except RuntimeError:  # the CPU looks at its indices anyway: the same, in our words
        with checking():
            check_indices(labels, num_classes, ignore_index)
        raise
    return smoothed(soft, smoothing)


def smoothed(soft: Tensor, smoothing: float | Tensor) -> Tensor:
    """``smoothing`` of each row's mass, spread over all classes. Linear: mixing before or after gives the same."""
    if not isinstance(smoothing, Tensor) and smoothing == 0.0:
        return soft
    return soft * (1 - smoothing) + soft.sum(-1, keepdim=True) * (smoothing / soft.shape[-1])


def check_indices(labels: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    """
    Raises:
        DataError: for labels that are no integers; inside ``checking()`` also for those outside [0, num_classes).
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            "The targets are no class indices.",
            f"Their dtype is {labels.dtype} and their shape {tuple(labels.shape)}; there are {num_classes} classes.",
            f"Give integers from 0 to {num_classes - 1}, or distributions of shape (..., {num_classes}).",
        )
    if checks():
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
        if wrong.any():
            raise DataError(
                "Labels are out of range.",
                f"{int(wrong.sum())} of {labels.numel()} lie in [{int(labels[wrong].min())}, {int(labels[wrong].max())}]; "
                f"there are {num_classes} classes, 0 to {num_classes - 1}.",
                "Give num_classes as the model has outputs, or number the labels from 0.",
            )
