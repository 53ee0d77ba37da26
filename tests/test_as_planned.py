"""A run that is resumed for longer: what goes by its steps stays where it was planned, and is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.conftest import three_parts
from thalweg.core import RunFolderError
from thalweg.watch import Memory

SAMPLES, BATCH, STEPS = 40, 4, 8


class Seen(nn.Module):
    """Two layers; it notes which samples it trains on, and of what size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(1, 2), nn.Linear(2, 1)
        self.windows: list[tuple[list[int], int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.windows.append((x[:, 0, 0, 0].int().tolist(), x.shape[2], self.first.weight.requires_grad))
        return self.head(torch.tanh(self.first(x.mean((1, 2, 3))[:, None] / SAMPLES)))


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["images"].float()).square().mean()


def go(
    folder: Path, *, resume: Any = False, accept: tuple[str, ...] = (), **changes: Any
) -> tuple[Any, Seen, list[str]]:
    """(result, what was seen, changes that were told)."""
    images = torch.arange(float(SAMPLES)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    recipe = {"train.steps": STEPS, "train.batch": BATCH, "precision": "fp32", "compile": "off", "device": "cpu"}
    recipe |= {
        "checkpoint.every": 1,
        "checkpoint.keep_last": 99,
        "train.micro_batch": 1 if "schedule.batch" in changes else None,
    }
    model, sink = Seen(), Memory()
    events: list[str] = []
    sink.event = lambda event: events.append(event.text) if event.name == "recipe changed" else None  # type: ignore
    result = thalweg.train(
        model,
        squares,
        {"images": images},
        {**recipe, **changes},
        folder=folder,
        resume=resume,
        accept=accept,
        sinks=[sink],
    )
    return result, model, events


def test_layers_that_train_are_not_frozen_again(tmp_path: Path) -> None:
    share, longer = {"optimizer.unfreeze": "50%"}, {"train.steps": 20}
    go(tmp_path / "run", **share)
    result, model, told = go(tmp_path / "run", resume=6, accept=("steps",), **share, **longer)
    assert [row.thaws for row in result.plan.parameters] == [4, 4, 0, 0]
    assert [trains for *_, trains in model.windows[-14:]] == [True] * 14
    assert told == [
        "train.steps: 8 before, 20 from here on (accepted)",
        "optimizer.unfreeze: '50%' before, '4' from here on, as it was planned for 8 steps (accepted)",
    ]
    result, _, told = go(tmp_path / "run", resume=6, **share, **longer)  # it is the folder's by now
    assert [row.thaws for row in result.plan.parameters] == [4, 4, 0, 0]
    other = {"optimizer.unfreeze": "80%", "train.steps": 30}
    result, _, told = go(tmp_path / "run", resume=6, accept=("steps", "unfreeze"), **other)
    assert max(row.thaws for row in result.plan.parameters) == 24 and "'80%' from here on (accepted)" in told[-1]


@pytest.mark.parametrize("longer", [20, 7])
def test_samples_come_once_an_epoch_whatever_length_is_accepted(tmp_path: Path, longer: int) -> None:
    growing = {"schedule.batch": "constant(60%, value=0.5) >> constant(value=1)"}
    _, model, _ = go(tmp_path / "run", **growing)
    passes = 5 * 2 + 1 * 4  # of the first six steps, a sample each
    before = [samples[0] for samples, *_ in model.windows][-(passes + 8) :][:passes]
    result, model, told = go(tmp_path / "run", resume=6, accept=("steps",), **growing, **{"train.steps": longer})
    taken = [round(record.weight) for record in result.records]
    assert taken[:6] == [4] * min(6, longer - 6)  # then comes the epoch's short window
    after = [samples[0] for samples, *_ in model.windows][-sum(taken) :]
    epoch = (before + after)[:SAMPLES]
    assert len(set(epoch)) == len(epoch)
    assert told[-1].startswith("schedule.batch: ") and told[-1].endswith("as it was planned for 8 steps (accepted)")


def test_images_that_have_grown_stay_so_and_a_schedule_in_steps_is_not_told(tmp_path: Path) -> None:
    growing = {"schedule.image_size": "constant(50%, value=0.5) >> constant(value=1)"}
    go(tmp_path / "a", **growing)
    _, model, told = go(tmp_path / "a", resume=6, accept=("steps",), **growing, **{"train.steps": 20})
    assert {size for _, size, _ in model.windows[-14:]} == {8} and len(told) == 2
    counted = {"schedule.image_size": "constant(4, value=0.5) >> constant(value=1)", "optimizer.unfreeze": "4"}
    go(tmp_path / "b", **counted)
    assert len(go(tmp_path / "b", resume=6, accept=("steps",), **counted, **{"train.steps": 20})[2]) == 1


def test_batches_that_change_do_not_go_with_other_epochs(tmp_path: Path) -> None:
    growing = {"schedule.batch": "constant(50%, value=0.5) >> constant(value=1)", "train.steps": None}
    go(tmp_path / "run", **growing, **{"train.epochs": 1})
    with pytest.raises(RunFolderError) as caught:
        go(tmp_path / "run", resume=True, accept=("epochs",), **growing, **{"train.epochs": 2})
    _, numbers, remedy = three_parts(caught.value)
    assert "train.epochs=2" in numbers and "train.steps" in remedy
    images = {"schedule.image_size": "constant(50%, value=0.5) >> constant(value=1)", "train.steps": None}
    go(tmp_path / "images", **images, **{"train.epochs": 1})
    _, model, _ = go(tmp_path / "images", resume=8, accept=("epochs",), **images, **{"train.epochs": 3})
    assert {size for _, size, _ in model.windows[-22:]} == {8}
