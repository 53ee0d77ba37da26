"""Sharpness-aware steps: against the formulas, over splits, loss scales and batch normalization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thalweg
from tests.models import assert_same_bits, batchnorm_net, make_step, mean_loss, mlp, points, run_steps, state_bits
from thalweg.core import RecipeError

F64 = torch.float64
SAM = {"regularize.sharpness": 0.3, "optimizer.rule": "sgd", "optimizer.lr": 0.1, "schedule.lr": "constant()"}


def by_hand(
    model: nn.Module, data: dict[str, torch.Tensor], *, rho: float, scaled: bool, lr: float, steps: int
) -> None:
    params = list(model.parameters())
    for _ in range(steps):
        gs = torch.autograd.grad(mean_loss(model, data), params)
        with torch.no_grad():
            scales = [p.abs() + 0.01 if scaled else torch.ones_like(p) for p in params]
            norm = torch.sqrt(sum((s * g).square().sum() for s, g in zip(scales, gs)))
            kept = [p.clone() for p in params]
            for p, s, g in zip(params, scales, gs):
                p += rho * s * s * g / norm
        gs = torch.autograd.grad(mean_loss(model, data), params)
        with torch.no_grad():
            for p, before, g in zip(params, kept, gs):
                p.copy_(before - lr * g)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("micro_batch", [64, 16])
def test_step_is_the_formula_whatever_the_split(scaled: bool, micro_batch: int) -> None:
    torch.manual_seed(0)
    model, twin = mlp().to(F64), mlp().to(F64)
    twin.load_state_dict(model.state_dict())
    data = points(64, F64)
    changes = {**SAM, "regularize.sharpness_scaled": scaled, "train.batch": 64, "train.micro_batch": micro_batch}
    step, feed = make_step(model, mean_loss, data, **changes)
    run_steps(step, feed, 5)
    by_hand(twin, data, rho=0.3, scaled=scaled, lr=0.1, steps=5)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("micro_batch", [64, 16])
def test_running_statistics_count_the_window_once(micro_batch: int) -> None:
    """They are those of the first pass, at the weights themselves: the same as without looking around."""
    found = []
    for rho in (0.0, 0.3):
        torch.manual_seed(0)
        changes = {**SAM, "regularize.sharpness": rho, "train.batch": 64, "train.micro_batch": micro_batch}
        step, feed = make_step(batchnorm_net().to(F64), mean_loss, points(64, F64), **changes)
        run_steps(step, feed, 1)
        layer = step.state.model[1]
        found.append([layer.running_mean.clone(), layer.running_var.clone(), layer.num_batches_tracked.clone()])
    for plain, sharp in zip(*found):
        torch.testing.assert_close(plain, sharp, rtol=1e-12, atol=1e-14)


def test_both_passes_see_the_same_dropout() -> None:
    """With rho tending to 0 the second gradient is the first, masks and all."""
    ends = []
    for rho in (0.0, 1e-9):
        torch.manual_seed(0)
        changes = {**SAM, "regularize.sharpness": rho, "train.batch": 64}
        step, feed = make_step(mlp(dropout=0.5).to(F64), mean_loss, points(64, F64), **changes)
        run_steps(step, feed, 3)
        ends.append(torch.cat([p.detach().flatten() for p in step.state.model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_a_skipped_step_leaves_everything() -> None:
    step, feed = make_step(batchnorm_net(), mean_loss, points(), **{**SAM, "train.batch": 32})
    run_steps(step, feed, 2)
    before = state_bits(step)
    bad = next(iter(feed.windows(2, 3)))
    bad[0]["x"][0] = torch.inf
    assert step.run(bad)[3] == 1
    assert_same_bits(before, state_bits(step))


def test_options_are_checked() -> None:
    for changes in ({"regularize.sharpness": -1.0}, {"regularize.sharpness_scaled": True}):
        with pytest.raises(RecipeError):
            thalweg.Recipe().override(changes)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_face_goes_up_and_comes_back_to_the_bit(scaled: bool) -> None:
    torch.manual_seed(0)
    model, twin = mlp().to(F64), mlp().to(F64)
    twin.load_state_dict(model.state_dict())
    optimizer = thalweg.optim.SGD(model.parameters(), lr=0.1)
    data = points(64, F64)
    for _ in range(3):
        mean_loss(model, data).backward()
        before = [p.detach().clone() for p in model.parameters()]
        with optimizer.sharpened(0.3, scaled=scaled):
            optimizer.zero_grad()
            mean_loss(model, data).backward()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
        optimizer.step()
        optimizer.zero_grad()
    by_hand(twin, data, rho=0.3, scaled=scaled, lr=0.1, steps=3)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
