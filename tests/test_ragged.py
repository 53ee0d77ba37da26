"""Sequences of different lengths: padded to the longest of a micro-batch, and sorted by length within a bucket."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import thalweg
from tests.conftest import three_parts
from thalweg.core import DataError, RecipeError
from thalweg.data import Ragged, make_feed

NUM, BATCH = 43, 4


def texts() -> Ragged:
    lengths = np.random.default_rng(0).integers(1, 30, NUM)
    return Ragged([[i + 1] * int(n) for i, n in enumerate(lengths)], {"labels": torch.arange(NUM) % 2})


def feed(bucket: int, micro_batch: int = BATCH, **more: Any) -> Any:
    given: dict[str, Any] = {"batch": BATCH, "micro_batch": micro_batch, "seed": 0, "keep_last": True, "bucket": bucket}
    return make_feed(texts(), **given, device=torch.device("cpu"), **more)


def test_what_is_not_there_is_named() -> None:
    for sequences, rows, asked in (
        ([], {}, "The data holds no sample."),
        ([[1], []], {}, "A sequence of the data holds no token."),
        ([[1], [2]], {"labels": torch.zeros(3)}, "The tensors of the data differ in length."),
    ):
        with pytest.raises(DataError) as caught:
            Ragged(sequences, rows)
        assert three_parts(caught.value)[0] == asked
    for none in ([[1.5]], [[2**40]], [["a"]], [[[1, 2]]], [5], 5):
        with pytest.raises(DataError) as caught:
            Ragged(none)
        assert three_parts(caught.value)[0] == "The sequences of the data are no tokens."
    for words, asked in (
        ({"multiple": 0}, "multiple=0 is no length."),
        ({"rows": {"tokens": torch.ones(1)}}, "A tensor of the data is called 'tokens'."),
    ):
        with pytest.raises(DataError) as caught:
            Ragged([[1]], **words)
        assert three_parts(caught.value)[0] == asked


def test_rows_belong_to_their_sequences_and_padding_stands_behind() -> None:
    batch = Ragged([[7], [8, 8, 8]], {"labels": torch.tensor([3, 4])}, pad=-1, multiple=4).gather(
        torch.tensor([0, 1, 0])
    )
    assert batch["tokens"].tolist() == [[7, -1, -1, -1], [8, 8, 8, -1], [7, -1, -1, -1]]
    assert batch["labels"].tolist() == [3, 4, 3]


@pytest.mark.parametrize("bucket", [0, 1, 3, 1000])
def test_each_epoch_sees_each_sample_once_and_any_step_can_be_asked(bucket: int) -> None:
    windows = list(feed(bucket).windows(0, 22))
    for epoch in (windows[:11], windows[11:]):
        seen = [int(row[0]) for window in epoch for part in window for row in part["tokens"]]
        assert sorted(seen) == list(range(1, NUM + 1))
        assert len(epoch[-1][0]["tokens"]) == NUM % BATCH
    for start in (1, 7, 12, 21):
        for window, other in zip(feed(bucket).windows(start, 22), windows[start:], strict=True):
            assert torch.equal(window[0]["tokens"], other[0]["tokens"])
    assert feed(bucket).samples(5) == [int(row[0]) - 1 for row in windows[5][0]["tokens"]]


def test_a_bucket_pads_little_and_its_windows_change_from_epoch_to_epoch() -> None:
    def padding(bucket: int) -> float:
        parts = [window[0]["tokens"] for window in feed(bucket).windows(0, 11)]
        return sum(int((t == 0).sum()) for t in parts) / sum(t.numel() for t in parts)

    assert padding(11) < 0.12 < 0.3 < padding(0)
    first, second = ([frozenset(feed(5).samples(step)) for step in range(at, at + 11)] for at in (0, 11))
    assert not set(first) & set(second)
    longest = [max(t["tokens"].shape[1] for t in window) for window in feed(11).windows(0, 10)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_a_micro_batch_is_as_long_as_its_own_longest_sequence() -> None:
    whole, cut = next(iter(feed(0).windows(2, 3))), next(iter(feed(0, micro_batch=2).windows(2, 3)))
    assert [len(part["tokens"]) for part in cut] == [2, 2]
    assert min(part["tokens"].shape[1] for part in cut) < whole[0]["tokens"].shape[1]
    for part in cut:
        assert int((part["tokens"] != 0).sum(1).max()) == part["tokens"].shape[1]


def test_ranks_share_out_the_same_windows() -> None:
    mine = [list(feed(3, micro_batch=2, share=(rank, 2)).windows(0, 11)) for rank in (0, 1)]
    for step, window in enumerate(feed(3, micro_batch=2).windows(0, 11)):
        for index, part in enumerate(window):
            assert torch.equal(mine[index % 2][step][index // 2]["tokens"], part["tokens"])


def loss(model: nn.Module, batch: Any) -> Any:
    return model(batch["tokens"].float().mean(1, keepdim=True)).square().mean()


def test_a_run_trains_on_them() -> None:
    given = {"train.epochs": 1.0, "train.batch": BATCH, "data.bucket": 3, "precision": "fp32", "compile": "off"}
    assert [r.weight for r in thalweg.train(nn.Linear(1, 1), loss, texts(), given).records] == [BATCH] * 10 + [3]


def test_data_without_lengths_and_changing_batches_are_refused() -> None:
    plain = {"tokens": torch.ones(NUM, 3)}
    more = {"schedule.batch": "constant(50%, value=0.5) >> hold()"}
    for data, changes, asked in (
        (plain, {}, "data.bucket=3 sorts samples by length, and this data says none."),
        (texts(), more, "data.bucket=3 does not go with schedule.batch."),
    ):
        with pytest.raises(RecipeError) as caught:
            thalweg.train(
                nn.Linear(1, 1), loss, data, {"train.steps": 2, "data.bucket": 3, "precision": "fp32", **changes}
            )
        assert three_parts(caught.value)[0] == asked
