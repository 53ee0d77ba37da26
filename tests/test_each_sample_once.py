"""Whatever interrupts a run, and whoever reads: every sample of an epoch is seen exactly once. Proven by counting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from tests.test_data import feed_of


class Numbers(Dataset):
    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> int:
        return index


def read(
    num: int, stops: list[tuple[int, int]], *, memory: bool = False, **options: Any
) -> list[tuple[int, list[int]]]:
    """(epoch, samples) of each step; at each stop another process goes on, with its own number of workers."""
    got: list[tuple[int, list[int]]] = []
    for stop, workers in stops:
        feed = feed_of(torch.arange(num) if memory else Numbers(num), workers=workers, seed=3, **options)
        windows = feed.windows(len(got), stops[-1][0] + 2)  # workers read ahead of the interruption
        for step in range(len(got), stop):
            samples = torch.cat(next(windows)).tolist()
            assert samples == feed.samples(step)
            got.append((feed.epoch_of(step), samples))
        windows.close()
    return got


stops = st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0, 1, 3])), min_size=1, max_size=4).map(sorted)
sizes = st.lists(st.integers(1, 6), min_size=32, max_size=32)


@given(num=st.integers(1, 20), stops=stops, sizes=st.none() | sizes, micro=st.integers(1, 4), memory=st.booleans())
@settings(max_examples=40, deadline=None, database=None)
def test_every_sample_of_an_epoch_is_seen_once(
    num: int, stops: list[tuple[int, int]], sizes: list[int] | None, micro: int, memory: bool
) -> None:
    got = read(num, stops, memory=memory, batch=6, micro_batch=micro, sizes=sizes)
    last = got[-1][0]
    for epoch in range(last + 1):
        counts = Counter(sample for e, samples in got if e == epoch for sample in samples)
        assert max(counts.values()) == 1
        if epoch < last:
            assert set(counts) == set(range(num))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_a_dropped_last_window_leaves_out_is_not_seen_twice_either(workers: int) -> None:
    got = read(11, [(3, workers), (4, workers), (9, workers)], batch=4, micro_batch=3, keep_last=False)
    for epoch in range(4):
        seen = [sample for e, samples in got if e == epoch for sample in samples]
        assert len(seen) == len(set(seen)) == 8
