"""Windows of micro-batches for the steps of a run, from any source, from any step on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.core import DataError, Feed, FeedState, Gather, Tell, seed_for
from thalweg.data.items import ItemFeed, Reader
from thalweg.data.order import Indices, Order, uniforms
from thalweg.data.quiet import never, quiet
from thalweg.data.sources import Items, Source, Stream
from thalweg.data.streams import StreamFeed, read_stream
from thalweg.data.trees import split, tensors, to_device, tree_map

Augment = Callable[[Any, Callable[[int], Tensor]], Any]
_AHEAD_BYTES = 4 << 20  # gathered at once from memory, then handed out as slices


def make_feed(
    source: Source,
    *,
    batch: int,
    micro_batch: int,
    seed: int,
    keep_last: bool,
    device: torch.device,
    workers: int = 0,
    timeout: float = 600.0,
    augment: Augment | None = None,
    sizes: Sequence[int] | None = None,
) -> Feed:
    """The feed for a source. Equal arguments give equal windows, from whatever step they are asked.

    Args:
        timeout: seconds after which a worker that gives nothing is started again; 0: never.
        sizes: samples in the window of each step, where they change; none is larger than ``batch``.

    Raises:
        DataError: for ``augment`` with data that is read sample by sample.
    """
    if augment is not None and isinstance(source, (Stream, Items)):
        raise DataError(
            "augment works on whole batches of in-memory data.",
            f"This data is read sample by sample ({type(source).__name__}).",
            "Augment in __getitem__ or __iter__: random numbers drawn there are seeded by (seed, epoch, sample).",
        )
    if isinstance(source, Stream):
        return StreamFeed(
            source, batch=batch, micro_batch=micro_batch, seed=seed, keep_last=keep_last, device=device, sizes=sizes
        )
    order = Order(len(source), batch, seed=seed, keep_last=keep_last, sizes=sizes)
    if isinstance(source, Items):
        return ItemFeed(
            source, order, micro_batch=micro_batch, seed=seed, device=device, workers=workers, timeout=timeout
        )
    return MemoryFeed(source, order, micro_batch=micro_batch, seed=seed, device=device, augment=augment)


class MemoryFeed:
    """In-memory data: several windows are gathered and augmented at once, then handed out as slices."""

    def __init__(
        self,
        source: Gather,
        order: Order,
        *,
        micro_batch: int,
        seed: int,
        device: torch.device,
        augment: Augment | None = None,
    ) -> None:
        self.source, self.order, self.micro_batch, self.seed = source, order, micro_batch, seed
        self.device, self.augment = device, augment
        self.tell: Tell = quiet
        self.stop: Callable[[], bool] = never
        one = source.gather(torch.zeros(1, dtype=torch.int64))
        sample_bytes = max(1, sum(t.numel() * t.element_size() for _, t in tensors(one)))
        self.ahead = max(1, min(64, _AHEAD_BYTES // (sample_bytes * order.batch)))

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def samples(self, step: int) -> list[int]:
        return [int(i) for i in self.order.window(step)[1]]

    def state(self, step: int) -> FeedState | None:
        return None

    def restore(self, step: int, state: FeedState) -> None:
        """Any step can be asked for."""

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        step = start
        while step < stop:
            epoch, first = self.order.window(step)
            parts = [first]
            for later in range(step + 1, min(step + self.ahead, stop)):
                if self.order.epoch_of(later) != epoch:
                    break
                parts.append(self.order.window(later)[1])
            yield from self._cut(epoch, parts)
            step += len(parts)

    def _cut(self, epoch: int, parts: list[Indices]) -> Iterator[list[Any]]:
        indices = np.concatenate(parts)
        batch = self.source.gather(torch.from_numpy(indices))
        if self.augment is not None:
            key = seed_for(self.seed, "augment", epoch)
            batch = self.augment(batch, _Draw(key, indices))
        batch = to_device(batch, self.device)
        at = 0
        for part in parts:
            yield split(_slice(batch, at, at + len(part)), self.micro_batch)
            at += len(part)


class _Draw:
    """Uniform numbers for each sample of a batch; each call goes on where the one before ended."""

    def __init__(self, key: int, indices: Indices) -> None:
        self.key, self.indices, self.drawn = key, indices, 0

    def __call__(self, num: int) -> Tensor:
        numbers = uniforms(self.key, self.indices, num, skip=self.drawn)
        self.drawn += num
        return torch.from_numpy(numbers)


def _slice(batch: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop] if t.ndim else t, batch)


class ChangedFeed:
    """A feed whose windows go through functions of (step, window) before they are trained on.

    Args:
        changes: each takes the step (from 0) and the window's micro-batches, and gives micro-batches.
    """

    def __init__(self, feed: Feed, changes: Sequence[Callable[[int, list[Any]], list[Any]]]) -> None:
        self.feed, self.changes = feed, changes

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

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        for step, window in enumerate(self.feed.windows(start, stop), start=start):
            for change in self.changes:
                window = change(step, window)
            yield window


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


def _cut_sequences(batch: Any, length: int) -> Any:
    whole = sequence_length(batch)
    return tree_map(lambda t: t[:, :length] if t.ndim >= 2 and t.shape[1] == whole else t, batch)


def held_out(source: Source, batch: int, device: torch.device) -> Iterator[Any]:
    """All of a source once, in its own order, in batches; the last one may be short. The same each time it is asked."""
    if isinstance(source, Stream):
        yield from _held_out_stream(source, batch, device)
        return
    for start in range(0, len(source), batch):
        indices = range(start, min(start + batch, len(source)))
        if isinstance(source, Items):
            yield to_device(Reader(source, 0).batch(0, list(indices), "held-out data"), device)
        else:
            yield to_device(source.gather(torch.tensor(indices, dtype=torch.int64)), device)


def _held_out_stream(source: Stream, batch: int, device: torch.device) -> Iterator[Any]:
    feed = StreamFeed(source, batch=batch, micro_batch=batch, seed=0, keep_last=True, device=device)
    samples = read_stream(source, seed_for(0, "held out"))
    place = 0
    while taken := list(itertools.islice(samples, batch)):
        yield feed.collated(place, 0, taken)
        place += 1
