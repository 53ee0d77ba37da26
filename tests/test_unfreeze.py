"""Layers that begin to train in turn: left alone until then, and exactly as if their training began there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.conftest import three_parts
from thalweg.core import Recipe, RecipeError
from thalweg.data import Order
from thalweg.run import train_task

STEPS, BATCH = 8, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def points() -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def recipe(**more: Any) -> dict[str, Any]:
    given = {"train.steps": STEPS, "train.batch": BATCH, "train.clip": 0.5, "precision": "fp32", "compile": "off"}
    given |= {"optimizer.lr": 0.05, "optimizer.weight_decay": 0.1, "schedule.lr": "hold()"}
    return {**given, "optimizer.unfreeze": "4", "optimizer.no_decay": [], "checkpoint.every": 1, **more}


def test_it_is_torchs_adamw_of_parameters_that_join_later() -> None:
    windows: list[Tensor] = []

    def seen(model: nn.Module, x: Tensor) -> Tensor:
        if model.training and torch.is_grad_enabled():
            windows.append(x.clone())
        return loss(model, x)

    result = thalweg.train(Net(), seen, points(), recipe())
    thaws = {row.name: row.thaws for row in result.plan.parameters}
    assert thaws == {
        "blocks.0.weight": 4, "blocks.0.bias": 4, "blocks.1.weight": 2, "blocks.1.bias": 2, "head.weight": 0, "head.bias": 0
    }  # fmt: skip
    theirs = Net()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.999))
    for step, x in enumerate(windows[-STEPS:]):
        optimizer.zero_grad(set_to_none=True)
        loss(theirs, x).backward()
        for name, p in theirs.named_parameters():
            if step < thaws[name]:
                p.grad = None
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
    for mine, other in zip(result.model.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


def test_what_waits_is_left_alone_and_costs_no_backward_pass() -> None:
    asked: list[list[bool]] = []

    def seen(model: nn.Module, x: Tensor) -> Tensor:
        asked.append([p.requires_grad for p in model.parameters()])
        return loss(model, x)

    net = Net()
    before = [p.clone() for p in net.parameters()]
    result = thalweg.train(net, seen, points(), recipe(**{"train.steps": 3, "regularize.average": 0.9}))
    assert asked[-3:] == [[False] * 4 + [True] * 2] * 2 + [[False] * 2 + [True] * 4]
    same = [torch.equal(old, new) for old, new in zip(before, result.model.parameters())]
    assert same == [True, True, False, False, False, False]
    assert all(p.requires_grad for p in result.model.parameters())


def test_a_run_goes_on_from_the_middle_of_the_thaw(tmp_path: Path) -> None:
    given = recipe(**{"checkpoint.keep_last": STEPS})
    whole = thalweg.train(Net(), loss, points(), given, folder=tmp_path / "run")
    wanted = [p.clone() for p in whole.model.parameters()]
    for step in (1, 3, 5):
        again = thalweg.train(Net(), loss, points(), given, folder=tmp_path / "run", resume=step)
        assert all(torch.equal(a, b) for a, b in zip(wanted, again.model.parameters())), step


def test_a_run_that_goes_on_for_longer_freezes_nothing_again(tmp_path: Path) -> None:
    task = thalweg.Task(model=Net, loss=loss, data=points())
    half = Recipe().override({**recipe(), "optimizer.unfreeze": "50%", "train.steps": 8})
    first = train_task(task, half, folder=tmp_path / "a")
    on = thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=40, then="hold()")
    assert [row.thaws for row in on.plan.parameters] == [row.thaws for row in first.plan.parameters]
    assert max(row.thaws for row in on.plan.parameters) == 4 and on.plan.recipe.optimizer.unfreeze == "4"


def test_a_skipped_step_moves_no_turn() -> None:
    """The count of updates says whose turn it is: after a step without one, each layer waits a step longer."""
    data, net = points(), Net()
    data[int(Order(len(data), BATCH, seed=0, keep_last=True).window(1)[1][0])] = float("nan")
    before = net.blocks[1].weight.detach().clone()
    result = thalweg.train(net, loss, data, recipe(**{"train.steps": 3}))
    assert [record.skipped for record in result.records] == [False, True, False]
    assert torch.equal(before, result.model.blocks[1].weight), "two updates, and it waits for two"


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"compile": "step"}, "compile='step'"),
        ({"optimizer.release_gradients": "one-pass", "train.clip": 0}, "optimizer.release_gradients='one-pass'"),
        ({"optimizer.rule": "prodigy", "optimizer.lr": 1.0}, "the rule prodigy"),
    ],
)
def test_what_it_does_not_go_with_is_named(more: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        thalweg.train(Net(), loss, points(), recipe(**more))
    asked, _, remedy = three_parts(caught.value)
    assert asked.startswith("optimizer.unfreeze='4' does not go with " + what)
    assert remedy == "Leave one of the two out."


@pytest.mark.parametrize("more", [{"optimizer.unfreeze": "4"}, {"evaluate.target": 0.0}])
def test_a_step_of_ones_own_loop_ignores_neither_turns_nor_targets(more: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        thalweg.TrainStep(Net(), loss, more, steps=8)
    asked, _, remedy = three_parts(caught.value)
    assert asked.startswith(next(iter(more))) and "out of TrainStep's reach" in asked and "thalweg.train" in remedy


def test_what_is_no_length_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        thalweg.train(Net(), loss, points(), recipe(**{"optimizer.unfreeze": "soon"}))
    assert three_parts(caught.value)[0] == "optimizer.unfreeze='soon' is no length."


def test_the_plan_says_when_each_layer_begins() -> None:
    result = thalweg.train(Net(), loss, points(), recipe(**{"train.steps": 1}))
    told = next(made for made in result.plan.decisions if made.path == "optimizer.unfreeze")
    assert "'head.bias' at once, 'blocks.1.bias' after 2 updates, 'blocks.0.bias' after 4 updates" in told.reason
