"""Traps of the field, each with what torch or timm does and what is done here.

Those that have their test elsewhere:

- a cosine that climbs again after its end, a one-cycle that jumps back on one step too many, resume through ``last_epoch``,
  a group added late: ``tests/test_scheduler.py``
- patience off by one: ``tests/test_scheduled.py``
- a momentum of 0.344 where 0.1 was given, statistics that count a recomputed batch twice: ``tests/test_normalization.py``
- masks that differ between forward pass and recomputation: ``tests/test_dropout.py``
- all targets ignored, smoothing of targets that are smooth already: ``tests/test_labels.py``
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import thalweg
from tests.models import batchnorm_net, make_step, mean_loss, mlp, points, run_steps
from thalweg.core.recipe import Optimizer
from thalweg.engine.step import FIELDS
from thalweg.optim import parameter_table
from thalweg.schedules import parse

LR = FIELDS.index("lr")


def one_weight(value: float = 2.0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full((4, 4), value, dtype=dtype))


def timms_cosine() -> Any:
    """One file of timm, which as a whole asks for torchvision; nothing of it stays imported."""
    found = importlib.util.find_spec("timm")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("timm is not installed")
    place = found.submodule_search_locations[0]
    try:
        for name, path in (("timm", place), ("timm.scheduler", f"{place}/scheduler")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
        return importlib.import_module("timm.scheduler.cosine_lr")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]


def rates(scheduler: Any, num: int) -> list[float]:
    got = []
    for _ in range(num):
        got.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return got


# ---------------------------------------------------------------------- schedules


def test_warm_up_wastes_no_update_and_reaches_its_peak() -> None:
    """Torch's first update is at rate 0; timm's peak is never reached; here it is (t + 1)/n, and 1 at its last update."""
    optimizer = torch.optim.SGD([one_weight()], lr=1.0)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1e-8, total_iters=3)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    torchs = rates(lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[3]), 5)
    assert torchs[0] < 1e-7 and max(torchs[:3]) < 0.7

    cosine = timms_cosine().CosineLRScheduler(
        torch.optim.SGD([one_weight()], lr=1.0), t_initial=20, warmup_t=3, warmup_lr_init=0.0
    )
    timms = [cosine._get_lr(t)[0] for t in range(20)]
    assert timms[0] == 0 and max(timms) < 0.96

    ours = parse("warmup(3) >> cosine()").values(20)
    assert ours[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and ours[-1] == 0
    step, feed = make_step(mlp(), mean_loss, points(), **{"schedule.lr": "warmup(3) >> cosine()", "optimizer.lr": 0.5})
    before = [p.detach().clone() for p in step.state.model.parameters()]
    rows = run_steps(step, feed, 20)
    assert [row[LR] for row in rows] == pytest.approx([0.5 * value for value in ours], rel=1e-12)
    assert rows[0][LR] > 0 and not all(torch.equal(p, q) for p, q in zip(step.state.model.parameters(), before))


def test_a_skipped_update_moves_no_schedule() -> None:
    """Torch's schedulers go on where the scaler skipped, and warn of something else; here the count stands still."""
    weight = one_weight()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    assert float(weight.detach().max()) == 2 and optimizer.param_groups[0]["lr"] == 0.5, "nothing moved but the rate"

    changes = {
        "precision": "fp16",
        "schedule.lr": "decay(factor=0.5, every=1)",
        "optimizer.lr": 1e-3,
        "train.batch": 16,
    }
    step, feed = make_step(mlp(), mean_loss, points(), **changes)
    step.state.scale.scale.fill_(2.0**60)  # type: ignore[union-attr]
    rows = [dict(zip(FIELDS, row)) for row in run_steps(step, feed, 1)]
    step.state.scale.scale.fill_(2.0**10)  # type: ignore[union-attr]
    rows += [dict(zip(FIELDS, row)) for row in run_steps(step, feed, 2)]
    assert [row["skipped"] for row in rows] == [1, 0, 0]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 5e-4])


# ---------------------------------------------------------------------- weight decay


def test_coupled_decay_in_adam_is_a_full_step_whatever_its_strength() -> None:
    """Divided by its own root mean square, lambda drops out. Here decay is decoupled, and coupled only by that name."""

    def moved(strength: float, form: str | None) -> float:
        weight = one_weight()
        loss = lambda model, batch: (model.weight * 0).sum() + 0 * batch["x"].sum()
        model = nn.Module()
        model.weight = weight
        changes = {"optimizer.lr": 0.01, "optimizer.weight_decay": strength, "optimizer.decay_form": form}
        changes = {path: value for path, value in changes.items() if value is not None}
        step, feed = make_step(model, loss, points(), **{"optimizer.rule": "adam" if form else "adamw", **changes})
        run_steps(step, feed, 1)
        return 2.0 - float(weight.detach().max())

    for strength in (0.1, 0.001):
        weight = one_weight()
        optimizer = torch.optim.Adam([weight], lr=0.01, weight_decay=strength)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert 2.0 - float(weight.detach().max()) == pytest.approx(0.01, rel=1e-3), "lr, whatever the strength"
        assert moved(strength, "coupled") == pytest.approx(0.01, rel=1e-3), "said by name, it is that"
        assert moved(strength, None) == pytest.approx(0.01 * strength * 2.0, rel=0.02)


