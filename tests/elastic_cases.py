"""What ranks do for tests/test_elastic.py, in the processes of tests/ranks_cases.py."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import thalweg
import thalweg.run.whole
from tests.faults import ranked
from tests.models import batchnorm_net, mean_loss, mlp, points
from thalweg.core import Event, Split, Task, ThalwegError
from thalweg.device import Device
from thalweg.parallel import Joined
from thalweg.watch import Memory

RECIPE = {
    "precision": "fp32",
    "train.steps": 4,
    "train.batch": 16,
    "train.micro_batch": 4,
    "optimizer.lr": 0.01,
    "checkpoint.every": 2,
    "evaluate.every": 0,
    "evaluate.batch": 3,
}
SHORT = {"train.steps": 24, "evaluate.every": 12}  # the task of tests/faults/ranked.py, for a test


def exact(num: int = 48, seed: int = 0) -> dict[str, Tensor]:
    return {**points(num, torch.float64, seed), "id": torch.arange(num)}


def net() -> nn.Module:
    return mlp().double()


def task(**changes: Any) -> Task:
    given = {"model": net, "loss": mean_loss, "data": Split(train=exact(), test=exact(20, seed=1))}
    return Task(**{**given, **changes})


class Told(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def event(self, event: Event) -> None:
        self.told.append(event.text)


def train(what: Task, folder: Path | None = None, **changes: Any) -> tuple[Any, list[str]]:
    sink = Told()
    recipe = thalweg.Recipe().override({**RECIPE, **changes})
    return thalweg.run.whole.train_task(what, recipe, folder=folder, sinks=[sink]), sink.told


class Otherwise(nn.Module):
    """Does on one rank what it does not on the others.

    Args:
        factor: on its output; the same operation, another number.
        more: an operation more.
    """

    def __init__(self, factor: float = 1.0, more: bool = False) -> None:
        super().__init__()
        self.net, self.factor, self.more = net(), factor, more

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x) * self.factor
        return out.tanh() if self.more else out


def from_file(folder: Path, rank: int) -> Any:
    """A loss whose source file says something else on rank 1."""
    path = folder / f"on {rank}" / "my_loss.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"from tests.models import mean_loss\n\ndef loss(model, batch):\n    return mean_loss(model, batch)  # {rank}\n"
    )
    spec = importlib.util.spec_from_file_location("my_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", my_loss=module):
        spec.loader.exec_module(module)
        return train(task(loss=module.loss))


def no_device(device: Device) -> Device:
    with mock.patch.object(torch.accelerator, "device_count", lambda: 1):
        return Device(torch.device("cuda", 0)).of_rank(1)


def refusals(ranks: Joined, folder: Path) -> dict[str, str]:
    second = ranks.rank == 1

    def of_torch() -> Any:
        with mock.patch.object(torch, "__version__", "2.11.0" if second else torch.__version__):
            return train(task())

    def of_device() -> Any:
        with mock.patch.object(ranks, "own", no_device if second else ranks.own):
            return train(task())

    def drifting(model: nn.Module, batch: Any) -> Any:
        if second and model.training and torch.is_grad_enabled() and int(batch["id"][0]) in drift:
            drift.clear()
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-12
        return mean_loss(model, batch)

    drift = set(range(48))
    tries: dict[str, Callable[[], Any]] = {
        "torch": of_torch,
        "sources": lambda: from_file(folder, ranks.rank),
        "device": of_device,
        "way": lambda: train(task(model=lambda: Otherwise(more=second))),
        "loss": lambda: train(task(model=lambda: Otherwise(2.0 if second else 1.0))),
        "states": lambda: train(task(loss=_after(2, drifting))),
        "step": lambda: thalweg.TrainStep(net(), mean_loss, {"precision": "fp32"}),
        "step auto": lambda: thalweg.TrainStep(net(), mean_loss, {"train.micro_batch": "auto"}, steps=4, ranks=ranks),
        "metric": lambda: train(task(metrics=lambda model, batch: {"both": _both}), **{"evaluate.every": 2}),
        "metric of three": lambda: train(task(metrics=_of_three), **{"evaluate.every": 2}),
    }
    found = {}
    for name, act in tries.items():
        try:
            act()
        except ThalwegError as err:
            assert all((err.asked, err.numbers, err.remedy))
            found[name] = f"{type(err).__name__}: {err}"
        else:
            found[name] = "nothing"
    return found


_both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.MaxMetric()])


def _of_three(model: nn.Module, batch: Any) -> dict[str, Any]:
    metric = torchmetrics.Recall(task="multiclass", num_classes=3, average="none")
    metric.update(model(batch["x"]), batch["y"])
    return {"recall": metric}


def _after(steps: int, loss: Any) -> Any:
    """``loss`` from the third step on; before, what is tried before step 1 must not see it."""

    def chosen(model: nn.Module, batch: Any) -> Any:
        return loss(model, batch) if ranked._now and ranked._now[0] >= steps else mean_loss(model, batch)

    return chosen


def drawing(model: nn.Module, batch: Any) -> Tensor:
    return mean_loss(model, batch) * (1 + random.random())


def measured(folder: Path | None = None) -> dict[str, Any]:
    """A run with metrics of torchmetrics, one that knows its samples, and a sample at its end."""
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")
    seen, most = torchmetrics.CatMetric(), torchmetrics.MaxMetric()
    ids: list[list[float]] = []

    class Seen(torchmetrics.CatMetric):
        def compute(self) -> Tensor:
            ids.append(sorted(torch.as_tensor(super().compute()).flatten().tolist()))
            return torch.tensor(float(len(ids[-1])))

    seen = Seen()

    def metrics(model: nn.Module, batch: Any) -> dict[str, Any]:
        logits = model(batch["x"])
        f1.update(logits, batch["y"])
        seen.update(batch["id"].double())
        most.update(logits.max())
        return {"f1": f1, "seen": seen, "most": most, "spread": (logits.std() * len(logits), len(logits))}

    result, _ = train(
        task(metrics=metrics, sample=lambda model: f"{sum(p.numel() for p in model.parameters())} weights"),
        folder,
        **{"evaluate.every": 2, "evaluate.best": "f1", "evaluate.goal": "max"},
    )
    return {
        "metrics": [e.metrics for e in result.evaluations],
        "ids": ids,
        "sample": result.sample,
    }


def own_loop(ranks: Any = None) -> dict[str, Any]:
    """A loop of one's own; the last batch leaves a rank without a micro-batch."""
    torch.manual_seed(0)
    step = thalweg.TrainStep(
        batchnorm_net(dropout=0.2).double(),
        mean_loss,
        {
            "precision": "fp32",
            "train.micro_batch": 4,
            "optimizer.lr": 0.01,
            "train.clip": 0.5,
            "regularize.average": 0.9,
        },
        steps=6,
        ranks=ranks,
    )
    data = exact()
    losses = [
        float(step({name: part[first : first + num] for name, part in data.items()}).loss)
        for first, num in ((0, 16), (16, 16), (32, 16), (0, 16), (16, 16), (40, 4))
    ]
    snapshot = step.snapshot()
    weights = {name: tensor.clone() for name, tensor in step.finish().state_dict().items()}
    return {
        "losses": losses,
        "weights": weights,
        "tensors": {name: sorted(group) for name, group in snapshot.groups.items()},
    }


def waits_inside(ranks: Joined) -> str:
    """The forward pass of one rank waits for others, who never come: as a collective that only one of them reaches."""

    def waiting(model: nn.Module, batch: Any) -> Any:
        if ranks.rank == 0:
            time.sleep(6.0)  # longer than the others wait
            raise RuntimeError("Timed out waiting for a collective of the model")
        return mean_loss(model, batch)

    try:
        train(task(loss=waiting))
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    return "nothing"


def cases(rank: int, on: Callable[..., Any], folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    with mock.patch.object(ranked, "PAUSE", 0.0):
        recipe = thalweg.Recipe().override(dict(ranked.task.recipe)).override(SHORT)
        found["ranked"] = on(
            2, lambda _: thalweg.run.whole.train_task(ranked.task, recipe, folder=folder / "ranked").reason.value
        )
    with pytest.MonkeyPatch.context() as patch:
        ranked.counted(patch)
        found["elastic refused"] = on(2, lambda ranks: refusals(ranks, folder))
    found["drawing"] = on(2, lambda _: train(task(loss=drawing))[1])
    for world in (2, 3):
        found["measured", world] = on(world, lambda _, world=world: measured(folder / f"measured {world}"))
        found["own loop", world] = on(world, own_loop)
    return found
