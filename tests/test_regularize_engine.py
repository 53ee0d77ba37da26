"""What a recipe asks of regularization reaches the model, the data and the loss, and is told; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg
from tests.conftest import run_cli, three_parts
from thalweg.core import Loss, Recipe, Split, Task, ThalwegError
from thalweg.regularize import Dropout, GhostBatchNorm, StochasticDepth
from thalweg.run import train_task


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.one(x)
        x = x + self.two(x.relu())
        return self.head(self.drop(x.mean((2, 3))))


def images(num: int = 48) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"images": torch.rand(num, 1, 6, 6, generator=draw), "labels": torch.randint(0, 3, (num,), generator=draw)}


def smooth(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float | Tensor = 0.1) -> Loss:
    smoothing = label_smoothing if model.training else 0.0
    return thalweg.regularize.cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=smoothing)


def train(changes: dict[str, Any], loss: Any = smooth, data: Any = None, **words: Any) -> thalweg.Result:
    task = Task(model=Residual, loss=loss, data=data or Split(train=images(), test=images(12)), **words)
    base = {"train.steps": 4, "train.batch": 12, "precision": "fp32"}
    return train_task(task, Recipe().override({**base, **changes}))


def test_what_is_put_into_the_model_is_listed() -> None:
    result = train({"regularize.stochastic_depth": 0.4, "regularize.dropout": 0.1, "regularize.ghost": 4})
    kinds = [type(module) for module in result.model.modules()]
    assert (
        kinds.count(StochasticDepth) == 2
        and kinds.count(Dropout) == 2
        and isinstance(result.model.norm, GhostBatchNorm)
    )
    assert [d.p for d in result.model.modules() if isinstance(d, StochasticDepth)] == [
        pytest.approx(0.2),
        pytest.approx(0.4),
    ]
    told = "\n".join(result.plan.changes)
    assert told.count("StochasticDepth") == 2 and told.count("Dropout(p=0.1)") == 2 and "norm: BatchNorm2d" in told


def test_scheduled_rates_reach_every_layer() -> None:
    """At a factor of 0 nothing is dropped, and the run is that of a model without dropout."""
    off = {"schedule.dropout": "constant(value=0)", "regularize.by_sample": True}
    result = train(off)
    assert any("Dropout" in change for change in result.plan.changes)

    class Without(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Identity()

    task = Task(model=Without, loss=smooth, data=Split(train=images()))
    plain = train_task(task, Recipe().override({"train.steps": 4, "train.batch": 12, "precision": "fp32"}))
    assert [r.loss for r in result.records] == pytest.approx([r.loss for r in plain.records], rel=1e-6)
    assert [r.values["dropout"] for r in result.records] == [0.0] * 4


def test_after_the_run_the_layers_are_the_users_own() -> None:
    """Their masks are no longer those of the last step, and their rates the full ones."""
    result = train({"schedule.dropout": "constant(value=0)", "regularize.by_sample": True, "regularize.dropout": 0.5})
    model = result.model.train()
    x = images()["images"]
    assert not torch.equal(model(x), model(x))


def test_frozen_statistics_stay() -> None:
    result = train({"regularize.batchnorm": "frozen"})
    assert torch.equal(result.model.norm.running_mean, torch.zeros(4)) and result.plan.changes


def test_augmentation_follows_the_tasks_own() -> None:
    seen: list[float] = []

    def task_augment(batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        return {**batch, "images": torch.zeros_like(batch["images"])}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        seen.append(float(batch["images"].mean()) if model.training else 0.0)
        return smooth(model, batch)

    train({"regularize.augment": ["invert(1)"]}, loss, Split(train=images(), augment=task_augment))
    assert set(seen) == {1.0}  # zeros first, then inverted


@pytest.mark.parametrize("micro", [12, 4, 1])
def test_mixing_reaches_the_loss_as_soft_targets_whatever_the_split(micro: int) -> None:
    shapes: set[tuple[int, ...]] = set()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        if model.training:
            shapes.add(tuple(batch["labels"].shape[1:]))
            assert batch["labels"].is_floating_point()
        return smooth(model, batch)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Linear(36, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x.double().flatten(1))

    def run(size: int) -> list[float]:
        task = Task(model=Plain, loss=loss, data=Split(train=images()))
        recipe = {"train.steps": 4, "train.batch": 12, "train.micro_batch": size, "precision": "fp32"}
        mixed = {"regularize.mixup": 0.4, "regularize.cutmix": 1.0}
        return [r.loss for r in train_task(task, Recipe().override({**recipe, **mixed})).records]

    assert run(micro) == pytest.approx(run(12), rel=1e-12) and shapes == {(3,)}


def hard(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.nll_loss(model(batch["images"]).log_softmax(-1), batch["labels"])


def twice(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    soft = thalweg.regularize.soft_targets(batch["labels"], 3, 0.1)
    return thalweg.regularize.cross_entropy(model(batch["images"]), soft, label_smoothing=0.1)


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "mixing for a loss of integers": ({"regularize.mixup": 0.2}, hard, "soft targets"),
    "smoothing soft labels twice": ({}, twice, "smooth"),
    "a micro-batch of one": ({"train.micro_batch": 1}, smooth, "batch normalization"),
    "an unknown transform": ({"regularize.augment": ["flop"]}, smooth, "flop"),
    "an unknown penalty": ({"regularize.penalties": {"l2": 1e-4}}, smooth, "l2"),
    "a negative penalty": ({"regularize.penalties": {"l1": -1.0}}, smooth, "l1"),
    "a rate of 1": ({"regularize.dropout": 1.0}, smooth, "rate"),
    "a place that is none": ({"regularize.dropout": 0.1, "regularize.dropout_at": ["body.*"]}, smooth, "body"),
    "ghost batches of one": ({"regularize.ghost": 1}, smooth, "ghost"),
    "a negative alpha": ({"regularize.mixup": -0.1}, smooth, "mixup"),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_input_is_refused_before_any_work(why: str) -> None:
    changes, loss, told = BAD[why]
    with pytest.raises(ThalwegError) as err:
        train(changes, loss)
    assert told in " ".join(three_parts(err.value))


def test_mixing_of_data_without_labels_in_memory_says_what_to_give() -> None:
    listed = [{"images": a, "labels": b} for a, b in zip(images()["images"], images()["labels"])]
    with pytest.raises(ThalwegError) as err:
        train({"regularize.mixup": 0.2}, data=Split(train=listed))
    assert "classes" in three_parts(err.value)[2]
    assert train({"regularize.mixup": 0.2}, data=Split(train=listed), classes=3).records


def test_a_model_without_branches_is_told_what_to_do(tmp_path: Path) -> None:
    told = run_cli("train", "digits", "--set", "regularize.dropout=0.1", "--set", "precision=fp32", cwd=tmp_path)
    assert told.returncode == 2 and "regularize.dropout_at" in told.stderr and "Traceback" not in told.stderr


def test_lists_on_the_command_line_are_words_or_toml() -> None:
    for text in ('["crop(1)", "randaugment(2, 9)"]', "crop(1),randaugment(2, 9)", "crop(1), randaugment(2, 9)"):
        assert Recipe().override({"regularize.augment": text}).regularize.augment == ("crop(1)", "randaugment(2, 9)")


def test_a_step_of_ones_own_loop_has_the_same_layers() -> None:
    step = thalweg.TrainStep(
        Residual(), smooth, {"regularize.stochastic_depth": 0.5, "regularize.ghost": 4, "precision": "fp32"}, steps=3
    )
    batch = {name: tensor[:12] for name, tensor in images().items()}
    first = float(step(batch).loss)
    again = thalweg.TrainStep(
        Residual(), smooth, {"regularize.stochastic_depth": 0.5, "regularize.ghost": 4, "precision": "fp32"}, steps=3
    )
    again.model.load_state_dict(Residual().state_dict())
    assert first > 0 and any(isinstance(m, StochasticDepth) for m in step.model.modules())
    assert len(step.plan.changes) == 3


def test_precise_statistics_are_those_of_the_averaged_weights() -> None:
    """Trap: torch's AveragedModel evaluates averaged weights with the statistics of others."""
    recipe = {"regularize.average": 0.9, "regularize.precise": 4, "train.steps": 12, "optimizer.lr": 0.05}
    result = train(recipe)
    model = result.model
    held = model.norm.running_mean.clone(), model.norm.running_var.clone()
    from thalweg.data import Order

    order, whole = Order(48, 12, seed=0, keep_last=True), images()
    values = torch.cat([model.stem(whole["images"][torch.from_numpy(order.window(s)[1])]) for s in range(4)])
    assert torch.allclose(held[0], values.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(held[1], values.var((0, 2, 3)), atol=1e-6)
    averaged = train({**recipe, "regularize.precise": 0})
    assert not torch.allclose(averaged.model.norm.running_var, held[1], rtol=1e-3)
    model.eval()
    with torch.no_grad():
        wanted = smooth(model, images(12))
    assert result.metrics["loss"] == pytest.approx(float(wanted.total / wanted.weight), rel=1e-6)
