"""A map-style data set, read sample by sample, here or by workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch

from thalweg.core import FeedState, Tell, seed_for
from thalweg.data.draws import OwnRandom
from thalweg.data.faults import listed, put_together, told_as
from thalweg.data.order import Order
from thalweg.data.quiet import never, quiet
from thalweg.data.share import WHOLE, Share, micro_batches, shared
from thalweg.data.sources import Items
from thalweg.data.trees import to_device, tree_map
from thalweg.data.workers import Place, Stopped, Workers, unnoticed
from thalweg.device import capabilities_of


class Reader:
    """Reads samples that draw from streams named by (seed, epoch, sample), in whatever process they are read.

    Micro-batches are collated here too, with a stream of their own: some collate functions draw, as for masked tokens.
    """

    def __init__(self, source: Items, seed: int) -> None:
        self.dataset, self.collate, self.seed = source.dataset, source.collate, seed

    def batch(self, epoch: int, samples: list[int], where: str) -> Any:
        """These samples, put together.

        Raises:
            DataError: from what the data set or its collate function raised; memory that ran out is passed on as it is.
        """
        read = [self._sample(epoch, sample, where) for sample in samples]
        name = seed_for(self.seed, "collate", epoch, samples[0])
        with unnoticed():
            return put_together(self.collate, read, name, f"In {where}, samples {listed(samples)}")

    def _sample(self, epoch: int, sample: int, where: str) -> Any:
        with (
            told_as(f"Sample {sample} of the data set cannot be read.", f"In {where}"),
            OwnRandom(seed_for(self.seed, "sample", epoch, sample)),
        ):
            return self.dataset[sample]


class Parts:
    """The micro-batch at each place: which samples it holds, and the reading of them. Goes to the workers."""

    def __init__(self, reader: Reader, order: Order, micro_batch: int, share: Share) -> None:
        self.reader, self.order, self.micro_batch, self.share = reader, order, micro_batch, share

    def count(self, step: int) -> int:
        """Micro-batches of this share in the window of a step."""
        _, first, stop = self.order.place(step)
        return len(micro_batches(stop - first, self.micro_batch, self.share))

    def whole(self, step: int) -> int:
        """Micro-batches of all shares in the window of a step."""
        _, first, stop = self.order.place(step)
        return len(micro_batches(stop - first, self.micro_batch, WHOLE))

    def samples(self, place: Place) -> tuple[int, list[int]]:
        """(epoch, sample indices) of one micro-batch."""
        step, part = place
        epoch, indices = self.order.window(step)
        at = micro_batches(len(indices), self.micro_batch, self.share)[part]
        return epoch, [int(i) for i in indices[at : at + self.micro_batch]]

    def name(self, place: Place) -> str:
        epoch, samples = self.samples(place)
        return f"samples {listed(samples)} for step {place[0] + 1} (epoch {epoch})"

    def __call__(self, place: Place) -> Any:
        epoch, samples = self.samples(place)
        return self.reader.batch(epoch, samples, f"step {place[0] + 1} (epoch {epoch})")


class ItemFeed:
    """A map-style data set, in this process or behind workers: one task of a worker is one micro-batch.

    Args:
        timeout: seconds after which a worker that is waited for is started again; 0: never. In this process nothing can be
            done about a data set that hangs.
    """

    def __init__(
        self,
        source: Items,
        order: Order,
        *,
        micro_batch: int,
        seed: int,
        device: torch.device,
        workers: int,
        timeout: float = 600.0,
        share: Share = WHOLE,
    ) -> None:
        self.source, self.order, self.micro_batch, self.seed = source, order, micro_batch, seed
        self.device, self.workers, self.timeout, self.share = device, workers, timeout, share
        self.tell: Tell = quiet
        self.stop: Callable[[], bool] = never

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def samples(self, step: int) -> list[int]:
        return [int(i) for i in self.order.window(step)[1]]

    def state(self, step: int) -> FeedState | None:
        return None

    def restore(self, step: int, state: FeedState) -> None:
        """Any step can be asked for."""

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        parts = Parts(Reader(self.source, self.seed), self.order, self.micro_batch, self.share)
        places = ((step, part) for step in range(start, stop) for part in range(parts.count(step)))
        with closing(self._by_workers(parts, places) if self.workers else self._here(parts, places)) as batches:
            for step in range(start, stop):
                window = [self._near(batch) for batch in islice(batches, parts.count(step))]
                if len(window) < parts.count(step):  # someone wants the run to end
                    return
                yield shared(window, parts.whole(step), self.share)

    def _here(self, parts: Parts, places: Iterator[Place]) -> Generator[Any, None, None]:
        for place in places:
            if place[1] and self.stop():
                return
            yield parts(place)

    def _by_workers(self, parts: Parts, places: Iterator[Place]) -> Generator[Any, None, None]:
        workers = Workers(
            parts,
            self.workers,
            dataset=self.source.dataset,
            name=parts.name,
            timeout=self.timeout,
            tell=self.tell,
            stop=self.stop,
        )
        try:
            yield from workers.results(places)
        except Stopped:
            return
        finally:
            workers.close()

    def _near(self, batch: Any) -> Any:
        if self.workers and capabilities_of(self.device).pins:
            batch = tree_map(lambda t: t.pin_memory(), batch)
        return to_device(batch, self.device)
