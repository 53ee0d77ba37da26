"""Benchmarks share nets, losses and data: each of their workloads can take a step. Their figures are no business of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import compiled, guard, levers, loop


def workloads() -> dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]]:
    """Of what benchmark, under what name: (model, loss, data)."""
    found: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {}
    for name, work in loop.WORKLOADS.items():
        found[f"loop: {name}"] = lambda work=work: (work.model(), work.loss, work.data())
    for name, (make, make_data, loss, *_) in compiled.WORKLOADS.items():
        found[f"compiled: {name}"] = lambda make=make, loss=loss, data=make_data: (make(), loss, data())
    for name, (make, loss, make_data, _) in levers.MODELS.items():
        found[f"levers: {name}"] = lambda make=make, loss=loss, data=make_data: (make(), loss, data())
    task = guard.tiny()[0]
    return {**found, "guard: tiny": lambda: (task.model(), task.loss, task.data.train)}


@pytest.mark.parametrize("name", workloads())
def test_a_workload_has_gradients(name: str) -> None:
    torch.manual_seed(0)
    model, loss, data = workloads()[name]()
    value = loss(model, {key: part[:2] for key, part in data.items()})
    value.backward()
    assert torch.isfinite(value) and any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_loops_by_hand_move_their_models() -> None:
    work = loop.WORKLOADS["mlp"]
    for given in (work, compiled.Workload("tiny", work.model, work.data, work.loss, 64, 1)):
        model = given.model()
        before = model[0].weight.detach().clone()
        next(loop.by_hand(model, given.data(), given))
        assert not torch.equal(before, model[0].weight)
