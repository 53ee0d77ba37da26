"""What is done to the windows of a feed before they are trained on, and who gets which part of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.core import Feed, FeedState, Tell
from thalweg.data.share import Share, Window
from thalweg.data.trees import tensors, tree_map


class _Over(ABC):
    """A feed that gives another's windows, changed."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    @property
    def tell(self) -> Tell:
        return self.feed.tell

    @tell.setter
    def tell(self, tell: Tell) -> None:
        self.feed.tell = tell

    @property
    def stop(self) -> Callable[[], bool]:
        return self.feed.stop

    @stop.setter
    def stop(self, stop: Callable[[], bool]) -> None:
        self.feed.stop = stop

    def epoch_of(self, step: int) -> int:
        return self.feed.epoch_of(step)

    def samples(self, step: int) -> list[int] | None:
        return self.feed.samples(step)

    def state(self, step: int) -> FeedState | None:
        return self.feed.state(step)

    def restore(self, step: int, state: FeedState) -> None:
        self.feed.restore(step, state)

    @abstractmethod
    def windows(self, start: int, stop: int) -> Iterator[list[Any]]: ...


class ChangedFeed(_Over):
    """A feed whose windows go through functions of (step, window) before they are trained on.

    Args:
        changes: each takes the step (from 0) and the window's micro-batches, and gives micro-batches.
    """

    def __init__(self, feed: Feed, changes: Sequence[Callable[[int, list[Any]], list[Any]]]) -> None:
        super().__init__(feed)
        self.changes = changes

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        for step, window in enumerate(self.feed.windows(start, stop), start=start):
            whole = window.whole if isinstance(window, Window) else None
            for change in self.changes:
                window = change(step, window)
            yield window if whole is None else Window(window, whole)


class SharedFeed(_Over):
    """A share of another feed's windows, whole as they must be until then: mixing looks for partners in all of a window."""

    def __init__(self, feed: Feed, share: Share) -> None:
        super().__init__(feed)
        self.share = share

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        which, of = self.share
        for window in self.feed.windows(start, stop):
            yield Window(window[which::of], len(window))


def shortened(lengths: Sequence[int]) -> Callable[[int, list[Any]], list[Any]]:
    """A change for ``ChangedFeed``: sequences are cut to ``lengths[step]``.

    Cut are the tensors whose second dimension is that of the first tensor that has two; weights shrink with them.
    """

    def change(step: int, window: list[Any]) -> list[Any]:
        return [_cut_sequences(batch, lengths[min(step, len(lengths) - 1)]) for batch in window]

    return change


def sequence_length(batch: Any) -> int:
    """The second dimension of the first tensor that has two or more; 0 where none has."""
    return next((t.shape[1] for _, t in tensors(batch) if t.ndim >= 2), 0)


def resized(sizes: Sequence[tuple[int, int]], inputs: str | int) -> Callable[[int, list[Any]], list[Any]]:
    """A change for ``ChangedFeed``: images get the height and width ``sizes[step]``, by antialiased bilinear samples.

    Args:
        inputs: where a batch has its images, (samples, channels, height, width), uint8 or floats; the kind stays.
    """

    def change(step: int, window: list[Any]) -> list[Any]:
        size = sizes[min(step, len(sizes) - 1)]
        return [_resize(batch, inputs, size) for batch in window]

    return change


def image_size(batch: Any, inputs: str | int) -> tuple[int, int] | None:
    """(height, width) of the images of a batch; None where it has none under that name."""
    if isinstance(batch, Tensor):  # it is no table of tensors, and torch would warn before it says so
        return None
    try:
        images = batch[inputs]
    except (KeyError, IndexError, TypeError):
        return None
    return (images.shape[2], images.shape[3]) if isinstance(images, Tensor) and images.ndim == 4 else None


def _resize(batch: Any, inputs: str | int, size: tuple[int, int]) -> Any:
    images = batch[inputs]
    if tuple(images.shape[2:]) == size:
        return batch
    small = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    small = small.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else small.to(images.dtype)
    if isinstance(batch, dict):
        return {**batch, inputs: small}
    entries = [small if place == inputs else entry for place, entry in enumerate(batch)]
    return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)


def _cut_sequences(batch: Any, length: int) -> Any:
    whole = sequence_length(batch)
    return tree_map(lambda t: t[:, :length] if t.ndim >= 2 and t.shape[1] == whole else t, batch)
