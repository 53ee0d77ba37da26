"""Clipping by history: against a transcription, in the step, and over a resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import thalweg
from tests.models import assert_same_bits, make_step, mean_loss, mlp, points, run_steps, state_bits
from thalweg.optim.history import NormHistory


def transcription(norms: list[float], most: float) -> list[float]:
    """ZClip in plain numbers: 25 norms for the first mean and variance, then running ones of decay 0.97."""
    seen, left = [], []
    mean = var = 0.0
    for norm in norms:
        if len(seen) < 25:
            seen.append(norm)
            left.append(norm)
            mean = sum(seen) / len(seen)
            var = sum((x - mean) ** 2 for x in seen) / len(seen)
            continue
        z = (norm - mean) / math.sqrt(var)
        kept = mean + most**2 / z * math.sqrt(var) if z > most else norm
        left.append(kept)
        mean = 0.97 * mean + 0.03 * kept
        var = 0.97 * var + 0.03 * (kept - mean) ** 2
    return left


def test_agrees_with_its_transcription() -> None:
    draw = torch.Generator().manual_seed(0)
    norms = (1 + 0.1 * torch.randn(80, generator=draw, dtype=torch.float64)).tolist()
    norms[40], norms[60] = 50.0, 3.0
    history = NormHistory(2.5, torch.device("cpu"))
    got = [float(history.limited(torch.tensor(n, dtype=torch.float64), torch.tensor(True))) for n in norms]
    wanted = transcription(norms, 2.5)
    assert wanted[40] < 2 and wanted[60] < 2
    assert got == pytest.approx(wanted, rel=1e-12)


def test_a_skipped_step_is_no_history() -> None:
    history = NormHistory(2.5, torch.device("cpu"))
    history.limited(torch.tensor(torch.inf), torch.tensor(False))
    assert history.values.tolist() == [0, 0, 0]


def test_equal_norms_pass_and_nothing_is_nan() -> None:
    history = NormHistory(2.5, torch.device("cpu"))
    left = [float(history.limited(torch.tensor(2.0), torch.tensor(True))) for _ in range(40)]
    assert left == [2.0] * 40 and torch.isfinite(history.values).all()


def test_an_outlier_moves_the_weights_no_further_than_the_rest_and_resume_goes_on() -> None:
    changes = {"train.batch": 16, "train.clip": 0.0, "train.clip_history": 2.5, "optimizer.rule": "sgd"}
    changes |= {"train.steps": 60, "optimizer.lr": 0.01}
    torch.manual_seed(0)
    step, feed = make_step(mlp(), mean_loss, points(), **changes)
    run_steps(step, feed, 40)
    snapshot = step.state.snapshot({})
    kept = {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in snapshot.groups.items()}
    arena = step.state.arenas[0]
    usual = arena.params.clone()
    run_steps(step, feed, 1)
    usual = (arena.params - usual).norm()
    window = next(iter(feed.windows(41, 42)))
    window[0]["x"] *= 1e4
    before = arena.params.clone()
    row = step.run(window)
    assert row[2] > 1000 and (arena.params - before).norm() < 5 * usual
    other, other_feed = make_step(mlp(), mean_loss, points(), **changes)
    other.state.load(type(snapshot)(kept, snapshot.facts))
    run_steps(other, other_feed, 3)
    again, again_feed = make_step(mlp(), mean_loss, points(), **changes)
    again.state.load(type(snapshot)(kept, snapshot.facts))
    run_steps(again, again_feed, 3)
    assert_same_bits(state_bits(other), state_bits(again))
    assert other.state.history.values[0] == 43


def test_a_face_clips_by_history_and_goes_on_after_its_state() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = thalweg.optim.SGD([p], lr=1.0, clip_history=2.5)
    draw = torch.Generator().manual_seed(0)

    def step(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, size: float) -> float:
        before = p.detach().clone()
        p.grad = torch.full((4,), size / 2)
        optimizer.step()
        return float((p.detach() - before).norm())

    for _ in range(30):
        step(optimizer, p, 1 + 0.1 * float(torch.randn((), generator=draw)))
    q = torch.nn.Parameter(p.detach().clone())
    twin = thalweg.optim.SGD([q], lr=1.0, clip_history=2.5)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(optimizer, p, 100.0) < 2
    assert step(twin, q, 100.0) < 2
    assert torch.equal(p, q)
