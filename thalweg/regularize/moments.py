"""Counts, sums and sums of squares: what batch statistics are pooled from, over micro-batches, layers and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_apart: list[None] = []  # not empty: what runs now is this process's own


@contextmanager
def alone() -> Iterator[None]:
    """Inside, ``num_ranks`` is 1: what one process tries by itself, such as a step on a copy, waits for no other."""
    _apart.append(None)
    try:
        yield
    finally:
        _apart.pop()


def num_ranks(group: Any = None) -> int:
    """Processes that train together; 1 where torch.distributed is not initialised.

    Args:
        group: a process group; None: the default one.
    """
    if _apart:
        return 1
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def recomputing() -> bool:
    """Whether a backward pass is under way: a forward pass inside it is the recomputation of activation checkpointing.

    Inside torch.compile it is always False: a trace cannot ask.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def moments_of(x: Tensor, dtype: torch.dtype) -> tuple[int, Tensor, Tensor]:
    """Values a channel, their mean, and their variance divided by the number of values; zeros for an empty batch.

    Args:
        x: (batch, channels, ...), any float dtype; half precisions are read as float32.
        dtype: of the moments, each (channels,).
    """
    num, channels = x.numel() // x.shape[1], x.shape[1]
    if not num:
        return 0, x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    return num, mean.to(dtype), var.to(dtype)


def pooled(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all values, from sums; finite zeros where nothing was seen.

    Args:
        count: how many values, at least 0.
        total, squares: their sum, and the sum of their squares. Squares cancel: give float64 where the device has it.
    """
    mean = total / count.clamp(min=1)
    var = (squares - count * mean * mean) / (count - 1).clamp(min=1)
    return mean, var.clamp(min=0)