def test_gains_of_normalization_do_not_decay() -> None:
    """All parameters in one group decay in torch; here gains and biases are exempt, and say so."""
    model = batchnorm_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert float(model[1].weight.detach().max()) < 1, "torch's default strength is 0.01"
    rows = {row.name: row for row in parameter_table(model, optimizer=Optimizer(weight_decay=0.1))}
    assert not rows["1.weight"].decays and "normalization" in rows["1.weight"].decay_reason
    assert not rows["0.bias"].decays and rows["0.weight"].decays


# ---------------------------------------------------------------------- clipping


def test_clipping_comes_after_accumulation() -> None:
    """Clipped one by one, four micro-batches give another gradient than their sum clipped once."""
    torch.manual_seed(0)
    model, data = mlp().double(), points(dtype=torch.float64)
    model[0].weight.data.mul_(5)
    changes = {"optimizer.rule": "sgd", "optimizer.lr": 1.0, "train.clip": 0.05, "train.batch": 64}
    moved = {}
    for micro in (64, 16):
        step, feed = make_step(copy.deepcopy(model), mean_loss, data, **changes, **{"train.micro_batch": micro})
        run_steps(step, feed, 1)
        moved[micro] = _flat(step.state.model) - _flat(model)
    torch.testing.assert_close(moved[16], moved[64], rtol=1e-10, atol=1e-13)
    assert float(moved[16].norm()) == pytest.approx(0.05, rel=1e-9)

    naive = torch.zeros_like(moved[16])
    for k in range(4):
        model.zero_grad()
        mean_loss(model, {name: values[16 * k : 16 * k + 16] for name, values in data.items()}).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        naive -= torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / 4
    assert float((naive - moved[16]).norm() / moved[16].norm()) > 0.02


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------------- averages


def test_an_average_of_bfloat16_weights_moves() -> None:
    """In bfloat16, 0.999*old + 0.001*new is old; ours is kept in float32."""
    naive, new = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0, dtype=torch.bfloat16)
    for _ in range(1000):
        naive.lerp_(new, 0.001)
    assert float(naive) == 1

    model = mlp().bfloat16()
    loss = lambda model, batch: F.cross_entropy(model(batch["x"].bfloat16()).float(), batch["y"])
    changes = {"regularize.average": 0.999, "optimizer.lr": 0.0, "train.batch": 16, "precision": "bf16-pure"}
    step, feed = make_step(model, loss, points(), **changes)
    step.state.step = 20_000
    step.state.applied.fill_(20_000)  # its decay is full, and its young days are over
    step.state.t.fill_(20_001)
    average = step.state.arenas[0].averages()[0][0]
    with torch.no_grad():
        step.state.arenas[0].params.fill_(2.0)
        average.fill_(1.0)
    run_steps(step, feed, 40)
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full_like(average, 2 - 0.999**40), rtol=1e-3, atol=0)


def test_an_average_has_statistics_of_its_own() -> None:
    """Torch's copy holds the live model's running statistics, those of other weights; ours averages them along."""
    torch.manual_seed(0)
    live = batchnorm_net()
    torchs = AveragedModel(live)
    for k in range(3):
        live(points(16, seed=k)["x"] + 3)
        torchs.update_parameters(live)
    assert torch.equal(torchs.module[1].running_mean, live[1].running_mean), "the live model's own"

    step, feed = make_step(batchnorm_net(), mean_loss, points(), **{"regularize.average": 0.9, "train.batch": 16})
    layer, wanted = step.state.model[1], torch.zeros(16)
    for t in range(1, 5):
        run_steps(step, feed, 1)
        wanted = wanted + (1 - min(0.9, (1 + t) / (10 + t))) * (layer.running_mean - wanted)
    kept = layer.running_mean.clone()
    with step.state.averaged():
        torch.testing.assert_close(layer.running_mean, wanted)
        assert int(layer.num_batches_tracked) == 4, "a count is no average"
    assert torch.equal(layer.running_mean, kept)


def test_the_average_moves_once_a_step_whatever_the_split() -> None:
    """Keras moves it at each micro-batch: four of them make a decay of 0.9 act as 0.66."""
    ends = []
    for micro in (16, 4):
        torch.manual_seed(0)
        changes = {"regularize.average": 0.9, "train.batch": 16, "train.micro_batch": micro, "optimizer.rule": "sgd"}
        result = thalweg.train(
            lambda: mlp().double(), mean_loss, points(dtype=torch.float64), {"train.steps": 4, **changes}
        )
        ends.append(_flat(result.model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)
