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
from thalweg.data.ragged import lengths_of
from thalweg.data.share import WHOLE, Share, micro_batches, shared
from thalweg.data.sources import Items, Source, Stream
from thalweg.data.streams import StreamFeed, read_stream
from thalweg.data.trees import cut, split, tensors, to_device

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
    bucket: int = 0,
    share: Share = WHOLE,
) -> Feed:
    """The feed for a source. Equal arguments give equal windows, from whatever step they are asked.

    Args:
        timeout: seconds after which a worker that gives nothing is started again; 0: never.
        sizes: samples in the window of each step, where they change; none is larger than ``batch``.
        bucket: windows whose samples are sorted by length together; 0: none.
        share: which micro-batches of each window are read; a window may have none of them.

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
            source,
            batch=batch,
            micro_batch=micro_batch,
            seed=seed,
            keep_last=keep_last,
            device=device,
            sizes=sizes,
            share=share,
        )
    lengths = lengths_of(source)
    order = Order(len(source), batch, seed=seed, keep_last=keep_last, sizes=sizes, lengths=lengths, bucket=bucket)
    if isinstance(source, Items):
        return ItemFeed(
            source,
            order,
            micro_batch=micro_batch,
            seed=seed,
            device=device,
            workers=workers,
            timeout=timeout,
            share=share,
        )
    return MemoryFeed(source, order, micro_batch=micro_batch, seed=seed, device=device, augment=augment, share=share)


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
        share: Share = WHOLE,
    ) -> None:
        self.source, self.order, self.micro_batch, self.seed = source, order, micro_batch, seed
        self.device, self.augment, self.share = device, augment, share
        self.tell: Tell = quiet
        self.stop: Callable[[], bool] = never
        one = source.gather(torch.zeros(1, dtype=torch.int64))
        self.sample_bytes = max(1, sum(t.numel() * t.element_size() for _, t in tensors(one)))
        self.ahead = max(1, min(64, _AHEAD_BYTES // (self.sample_bytes * order.batch)))

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
            epoch, indices, sizes = self.order.windows(step, min(step + self.ahead, stop))
            if self.share == WHOLE:
                yield from self._cut(epoch, indices, sizes)
            else:
                parts = [self._mine(part) for part in np.split(indices, np.cumsum(sizes)[:-1])]
                cut_out = self._cut(epoch, np.concatenate(parts), [len(part) for part in parts])
                for window, size in zip(cut_out, sizes):
                    yield shared(window, len(micro_batches(size, self.micro_batch, WHOLE)), self.share)
            step += len(sizes)

    def _mine(self, indices: Indices) -> Indices:
        """Those of a window's samples that lie in the micro-batches of the share: only the last of these may be short."""
        starts = micro_batches(len(indices), self.micro_batch, self.share)
        return np.concatenate([indices[:0], *(indices[at : at + self.micro_batch] for at in starts)])

    def _cut(self, epoch: int, indices: Indices, sizes: Sequence[int]) -> Iterator[list[Any]]:
        if not len(indices):
            yield from ([] for _ in sizes)
        elif lengths_of(self.source) is not None:  # each micro-batch is as long as its own longest sample
            for part in np.split(indices, np.cumsum(sizes)[:-1]):
                cuts = range(0, len(part), self.micro_batch)
                yield [self._gathered(epoch, part[at : at + self.micro_batch]) for at in cuts]
        else:
            for portion, size in zip(cut(self._gathered(epoch, indices), sizes), sizes):
                if size > self.micro_batch:
                    yield split(portion, self.micro_batch)
                else:
                    yield [portion] if size else []

    def _gathered(self, epoch: int, indices: Indices) -> Any:
        batch = self.source.gather(torch.from_numpy(indices))
        if self.augment is not None:
            key = seed_for(self.seed, "augment", epoch)
            batch = self.augment(batch, _Draw(key, indices, epoch, seed_for(self.seed, "augment")))
        return to_device(batch, self.device)


class _Draw:
    """Uniform numbers for each sample of a batch; each call goes on where the one before ended (``core.LastingDraw``)."""

    def __init__(self, key: int, indices: Indices, epoch: int, lasts: int) -> None:
        self.key, self.indices, self.drawn = key, indices, 0
        self.epoch, self.lasts, self.kept = epoch, lasts, 0

    def __call__(self, num: int) -> Tensor:
        numbers = uniforms(self.key, self.indices, num, skip=self.drawn)
        self.drawn += num
        return torch.from_numpy(numbers)

    def lasting(self, num: int) -> Tensor:
        numbers = uniforms(self.lasts, self.indices, num, skip=self.kept)
        self.kept += num
        return torch.from_numpy(numbers)


def held_out(source: Source, batch: int, device: torch.device, share: Share = WHOLE) -> Iterator[Any]:
    """All of a source once, in its own order, in batches; the last one may be short. The same each time it is asked.

    Args:
        share: which of the batches.
    """
    if isinstance(source, Stream):
        yield from _held_out_stream(source, batch, device, share)
        return
    for start in micro_batches(len(source), batch, share):
        indices = range(start, min(start + batch, len(source)))
        if isinstance(source, Items):
            yield to_device(Reader(source, 0).batch(0, list(indices), "held-out data"), device)
        else:
            yield to_device(source.gather(torch.tensor(indices, dtype=torch.int64)), device)


def _held_out_stream(source: Stream, batch: int, device: torch.device, share: Share) -> Iterator[Any]:
    feed = StreamFeed(source, batch=batch, micro_batch=batch, seed=0, keep_last=True, device=device)
    samples = read_stream(source, seed_for(0, "held out"))
    place = 0
    while taken := list(itertools.islice(samples, batch)):
        if place % share[1] == share[0]:
            yield feed.collated(place, 0, taken)
        place += 1
