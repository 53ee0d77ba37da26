"""Windows of micro-batches for the steps of a run, from any source, from any step on."""

from __future__ import annotations

import copy
import itertools
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from thalweg.core import DataError, Feed, Gather, seed_for
from thalweg.data.order import Indices, Order, uniforms
from thalweg.data.sources import Items, Source, Stream
from thalweg.data.trees import split, tensors, to_device, tree_map

Augment = Callable[[Any, Callable[[int], Tensor]], Any]
#: (which, of how many): of the micro-batches of each window, every ``of how many``-th from number ``which`` on.
Share = tuple[int, int]
WHOLE: Share = (0, 1)
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
    augment: Augment | None = None,
    sizes: Sequence[int] | None = None,
    share: Share = WHOLE,
) -> Feed:
    """The feed for a source. Equal arguments give equal windows, from whatever step they are asked.

    Args:
        sizes: samples in the window of each step, where they change; none is larger than ``batch``.
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
    order = Order(len(source), batch, seed=seed, keep_last=keep_last, sizes=sizes)
    if isinstance(source, Items):
        return ItemFeed(source, order, micro_batch=micro_batch, seed=seed, device=device, workers=workers, share=share)
    return MemoryFeed(source, order, micro_batch=micro_batch, seed=seed, device=device, augment=augment, share=share)


def micro_batches(num: int, micro_batch: int, share: Share) -> range:
    """Where the micro-batches of a share begin, in a window of ``num`` samples.

    >>> [list(micro_batches(10, 4, (rank, 2))) for rank in (0, 1)]
    [[0, 8], [4]]
    """
    which, of = share
    return range(which * micro_batch, num, of * micro_batch)


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
        one = source.gather(torch.zeros(1, dtype=torch.int64))
        sample_bytes = max(1, sum(t.numel() * t.element_size() for _, t in tensors(one)))
        self.ahead = max(1, min(64, _AHEAD_BYTES // (sample_bytes * order.batch)))

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        step = start
        while step < stop:
            epoch, first = self.order.window(step)
            parts = [self._mine(first)]
            for later in range(step + 1, min(step + self.ahead, stop)):
                if self.order.epoch_of(later) != epoch:
                    break
                parts.append(self._mine(self.order.window(later)[1]))
            yield from self._cut(epoch, parts)
            step += len(parts)

    def _mine(self, indices: Indices) -> Indices:
        """Those of a window's samples that lie in the micro-batches of the share: only the last of these may be short."""
        if self.share == WHOLE:
            return indices
        starts = micro_batches(len(indices), self.micro_batch, self.share)
        return np.concatenate([indices[:0], *(indices[at : at + self.micro_batch] for at in starts)])

    def _cut(self, epoch: int, parts: list[Indices]) -> Iterator[list[Any]]:
        indices = np.concatenate(parts)
        if not len(indices):
            yield from ([] for _ in parts)
            return
        batch = self.source.gather(torch.from_numpy(indices))
        if self.augment is not None:
            key = seed_for(self.seed, "augment", epoch)
            batch = self.augment(batch, _Draw(key, indices))
        batch = to_device(batch, self.device)
        at = 0
        for part in parts:
            yield split(_slice(batch, at, at + len(part)), self.micro_batch) if len(part) else []
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


