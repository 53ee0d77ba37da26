"""Batches are trees of tensors: dicts, tuples, lists, named tuples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.device import check_float64
from thalweg.device.lanes import in_host_memory


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with ``function`` applied to its tensors; all else is passed on."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(function, value) for value in tree)
    return tree


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of a tree; places in a sequence are named by number."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, (tuple, list)):
        for place, value in enumerate(tree):
            yield from tensors(value, f"{name}.{place}" if name else str(place))


def batch_size(tree: Any) -> int:
    """Samples in a batch: the length of its first tensor that has one; 1 where none has."""
    if type(tree) is dict:  # every step asks, and nearly every batch is one of tensors
        for value in tree.values():
            if not isinstance(value, Tensor):
                break
            if value.ndim:
                return value.size(0)
    return next((t.shape[0] for _, t in tensors(tree) if t.ndim), 1)


def cut(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """A batch in portions of these sizes, along the first dimension of its tensors; all else is in each of them.

    >>> [part["x"].tolist() for part in cut({"x": torch.arange(3)}, [2, 1])]
    [[0, 1], [2]]
    """
    if type(tree) is dict and all(isinstance(value, Tensor) and value.ndim for value in tree.values()):
        return [dict(zip(tree, parts)) for parts in zip(*(value.split(list(sizes)) for value in tree.values()))]
    stops = list(itertools.accumulate(sizes))
    pairs = zip(stops, sizes)
    return [tree_map(lambda t, a=b - n, b=b: t[a:b] if t.ndim else t, tree) for b, n in pairs]  # type: ignore[misc]


def split(tree: Any, micro_batch: int) -> list[Any]:
    """Cut a batch along the first dimension of its tensors into micro-batches; the last one may be short."""
    size = batch_size(tree)
    if size <= micro_batch:
        return [tree]
    starts = range(0, size, micro_batch)
    return [tree_map(lambda t, a=start: t[a : a + micro_batch] if t.ndim else t, tree) for start in starts]  # type: ignore[misc]


def to_device(tree: Any, device: torch.device) -> Any:
    """The batch on ``device``; from pinned memory, where the device copies by itself: nobody waits for it.

    Raises:
        DeviceError: for float64 where the device has none.
    """
    if device.type == "cpu":
        return tree
    check_float64(tensors(tree), device, "The data")
    return tree_map(lambda t: _pinned(t, device).to(device, non_blocking=True), tree)


def _pinned(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's memory where the device copies it from by itself, while the host goes on."""
    return in_host_memory(t, device) if t.device.type == "cpu" else t
