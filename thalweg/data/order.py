"""The order of the data as a pure function of (seed, epoch, position): nothing is shuffled, nothing is held.

A keyed Feistel network is a permutation of [0, 4**k); positions that fall outside [0, num) are walked on until they fall
inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Any position of any epoch costs the same, and no
permutation is ever in memory, be it of a billion samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thalweg.core import seed_for

Indices = NDArray[np.int64]
_ROUNDS = 6


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(num: int, key: int, positions: Indices) -> Indices:
    """Where each position of a shuffled range of ``num`` points.

    Args:
        num: length of the range, 1 or more.
        key: names the permutation.
        positions: int64, each in [0, num).

    >>> sorted(permute(5, 7, np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """
    half = max(1, ((num - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = mix(np.array([seed_for(key, "round", r) for r in range(_ROUNDS)], dtype=np.uint64))

    def once(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for k in keys:
            left, right = right, left ^ (mix(right + k) & mask)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        values = once(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= num)
        while outside.size:
            values[outside] = once(values[outside])
            outside = outside[values[outside] >= num]
    return values.astype(np.int64)


def uniforms(key: int, samples: Indices, num: int, *, skip: int = 0) -> NDArray[np.float32]:
    """``num`` numbers in [0, 1) for each sample, from place ``skip`` on: a function of (key, sample, place) alone.

    Returns:
        float32, of shape (len(samples), num); 24 random bits each.
    """
    with np.errstate(over="ignore"):
        base = mix(samples.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed_for(key, "uniform")))
        places = mix(np.arange(skip + 1, skip + num + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))
        bits = mix(base[:, None] + places[None, :]) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2**-24)


class Order:
    """Which samples a step sees.

    Windows are cut from the stream of one epoch's samples; an epoch's last window is short where ``batch`` does not divide
    ``num``, and is kept or dropped. Step ``s`` is found by division: seeking is free.

    Args:
        num: samples in an epoch.
        batch: samples in a window.
        seed: the run's seed.
        keep_last: whether an epoch's short last window is a step.
        sizes: samples in the window of each step, where they change; ``batch`` is then the largest of them.
        lengths, bucket: of each sample; so many windows at a time are sorted by them (``bucketed``).

    >>> order = Order(10, 4, seed=0, keep_last=True)
    >>> order.steps_per_epoch, [len(order.window(s)[1]) for s in range(4)]
    (3, [4, 4, 2, 4])
    """

    def __init__(
        self,
        num: int,
        batch: int,
        *,
        seed: int,
        keep_last: bool,
        sizes: Sequence[int] | None = None,
        lengths: Indices | None = None,
        bucket: int = 0,
    ) -> None:
        self.num, self.batch, self.seed = num, batch, seed
        self.steps_per_epoch = max(1, -(-num // batch) if keep_last else num // batch)
        self._lengths = lengths if bucket else None
        self._block = (bucket or max(1, 65536 // batch)) * batch  # whole windows, so that one lies in one block
        self._places = None if sizes is None else _places(num, sizes, keep_last)
        self._cached: tuple[tuple[int, int], Indices] | None = None

    def place(self, step: int) -> tuple[int, int, int]:
        """(epoch, first position, position after the last) of step ``step`` (from 0)."""
        if self._places is not None:
            return self._places[step]
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch, place * self.batch, min((place + 1) * self.batch, self.num)

    def epoch_of(self, step: int) -> int:
        """The epoch that step ``step`` (from 0) draws from."""
        return self.place(step)[0]

    def window(self, step: int) -> tuple[int, Indices]:
        """(epoch, sample indices) of step ``step`` (from 0)."""
        epoch, first, stop = self.place(step)
        block, offset = divmod(first, self._block)
        found = self._of_block(epoch, block)[offset : offset + stop - first]
        if len(found) < stop - first:  # windows of changing sizes do not keep to the blocks
            found = np.concatenate([found, self._of_block(epoch, block + 1)[: stop - first - len(found)]])
        return epoch, found

    def windows(self, start: int, stop: int) -> tuple[int, Indices, list[int]]:
        """(epoch, sample indices, how many of them are each window's) of the steps from ``start`` on that one epoch has, up to
        ``stop``; at least one step. Windows of one size that lie together are found at once.
        """
        if self._places is not None:
            epoch = self.epoch_of(start)
            parts = [self.window(step)[1] for step in range(start, stop) if self.epoch_of(step) == epoch]
            return epoch, np.concatenate(parts), [len(part) for part in parts]
        epoch, first, _ = self.place(start)
        block, offset = divmod(first, self._block)
        num = min(stop, (epoch + 1) * self.steps_per_epoch) - start
        found = self._of_block(epoch, block)[offset : offset + num * self.batch]
        whole, rest = divmod(len(found), self.batch)
        return epoch, found, [self.batch] * whole + [rest] * (rest > 0)

    def _of_block(self, epoch: int, block: int) -> Indices:
        if self._cached is None or self._cached[0] != (epoch, block):
            start = block * self._block
            positions = np.arange(start, min(start + self._block, self.num), dtype=np.int64)
            found = permute(self.num, seed_for(self.seed, "order", epoch), positions)
            if self._lengths is not None:
                found = bucketed(found, self._lengths, self.batch, seed_for(self.seed, "bucket", epoch, block))
            self._cached = ((epoch, block), found)
        return self._cached[1]


def bucketed(samples: Indices, lengths: Indices, batch: int, key: int) -> Indices:
    """The same samples, so that those of a window are of about one length; which window comes when is shuffled.

    Those behind the last whole window stay where they are: they are no longer or shorter than others.

    Args:
        lengths: of all samples, by index.
        key: names the order of the windows.

    >>> bucketed(np.array([0, 1, 2, 3, 4]), np.array([9, 1, 8, 2, 5]), 2, 0).reshape(-1)[:4].tolist()
    [1, 3, 2, 0]
    """
    whole = len(samples) // batch * batch
    if not whole:
        return samples
    by_length = samples[:whole][np.argsort(lengths[samples[:whole]], kind="stable")].reshape(-1, batch)
    turns = permute(len(by_length), key, np.arange(len(by_length), dtype=np.int64))
    return np.concatenate([by_length[turns].reshape(-1), samples[whole:]])


def _places(num: int, sizes: Sequence[int], keep_last: bool) -> list[tuple[int, int, int]]:
    """(epoch, first, stop) of every step: windows of changing sizes in a row, none of them across the end of an epoch."""
    places, epoch, first = [], 0, 0
    for size in sizes:
        if first >= num or (not keep_last and first + size > num and first):
            epoch, first = epoch + 1, 0
        places.append((epoch, first, min(first + size, num)))
        first += size
    return places