class _OwnRandom:
    """Python's, numpy's and torch's generators as a named stream: ours inside ``with``, the caller's outside."""

    def __init__(self, name: int) -> None:
        self._name = name
        self._mine: tuple[Any, Any, Tensor] | None = None
        self._theirs: tuple[Any, Any, Tensor] | None = None

    def __enter__(self) -> None:
        self._theirs = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        if self._mine is not None:
            self._set(self._mine)
        else:
            random.seed(self._name)
            np.random.seed([self._name & 0xFFFFFFFF, self._name >> 32])
            torch.default_generator.manual_seed(self._name)

    def __exit__(self, *_: object) -> None:
        self._mine = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        if self._theirs is not None:
            self._set(self._theirs)

    @staticmethod
    def _set(states: tuple[Any, Any, Tensor]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Seeded:
    """A data set whose samples draw from streams named by (seed, epoch, sample), in whatever process they are read.

    Micro-batches are collated here too, with a stream of their own: some collate functions draw, as for masked tokens.
    """

    def __init__(self, source: Items, seed: int) -> None:
        self.dataset, self.collate, self.seed = source.dataset, source.collate, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, sample = key
        with _OwnRandom(seed_for(self.seed, "sample", epoch, sample)):
            return self.dataset[sample]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        samples = [self[key] for key in keys]
        with _OwnRandom(seed_for(self.seed, "collate", *keys[0])):
            return self.collate(samples)

    def __len__(self) -> int:
        return len(self.dataset)


def _as_it_is(batch: Any) -> Any:
    return batch


class ItemFeed:
    """A map-style data set behind torch's own ``DataLoader``: one worker task is one micro-batch."""

    def __init__(
        self,
        source: Items,
        order: Order,
        *,
        micro_batch: int,
        seed: int,
        device: torch.device,
        workers: int,
        share: Share = WHOLE,
    ) -> None:
        self.source, self.order, self.micro_batch, self.seed = source, order, micro_batch, seed
        self.device, self.workers, self.share = device, workers, share

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self.source, self.seed),  # type: ignore[arg-type]
            batch_sampler=_Keys(self, start, stop),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
        )
        batches = iter(loader)
        for step in range(start, stop):
            count = len(micro_batches(len(self.order.window(step)[1]), self.micro_batch, self.share))
            yield [to_device(next(batches), self.device) for _ in range(count)]


class _Keys:
    """The (epoch, sample) keys of each micro-batch from a step on, for ``DataLoader``."""

    def __init__(self, feed: ItemFeed, start: int, stop: int) -> None:
        self.order = copy.copy(feed.order)
        self.micro_batch, self.share, self.start, self.stop = feed.micro_batch, feed.share, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch, indices = self.order.window(step)
            for at in micro_batches(len(indices), self.micro_batch, self.share):
                yield [(epoch, int(i)) for i in indices[at : at + self.micro_batch]]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; workers must outlive them for the run to save and stop in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class StreamFeed:
    """An iterable: windows are cut from it in its own order; a later step is reached by reading up to it."""

    def __init__(
        self,
        source: Stream,
        *,
        batch: int,
        micro_batch: int,
        seed: int,
        keep_last: bool,
        device: torch.device,
        sizes: Sequence[int] | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.source, self.batch, self.micro_batch, self.keep_last = source, batch, micro_batch, keep_last
        self.seed, self.device, self.sizes, self.share = seed, device, sizes, share

    def epoch_of(self, step: int) -> int:
        return 0

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        if start >= stop:
            return
        for step, samples in enumerate(self._cut()):
            if step >= start:
                parts = micro_batches(len(samples), self.micro_batch, self.share)
                yield [self.collated(step, at, samples[at : at + self.micro_batch]) for at in parts]
            if step + 1 >= stop:
                return

    def collated(self, step: int, at: int, samples: list[Any]) -> Any:
        with _OwnRandom(seed_for(self.seed, "collate", step, at)):
            batch = self.source.collate(samples)
        return to_device(batch, self.device)

    def _cut(self) -> Iterator[list[Any]]:
        epoch = step = 0
        while True:
            window: list[Any] = []
            seen = 0
            for sample in self._read(epoch):
                window.append(sample)
                seen += 1
                if len(window) == self._size(step):
                    yield window
                    window, step = [], step + 1
            if window and (self.keep_last or seen < self._size(step)):
                yield window
                step += 1
            if not seen:
                raise DataError("The data holds no sample.", "Its iterator ended at once.", "Give at least one sample.")
            epoch += 1

    def _size(self, step: int) -> int:
        return self.batch if self.sizes is None else self.sizes[min(step, len(self.sizes) - 1)]

    def _read(self, epoch: int) -> Iterator[Any]:
        return read_stream(self.source, seed_for(self.seed, "stream", epoch))


def read_stream(source: Stream, name: int) -> Iterator[Any]:
    """One pass over a stream; what it draws comes from the stream of random numbers called ``name``."""
    own = _OwnRandom(name)
    with own:
        samples = iter(source.iterable)
    while True:
        with own:
            try:
                sample = next(samples)
            except StopIteration:
                return
        yield sample


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
            yield to_device(_Seeded(source, 0).__getitems__([(0, i) for i in indices]), device)
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
