"""What a step waited for data stands in its record, and is told where it is much."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

import thalweg
from thalweg import Recipe
from thalweg.core import DataError
from thalweg.data import as_source, make_feed
from thalweg.engine.stall import Stall, advice

STALL = importlib.import_module("thalweg.engine.stall")


class Slow(torch.utils.data.Dataset[Any]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        return {"x": torch.full((3,), float(number)), "y": torch.tensor(number % 2)}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def train(data: Any, folder: Path | None = None, **changes: Any) -> Any:
    recipe = {"train.steps": 6, "train.batch": 2, "precision": "fp32", **changes}
    return thalweg.train(lambda: nn.Linear(3, 2), loss, data, recipe, folder=folder)


def test_the_record_says_what_a_step_waited_and_a_person_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STALL, "_STEPS", 3)
    monkeypatch.setattr(STALL, "_SECONDS", 0.01)
    result = train(Slow(0.005), tmp_path / "run")
    assert all(0.01 <= record.waited < 0.2 for record in result.records)
    lines = [json.loads(line) for line in (result.folder / "records.jsonl").read_text().splitlines()]
    assert [line["waited"] for line in lines if line["kind"] == "step"] == [r.waited for r in result.records]
    (event,) = (line for line in lines if line["kind"] == "event" and line["name"] == "data")
    assert "of the time of" in event["text"] and "went into waiting for data" in event["text"]
    assert "give data.workers=2 or more" in event["text"]
    assert result.goodput.seconds["waiting for data"] >= 0.06


def test_data_in_memory_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STALL, "_SECONDS", 0.0)
    monkeypatch.setattr(STALL, "SHARE", 0.5)
    data = {"x": torch.randn(64, 3), "y": torch.zeros(64, dtype=torch.int64)}
    result = train(data, tmp_path / "run", **{"train.steps": 40})
    text = (result.folder / "records.jsonl").read_text()
    assert "waiting for data" not in text
    assert '"waited": 0.0,' not in text and '"waited": 0.0}' not in text  # a step that did not wait says nothing of it


def test_it_is_told_once_and_what_is_beside_the_steps_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(STALL, "perf_counter", lambda: now[0])

    def windows() -> Any:
        for number in range(60):
            now[0] += 5.0 if number == 0 else 0.02  # the first wait starts workers
            yield [number]

    stall, heard = Stall(), []
    for number, _ in enumerate(stall.timed(windows())):
        now[0] += 0.08
        if number == 40:
            now[0] += 50.0  # an evaluation
        heard.append(stall.news(50.0 if number >= 40 else 0.0, lambda: "Do something."))
    assert stall.waited == pytest.approx(5.0 + 59 * 0.02) and stall.last == pytest.approx(0.02, abs=0.03)
    (text,) = filter(None, heard)
    assert heard.index(text) == 20
    assert text == "19% of the time of 20 steps went into waiting for data: 20 of 104 ms a step. Do something."

    stall = Stall()
    for _ in stall.timed(windows()):
        now[0] += 0.5
        assert not stall.news(0.0, lambda: "x")  # 4 %


def test_what_to_do_follows_the_data() -> None:
    class Live(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([torch.zeros(1)] * 4)

    def said(data: Any, workers: int = 0, augment: Any = None) -> str:
        feed = make_feed(
            as_source(data),
            batch=2,
            micro_batch=2,
            seed=0,
            keep_last=True,
            device=torch.device("cpu"),
            workers=workers,
            augment=augment,
        )
        return advice(feed, Recipe().override({"data.workers": workers}))

    assert "data.workers=2" in said(Slow(0)) and "3 workers do not keep up" in said(Slow(0), 3)
    assert "read ahead" in said(Live()) and "one byte a value" in said(torch.zeros(4, 512))
    assert "larger train.batch" in said(torch.zeros(4))
    assert "augmented" in said(torch.zeros(4), augment=lambda batch, draw: batch)


# --- a DataLoader as data --------------------------------------------------------------------------------------------


def test_a_loader_is_taken_with_its_data_set_and_what_is_not_used_is_told() -> None:
    result = train(DataLoader(Slow(0), batch_size=4, num_workers=1, worker_init_fn=print, shuffle=True))
    (told,) = (made for made in result.plan.decisions if made.path == "data")
    for word in ("batch_size=4 (train.batch=2)", "num_workers=1 (data.workers=0)", "worker_init_fn"):
        assert word in told.reason
    (told,) = (made for made in train(DataLoader(Slow(0), batch_size=2)).plan.decisions if made.path == "data")
    assert "not used" not in told.reason


def test_an_order_of_ones_own_is_refused() -> None:
    data = Slow(0)

    class Pairs(BatchSampler):
        pass

    for loader, words in (
        (DataLoader(data, batch_sampler=Pairs(SequentialSampler(data), 2, False)), "batch_sampler is a Pairs"),
        (DataLoader(data, batch_sampler=[[0, 1], [1, 0]]), "batch_sampler is a list"),
        (DataLoader(data, sampler=RandomSampler(data, replacement=True)), "draws 8 samples with replacement"),
        (DataLoader(data, sampler=RandomSampler(data, num_samples=3)), "draws 3 samples without replacement"),
        (DataLoader(data, sampler=[1, 2]), "sampler is a list"),
    ):
        with pytest.raises(DataError) as err:
            as_source(loader)
        assert words in err.value.numbers and "order of the data is the run's" in err.value.asked


def test_a_batch_sampler_of_torchs_keeps_its_collate_function() -> None:
    data = Slow(0)
    plain = BatchSampler(RandomSampler(data), 4, drop_last=False)
    assert as_source(DataLoader(data, batch_sampler=plain, collate_fn=len)).collate is len
