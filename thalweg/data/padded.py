"""Micro-batches of one shape, for devices on which every shape is compiled anew: short ones are filled up with samples of weight 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.core import Feed
from thalweg.data.changed import _Over
from thalweg.data.trees import batch_size, tensors, to_device, tree_map

#: What torch's losses leave out of sums and of counts, unless they are told otherwise.
IGNORED = -100
_NAMES = ("targets", "labels", "target", "label", "y", "1")


@dataclass(frozen=True)
class Padding:
    """How a short micro-batch is filled up.

    Attributes:
        size: samples afterwards.
        targets: name of the tensor that says what counts, as ``tensors`` names it.
    """

    size: int
    targets: str


def targets_of(batch: Any, named: str | int) -> str | None:
    """The name of the tensor in a batch by which a sample can be left out of the loss; None where there is none.

    Args:
        named: what the task calls its targets.
    """
    known = dict(tensors(batch))
    for name in (str(named), *_NAMES):
        if name in known and _marks(known[name]):
            return name
    return None


def _marks(t: Tensor) -> bool:
    """Whether ``IGNORED``, or rows of zeros, can stand in it."""
    return t.ndim > 0 and (t.is_floating_point() or torch.iinfo(t.dtype).min <= IGNORED)


def padded(batch: Any, padding: Padding) -> Any:
    """``batch`` with as many samples as ``padding`` says: its first one again, with targets that do not count.

    >>> batch = {"x": torch.ones(2, 1), "labels": torch.tensor([4, 5])}
    >>> padded(batch, Padding(3, "labels"))["labels"].tolist()
    [4, 5, -100]
    """
    num = batch_size(batch)
    if num >= padding.size:
        return batch
    target = dict(tensors(batch))[padding.targets]

    def longer(t: Tensor) -> Tensor:
        if not t.ndim or t.shape[0] != num:
            return t
        more = t[:1].expand(padding.size - num, *t.shape[1:])
        if t is target:
            more = torch.zeros_like(more) if t.is_floating_point() else torch.full_like(more, IGNORED)
        return torch.cat([t, more])

    return tree_map(longer, batch)


class StaticFeed(_Over):
    """A feed on the host whose micro-batches go to the device one by one, each in memory of its own.

    A part of a larger tensor on the device would be read by a program made for its place in it.

    Args:
        padding: None: short micro-batches stay short.
    """

    def __init__(self, feed: Feed, device: torch.device, padding: Padding | None) -> None:
        super().__init__(feed)
        self.device, self.padding = device, padding

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        for window in self.feed.windows(start, stop):
            whole = window if self.padding is None else [padded(part, self.padding) for part in window]
            yield [to_device(part, self.device) for part in whole]
