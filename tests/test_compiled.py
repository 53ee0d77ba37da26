"""A step compiled as one graph is the step: the same gradients, update, statistics, rows and state, whatever the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thalweg
from tests.models import batchnorm_net, mean_loss, points
from thalweg.engine.compiled_backend import BACKEND


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run operator by operator: what is tested is what is in them, and inductor takes ten seconds for each."""
    monkeypatch.setenv(BACKEND, "aot_eager")


BASE: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "train.steps": 6,
    "train.batch": 24,
    "optimizer.weight_decay": 0.1,
    "schedule.lr": "warmup(2) >> cosine()",
    "evaluate.every": 0,
    "checkpoint.every": 0,
}


def trained(compiled: str, **changes: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """(weights and buffers, records) of a short run in float64."""
    torch.manual_seed(0)
    model = batchnorm_net(0.3).double()
    data = {name: x.double() if x.is_floating_point() else x for name, x in points().items()}
    result = thalweg.train(model, mean_loss, data, {**BASE, **changes, "compile": compiled})
    return model.state_dict(), result.records


@pytest.mark.parametrize(
    "changes",
    [
        {"regularize.average": 0.9},
        {"train.micro_batch": 8, "train.batch": 56, "guard.spike": "skip", "guard.window": 16},
    ],
    ids=["one micro-batch", "several, uneven, guarded"],
)
def test_the_graph_is_the_step(changes: dict[str, Any]) -> None:
    plain, rows = trained("off", **changes)
    graph, theirs = trained("step", **changes)
    for name in plain:
        torch.testing.assert_close(graph[name], plain[name], rtol=1e-12, atol=1e-12)
    for a, b in zip(rows, theirs):
        assert (a.loss, a.grad_norm, a.lr, a.weight, a.applied) == pytest.approx(
            (b.loss, b.grad_norm, b.lr, b.weight, b.applied), rel=1e-12
        )
