"""Short micro-batches filled up with samples of weight 0: the same run, and refused where it would be another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg import train
from thalweg.data.padded import IGNORED, Padding, StaticFeed, padded, targets_of
from thalweg.device import Device
from thalweg.regularize import cross_entropy

NUM = 11  # samples; the second window of an epoch has 3: a micro-batch of 2, and one of 1


class Net(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(NUM, 5, generator=draw, dtype=dtype)
    return {"x": x, "labels": torch.randint(0, 3, (NUM,), generator=draw)}


def run(loss: Any, *, norm: bool = False, source: Any = None, **changes: Any) -> Any:
    torch.manual_seed(1)
    recipe = {
        "train.steps": 6,
        "train.batch": 8,
        "train.micro_batch": 2,
        "train.clip": 0.5,
        "optimizer.rule": "adamw",
        "regularize.by_sample": True,
        "precision": "fp32",
        "device": "cpu",
    }
    return train(Net(norm).double(), loss, source or data(), {**recipe, **changes})


def told(result: Any) -> str:
    return "; ".join(f"{d.value}: {d.reason}" for d in result.plan.decisions if d.path == "padding")


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "static_shapes", property(lambda self: True))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of every micro-batch that the model trains on."""
    seen: list[int] = []
    forward = Net.forward

    def counted(self: Net, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    return seen


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return cross_entropy(model(batch["x"]), batch["labels"], label_smoothing=0.1)


def test_a_padded_run_is_the_same_run(static: None, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    there = run(summed)
    assert set(sizes[-12:]) == {2} and told(there).startswith("2: short micro-batches")
    monkeypatch.setattr(Device, "static_shapes", property(lambda self: False))
    here = run(summed)
    assert 1 in sizes and not told(here)
    assert [r.weight for r in there.records] == [r.weight for r in here.records] == [8, 3, 8, 3, 8, 3]
    for mine, theirs in zip(here.records, there.records):
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-12) and theirs.grad_norm == pytest.approx(
            mine.grad_norm, rel=1e-12
        )
    for p, q in zip(here.model.parameters(), there.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("batch statistics", "1 layers normalise by the batch, such as 'layers.1', and would see the added samples"),
        ("a mean", "weigh"),
        ("no mark", "the loss of 1 samples is"),
        ("looked up", "the model or its loss cannot take a target that does not count (RuntimeError)"),
        ("no targets", "the batch has no targets that can be marked as not counting"),
    ],
)
def test_where_it_would_be_another_run_nothing_is_padded(what: str, words: str, static: None, sizes: list[int]) -> None:
    def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    def unmarked(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["x"]).square().sum(), (batch["labels"] != IGNORED).sum()

    def alone(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    def looked_up(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return (model(batch["x"]) * F.one_hot(batch["labels"], 3)).square().sum(), len(batch["x"])

    losses = {
        "batch statistics": summed,
        "looked up": looked_up,
        "a mean": mean,
        "no mark": unmarked,
        "no targets": alone,
    }
    source = {"x": data()["x"]} if what == "no targets" else None
    micro = {"train.batch": 6, "train.micro_batch": 3} if what == "batch statistics" else {}
    found = run(losses[what], norm=what == "batch statistics", source=source, **micro)
    assert told(found).startswith("none: ") and words in told(found)
    assert min(sizes) < found.plan.recipe.train.micro_batch


def test_where_no_micro_batch_is_short_nothing_is_said(static: None) -> None:
    assert not told(run(summed, **{"train.last": "drop"}))


def test_what_is_filled_in() -> None:
    batch = {"x": torch.arange(6.0).view(3, 2), "soft": torch.ones(3, 2), "all": torch.tensor(7.0)}
    found = padded(batch, Padding(5, "soft"))
    assert found["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]] and found["all"] is batch["all"]
    assert found["soft"].tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert padded(batch, Padding(3, "soft")) is batch
    assert targets_of((torch.ones(2), torch.ones(2)), "labels") == "1"
    assert targets_of({"labels": torch.ones(2, dtype=torch.uint8)}, "labels") is None  # no -100 in there


def test_each_micro_batch_has_memory_of_its_own() -> None:
    class Two:
        def windows(self, start: int, stop: int) -> Any:
            whole = torch.arange(4.0)
            yield [{"x": whole[:2]}, {"x": whole[2:]}]

    (window,) = StaticFeed(Two(), torch.device("meta"), None).windows(0, 1)  # type: ignore[arg-type]
    assert [part["x"].storage_offset() for part in window] == [0, 0] and window[1]["x"].device.type == "meta"
