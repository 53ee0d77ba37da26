"""Samples that spoil a step: the policy is followed, weights stay finite, and the run ends about where a clean one does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import thalweg
from tests.faults.core import Given, Row, fault
from thalweg.checkpoint import Store
from thalweg.core import Loss, Split, StopReason
from thalweg.data import Order
from thalweg.watch import Memory

NUM, BATCH, STEPS = 512, 16, 96
RECIPE = {
    "precision": "fp32",
    "train.steps": STEPS,
    "train.batch": BATCH,
    "train.micro_batch": 8,
    "optimizer.lr": 0.01,
    "checkpoint.every": 8,
    "checkpoint.keep_last": 6,
    "evaluate.every": 0,
    "regularize.average": 0.9,
}
POISONS = ("a NaN in a sample", "an Inf in a sample", "a label far out", "a spike of the gradient")


def samples(num: int, seed: int = 0) -> dict[str, Tensor]:
    """y is nearly linear in x; ``times`` says how much larger than its loss a sample's gradient is."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 8, generator=draw)
    y = x @ torch.linspace(-1, 1, 8) + 0.3 * torch.randn(num, generator=draw)
    return {"x": x, "y": y, "times": torch.ones(num)}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 1))


def loss(model: nn.Module, batch: Any) -> Loss:
    total = (model(batch["x"]).squeeze(1) - batch["y"]).square()
    return Loss((total * batch["times"] - (total * (batch["times"] - 1)).detach()).sum(), len(total))


def go(data: dict[str, Tensor], folder: Path | None = None, **changes: Any) -> tuple[Any, Memory]:
    sink = Memory()
    torch.manual_seed(0)
    split = Split(train=data, test=samples(128, seed=1))
    return thalweg.train(net, loss, split, {**RECIPE, **changes}, folder=folder, sinks=[sink]), sink


@cache
def spread() -> float:
    """The worst held-out loss of clean runs with five seeds."""
    return max(go(samples(NUM), seed=seed)[0].metrics["loss"] for seed in range(5))


def bad_steps(sample: int) -> list[int]:
    """Steps, from 1, whose window holds a sample."""
    order = Order(NUM, BATCH, seed=0, keep_last=False)
    return [step + 1 for step in range(STEPS) if sample in order.window(step)[1]]


def poisoned(kind: str, given: Given) -> tuple[dict[str, Tensor], int]:
    """(data with one bad sample, which)."""
    data = samples(NUM)
    at = given.draw.randrange(NUM)
    while bad_steps(at)[0] <= 18:  # limits of spikes are first taken after 16 steps
        at = given.draw.randrange(NUM)
    if kind.startswith(("a NaN", "an Inf")):
        data["x"][at, given.draw.randrange(8)] = float("nan" if "NaN" in kind else given.draw.choice(("inf", "-inf")))
    elif kind.startswith("a label"):
        data["y"][at] = 3e3
    else:
        data["times"][at] = 1e6
    return data, at


def finite(tensors: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def follow(row: Row, given: Given, kind: str, policy: str, changes: dict[str, Any]) -> None:
    """One run with a bad sample under one policy."""
    data, at = poisoned(kind, given)
    folder = given.folder / f"run-{row.n}"
    with row.trial(f"{kind}, sample {at}, {policy}"):
        result, sink = go(data, folder, **changes)
        skipped, bad = [r.step for r in result.records if r.skipped], bad_steps(at)
        store = Store(folder / "checkpoints")
        for step in store.steps():
            held = store.load(step)
            assert all(finite(held.groups[stem].values()) for stem in ("weights", "average")), (
                f"step {step} is not finite"
            )
        assert finite(result.model.state_dict().values())
        assert 0.0 not in [r.loss for r in result.records], "a loss was shown as 0.0"
        if policy == "stop":
            assert result.reason is StopReason.DIVERGED and result.exit_code == 3, result.reason
            assert skipped == bad[:1], f"{skipped} were skipped, not {bad[:1]}"
            return
        assert result.reason is StopReason.FINISHED and skipped == bad, f"{skipped} were skipped, not {bad}"
        told = [e for e in sink.events if e.name in ("bad step", "rewound")]
        assert [e.step for e in told] == bad and all(at in e.detail["samples"] for e in told), told
        assert result.metrics["loss"] <= 1.1 * spread(), f"{result.metrics} is beyond {spread()}"
    row.count(kind)


@fault("a NaN or Inf sample, as a run is by default", times=20, quick=4)
def by_default(row: Row, given: Given) -> None:
    while row.n < given.times:
        follow(row, given, POISONS[row.n % 2], "skip", {})


@fault("NaN, Inf, a poisoned label, a spike: skip, rewind, stop", times=48, quick=12)
def policies(row: Row, given: Given) -> None:
    while row.n < given.times:
        kind, policy = POISONS[row.n % 4], ("skip", "rewind", "stop")[row.n // 4 % 3]
        which = "guard.nonfinite" if kind.startswith(("a NaN", "an Inf")) else "guard.spike"
        changes: dict[str, Any] = {which: policy}
        if which == "guard.spike":
            changes |= {"guard.window": 16, "guard.deviations": 8.0}
        if policy == "rewind":
            changes |= {"guard.every": 4, "guard.rewinds": 20}
        follow(row, given, kind, policy, changes)
