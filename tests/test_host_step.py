"""The step on the CPU reckons in the memory of its tensors, and has the bits of the step that leaves all to torch."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import (
    assert_same_bits,
    batchnorm_net,
    make_step,
    mean_loss,
    mlp,
    points,
    ragged_text,
    run_steps,
    small_gpt,
    state_bits,
    text_loss,
)
from thalweg.core import Loss
from thalweg.engine.backward import backward
from thalweg.engine.host_step import HostStep
from thalweg.engine.step import Step
from thalweg.optim.memory import memory

#: (model, loss, data, what the recipe says): each way that numbers can take between passes and update.
CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "a short last micro-batch, an average, a schedule": (
        lambda: mlp(0.1),
        mean_loss,
        points(70),
        {
            "train.batch": 16,
            "train.micro_batch": 4,
            "regularize.average": 0.9,
            "optimizer.weight_decay": 0.1,
            "schedule.lr": "warmup(3) >> cosine()",
            "schedule.clip": "linear(to=0.1)",
        },
    ),
    "statistics, a clip that cuts": (
        lambda: batchnorm_net(0.1),
        mean_loss,
        points(),
        {"train.batch": 16, "train.micro_batch": 8, "regularize.average": 0.9, "train.clip": 0.1},
    ),
    "weights of the user's, bf16, two rules": (
        lambda: small_gpt(0.1),
        text_loss,
        ragged_text(),
        {"train.batch": 16, "train.micro_batch": 4, "precision": "bf16", "optimizer.rule": "muon"},
    ),
    "gradients wider than parameters": (
        small_gpt,
        text_loss,
        ragged_text(),
        {"train.batch": 16, "optimizer.rule": "lion", "precision": "bf16-pure"},
    ),
    "shared numbers": (small_gpt, text_loss, ragged_text(), {"train.batch": 16, "optimizer.rule": "prodigy"}),
    "a schedule that listens": (
        mlp,
        mean_loss,
        points(),
        {"train.batch": 8, "schedule.lr": "loss_plateau(patience=1)"},
    ),
    "no clip, a window of weights": (
        mlp,
        mean_loss,
        points(),
        {"train.batch": 16, "train.clip": 0, "regularize.average_form": "window"},
    ),
}


def built(host: bool, case: tuple[Any, Any, Any, dict[str, Any]], patch: pytest.MonkeyPatch) -> tuple[Step, Any]:
    model, loss, data, changes = case
    with patch.context() as local:
        if not host:
            local.setattr(sys.modules["thalweg.engine.build"], "suits", lambda *_: False)
        torch.manual_seed(3)
        step, feed = make_step(model(), loss, data, **changes)
    assert type(step) is (HostStep if host else Step)
    return step, feed


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_the_plain_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bits = [], []
    for host in (False, True):
        step, feed = built(host, CASES[name], monkeypatch)
        rows.append(repr(run_steps(step, feed, 7)))
        bits.append(state_bits(step))
    assert rows[0] == rows[1]
    assert_same_bits(*bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_nothing(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bits = [], []
    for host in (False, True):
        step, feed = built(host, CASES["statistics, a clip that cuts"], monkeypatch)
        windows = list(feed.windows(0, 3))
        windows[1][1]["x"][2] = bad
        rows.append(repr([step.run(window).tolist() for window in windows]))
        bits.append(state_bits(step))
    assert rows[0] == rows[1]
    assert_same_bits(*bits)


class Two(nn.Module):
    """Large enough that its gradients are taken over; ``spare`` takes no part where ``once``."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.spare, self.head = nn.Linear(6, 40_000), nn.Linear(6, 3), nn.Linear(40_000, 3)
        self.once = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(self.wide(x).relu())
        return out if self.once else out + self.spare(x)


@pytest.mark.parametrize("micro_batch", [16, 4])
def test_large_gradients_are_taken_over(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, case = [], (Two, mean_loss, points(), {"train.batch": 16, "train.micro_batch": micro_batch})
    for host in (False, True):
        step, feed = built(host, case, monkeypatch)
        assert step.state.arenas[0].takes is host
        run_steps(step, feed, 2)
        step.state.model.once = True  # whose gradients are zero now, whatever lay there
        run_steps(step, feed, 2)
        assert all(
            p.grad.untyped_storage().data_ptr() == step.state.arenas[0].grads.data_ptr()
            for p in step.state.model.parameters()
        )  # type: ignore[union-attr]
        bits.append(state_bits(step))
    assert_same_bits(*bits)


class Halved(torch.autograd.Function):
    """Its backward pass writes over the gradient that it is given."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.mul_(0.5)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_a_backward_pass_that_writes_over_its_start_spoils_no_later_step(
    host: bool, summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        mean = mean_loss(model, batch)
        return Loss(Halved.apply(16 * mean), 16) if summed else Halved.apply(mean)

    still = {"train.batch": 16, "train.last": "drop", "optimizer.rule": "sgd", "optimizer.lr": 1e-9, "train.clip": 0}
    step, feed = built(host, (mlp, loss, points(16), still), monkeypatch)
    norms = [row[2] for row in run_steps(step, feed, 4)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40_000, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x.abs().mul(1000).long()).mean(1))


@pytest.mark.parametrize("micro_batch", [16, 4])
def test_sparse_gradients_are_taken_over_too(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, case = [], (Words, mean_loss, points(), {"train.batch": 16, "train.micro_batch": micro_batch})
    for host in (False, True):
        step, feed = built(host, case, monkeypatch)
        assert step.state.arenas[0].takes is host
        run_steps(step, feed, 2)
        bits.append(state_bits(step))
    assert_same_bits(*bits)


def test_backward_is_torchs() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    backward((x * x).sum(), torch.tensor(0.5))
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0]


def test_memory_is_the_tensors_own() -> None:
    numbers = torch.zeros(2, dtype=torch.float32)
    cells = memory(numbers)
    cells[1] = 0.1
    assert numbers[1] == torch.tensor(0.1, dtype=torch.float32) and cells[1] == numbers[1].item()
    cells[0] = 1e300
    assert numbers[0] == float("inf")
