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
) -> Feed:
    """The feed for a source. Equal arguments give equal windows, from whatever step they are asked.

    Args:
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
        return ItemFeed(source, order, micro_batch=micro_batch, seed=seed, device=device, workers=workers)
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
        one = source.gather(torch.zeros(1, dtype=torch.int64))
        sample_bytes = max(1, sum(t.numel() * t.element_size() for _, t in tensors(one)))
        self.ahead = max(1, min(64, _AHEAD_BYTES // (sample_bytes * order.batch)))

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def samples(self, step: int) -> list[int] | None:
        return [int(i) for i in self.order.window(step)[1]]

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
        self, source: Items, order: Order, *, micro_batch: int, seed: int, device: torch.device, workers: int
    ) -> None:
        self.source, self.order, self.micro_batch, self.seed = source, order, micro_batch, seed
        self.device, self.workers = device, workers

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def samples(self, step: int) -> list[int] | None:
        return [int(i) for i in self.order.window(step)[1]]

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
            count = -(-len(self.order.window(step)[1]) // self.micro_batch)
            yield [to_device(next(batches), self.device) for _ in range(count)]


class _Keys:
    """The (epoch, sample) keys of each micro-batch from a step on, for ``DataLoader``."""

    def __init__(self, feed: ItemFeed, start: int, stop: int) -> None:
        self.order = copy.copy(feed.order)
        self.micro_batch, self.start, self.stop = feed.micro_batch, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            epoch, indices = self.order.window(step)
            for at in range(0, len(indices), self.micro_batch):
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
    ) -> None:
        self.source, self.batch, self.micro_batch, self.keep_last = source, batch, micro_batch, keep_last
        self.seed, self.device, self.sizes = seed, device, sizes

    def epoch_of(self, step: int) -> int:
        return 0

    def samples(self, step: int) -> list[int] | None:
        return None

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        if start >= stop:
            return
        for step, samples in enumerate(self._cut()):
            if step >= start:
                parts = range(0, len(samples), self.micro_batch)
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


class ChangedFeed:
    """A feed whose windows go through functions of (step, window) before they are trained on.

    Args:
        changes: each takes the step (from 0) and the window's micro-batches, and gives micro-batches.
    """

    def __init__(self, feed: Feed, changes: Sequence[Callable[[int, list[Any]], list[Any]]]) -> None:
        self.feed, self.changes = feed, changes

    def epoch_of(self, step: int) -> int:
        return self.feed.epoch_of(step)

    def samples(self, step: int) -> list[int] | None:
        return self.feed.samples(step)

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


def held_out(source: Source, batch: int, device: torch.device) -> Iterator[Any]:
    """All of a source once, in its own order, in batches; the last one may be short. The same each time it is asked."""
    if isinstance(source, Stream):
        yield from _held_out_stream(source, batch, device)
        return
    for start in range(0, len(source), batch):
        indices = range(start, min(start + batch, len(source)))
        if isinstance(source, Items):
            yield to_device(_Seeded(source, 0).__getitems__([(0, i) for i in indices]), device)
        else:
            yield to_device(source.gather(torch.tensor(indices, dtype=torch.int64)), device)


def _held_out_stream(source: Stream, batch: int, device: torch.device) -> Iterator[Any]:
    feed = StreamFeed(source, batch=batch, micro_batch=batch, seed=0, keep_last=True, device=device)
    samples = read_stream(source, seed_for(0, "held out"))
    place = 0
    while taken := list(itertools.islice(samples, batch)):
        yield feed.collated(place, 0, taken)
        place += 1
