"""Our schedules as torch's ``LRScheduler`` in loops of others, and torch's schedulers by name in our recipes."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from tests.conftest import three_parts
from thalweg.core import RecipeError
from thalweg.optim import Scheduler, scheduler
from thalweg.schedules import parse


def sgd(lr: float = 1.0, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, **options)


def rates(running: lr_scheduler.LRScheduler, steps: int, key: str = "lr", group: int = 0) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(float(running.optimizer.param_groups[group][key]))
        running.optimizer.step()
        running.step()
    return values


@pytest.mark.parametrize(
    "text", ["warmup(3) >> cosine(to=0.1)", "wsd(warm=2, cool=4)", "restarts(times=2)", "0.5 * rex()"]
)
def test_the_rate_is_the_schedule_and_stays_at_its_end(text: str) -> None:
    """One step too many, or a hundred: torch's cosine would climb again, its one-cycle jumps back."""
    optimizer = sgd(0.2)
    got = rates(Scheduler(optimizer, text, steps=12), 112)
    assert got[:12] == pytest.approx([0.2 * v for v in parse(text).values(12)], rel=1e-15)
    assert set(got[12:]) == {got[11]}


def test_torchs_cosine_climbs_again_and_its_one_cycle_jumps() -> None:
    """What is not done here."""
    climbs = rates(lr_scheduler.CosineAnnealingLR(sgd(), T_max=10), 21)
    assert climbs[10] < 1e-12 and climbs[20] == pytest.approx(1.0)
    jumps = lr_scheduler.OneCycleLR(sgd(), max_lr=0.1, total_steps=10)
    got = rates(jumps, 10)
    assert got[-1] < 1e-5 and jumps.optimizer.param_groups[0]["lr"] > 1e-3
    ours = rates(Scheduler(sgd(0.1), "one_cycle()", steps=10), 12)
    assert ours[9:] == [pytest.approx(4e-7)] * 3


@given(last=st.integers(0, 30))
@settings(max_examples=30, deadline=None, database=None)
def test_going_on_from_last_epoch_is_going_on(last: int) -> None:
    text, steps = "warmup(3) >> cosine(to=0.1)", 20
    whole = rates(Scheduler(sgd(0.3), text, steps=steps), 40)
    later = sgd(0.3)
    later.param_groups[0]["initial_lr"] = 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = rates(Scheduler(later, text, steps=steps, last_epoch=last), 5)
    assert got == whole[last + 1 : last + 6]


def test_torchs_sequence_is_wrong_from_last_epoch() -> None:
    """pytorch #162591: 0.1 instead of 0.9 (measured on 2.13)."""

    def built(optimizer: Any, last: int) -> lr_scheduler.SequentialLR:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts: list[lr_scheduler.LRScheduler] = [
                lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=3, last_epoch=last),
                lr_scheduler.ExponentialLR(optimizer, gamma=0.9, last_epoch=last),
            ]
            return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3], last_epoch=last)

    whole = rates(built(sgd(), -1), 8)
    resumed = sgd()
    resumed.param_groups[0]["initial_lr"] = 1.0
    torchs = rates(built(resumed, 4), 1)
    ours = sgd()
    ours.param_groups[0]["initial_lr"] = 1.0
    text = "constant(3, value=0.1) >> constant(1, value=1) >> decay(factor=0.9)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = rates(Scheduler(ours, text, steps=20, last_epoch=4), 3)
    assert mine == pytest.approx(rates(Scheduler(sgd(), text, steps=20), 8)[5:])
    assert mine == pytest.approx(whole[5:8]) and torchs[0] != pytest.approx(whole[5])


def test_last_epoch_without_the_first_rate_is_refused() -> None:
    with pytest.raises(RecipeError) as err:
        Scheduler(sgd(), "cosine()", steps=10, last_epoch=3)
    assert "initial_lr" in three_parts(err.value)[1]


def test_a_group_added_late_gets_its_own_rate_times_the_factor() -> None:
    optimizer = sgd(1.0)
    running = Scheduler(optimizer, "linear()", steps=11)
    rates(running, 4)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.5})
    optimizer.step()
    running.step()
    now = parse("linear()").at(5, 11)
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(now), pytest.approx(0.5 * now)]


def test_a_rate_that_was_edited_is_put_right_at_the_next_step() -> None:
    """torch's recursive cosine would carry the edit through the rest of the run."""
    optimizer = sgd(1.0)
    running = Scheduler(optimizer, "cosine()", steps=10)
    wanted = parse("cosine()").values(10)
    rates(running, 4)
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    running.step()
    assert optimizer.param_groups[0]["lr"] == wanted[5]


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_any_number_of_a_group_can_move(name: str) -> None:
    optimizer = sgd(0.1, momentum=0.95, weight_decay=0.02)
    got = rates(Scheduler(optimizer, {name: "warmup(4, start=0.5) >> hold()"}, steps=6), 6, name)
    wanted = {
        "momentum": [0.5 + 0.45 * t / 4 for t in range(1, 5)] + [0.95] * 2,
        "weight_decay": [0.02 * (0.5 + 0.5 * t / 4) for t in range(1, 5)] + [0.02] * 2,
    }[name]
    assert got == pytest.approx(wanted) and optimizer.param_groups[0]["lr"] == 0.1


def test_betas_move_one_by_one() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], betas=(0.9, 0.999))
    running = Scheduler(optimizer, {"beta1": "warmup(2, start=0.8)", "beta2": "constant(value=0.95)"}, steps=4)
    assert optimizer.param_groups[0]["betas"] == (pytest.approx(0.85), 0.95)
    optimizer.step()
    running.step()
    assert optimizer.param_groups[0]["betas"] == (pytest.approx(0.9), 0.95)


def test_our_optimizers_move_by_the_same_words() -> None:
    import thalweg

    weight = torch.ones(4, requires_grad=True)
    optimizer = thalweg.optim.Lion([weight], lr=0.1)
    running = Scheduler(optimizer, {"b1": "linear(to=0.5)", "lr": "linear(to=0.5)"}, steps=3)
    seen = []
    for _ in range(3):
        weight.grad = torch.ones(4)
        seen.append((optimizer.param_groups[0]["b1"], optimizer.param_groups[0]["lr"]))
        optimizer.step()
        running.step()
    assert seen == [(0.9, 0.1), (pytest.approx(0.7), pytest.approx(0.075)), (pytest.approx(0.5), pytest.approx(0.05))]


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate, capturable=False, foreach=False)
    running = Scheduler(optimizer, "linear()", steps=3)
    optimizer.step()
    running.step()
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


def test_state_goes_on_to_the_bit_and_is_plain_data(tmp_path: Any) -> None:
    text = {"lr": "warmup(3) >> cosine()", "momentum": "linear(to=0.5)"}
    first = Scheduler(sgd(0.1, momentum=0.9), text, steps=20)
    rates(first, 7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Scheduler(sgd(0.1, momentum=0.9), text, steps=20)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] == second.get_last_lr()[0]
    for key in ("lr", "momentum"):
        assert rates(copy.deepcopy(first), 13, key) == rates(copy.deepcopy(second), 13, key)
    other = Scheduler(sgd(0.1), "linear()", steps=20)
    with pytest.raises(RecipeError):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("schedules", "told"),
    [
        ({"momentun": "linear()"}, "momentun"),
        ({"beta1": "linear()"}, "beta1"),
        ("warmup(30)", "longer than the run"),
        ("plateau()", "listens"),
        ("warmup(2 epochs)", "epochs"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(schedules: Any, told: str) -> None:
    optimizer = sgd(0.1, momentum=0.9)
    with pytest.raises(RecipeError) as err:
        Scheduler(optimizer, schedules, steps=20)
    assert told in " ".join(three_parts(err.value))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_short_name_is_the_class() -> None:
    assert isinstance(scheduler(sgd(), "cosine()", 10), Scheduler)


# --- torch's schedulers in our recipes -------------------------------------------------------------------------------

BY_NAME = {
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "LinearLR": {"start_factor": 0.25, "total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 7], "gamma": 0.1},
    "CosineAnnealingLR": {"T_max": 12, "eta_min": 0.1},
    "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2},
    "PolynomialLR": {"total_iters": 12, "power": 2.0},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 12},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3},
}


def test_every_scheduler_of_torch_is_here_or_refused_by_name() -> None:
    kinds = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    refused = set()
    for name in kinds - {"LRScheduler"} - set(BY_NAME):
        with pytest.raises(RecipeError) as err:
            parse(f"torch.{name}()").values(5)
        assert "Use" in three_parts(err.value)[2]
        refused.add(name)
    assert {"ReduceLROnPlateau", "SequentialLR", "LambdaLR"} <= refused


@pytest.mark.parametrize("name", BY_NAME)
def test_a_scheduler_of_torch_by_name_is_torchs(name: str) -> None:
    options = ", ".join(f"{k}={v!r}" for k, v in BY_NAME[name].items())
    got = parse(f"torch.{name}({options})").values(12)
    assert got == rates(getattr(lr_scheduler, name)(sgd(momentum=0.9), **BY_NAME[name]), 12)
    after = parse(f"warmup(3) >> torch.{name}({options})").values(15)
    assert after[3:] == got


def test_shapes_of_ours_that_torch_has_too_are_equal() -> None:
    pairs = {
        "step(every=3, factor=0.5)": "torch.StepLR(step_size=3, gamma=0.5)",
        "decay(factor=0.9)": "torch.ExponentialLR(gamma=0.9)",
        "multistep(at=[2, 7], factor=0.1)": "torch.MultiStepLR(milestones=[2, 7], gamma=0.1)",
        "one_cycle()": "torch.OneCycleLR(max_lr=1.0, total_steps=30)",
        "one_cycle(rise=0.4, straight=True)": "torch.OneCycleLR(max_lr=1, total_steps=30, pct_start=0.4, anneal_strategy='linear')",
        "cyclic(every=6, low=0.1)": "torch.CyclicLR(base_lr=0.1, max_lr=1.0, step_size_up=3)",
        "cyclic(every=6, low=0.1, factor=0.5)": "torch.CyclicLR(base_lr=0.1, max_lr=1.0, step_size_up=3, mode='triangular2')",
    }
    for ours, torchs in pairs.items():
        assert parse(ours).values(30) == pytest.approx(parse(torchs).values(30), abs=1e-12), ours
    restarts = parse("restarts(every=5, longer=2)").values(30)
    cosine = [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]
    assert restarts[:5] == pytest.approx(cosine) and restarts[5] == restarts[15] == 1.0


@pytest.mark.parametrize(
    "text",
    ["torch.CosineLR()", "torch.CosineAnnealingLR()", "torch.StepLR(step_size='x')", "torch.ExponentialLR(gamma=-1)",
     "torch.ReduceLROnPlateau()", "torch.LRScheduler()", "timm.Cosine()", "torch.OneCycleLR(max_lr=1, total_steps=3)"],
)  # fmt: skip
def test_what_torch_cannot_do_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as err:
        parse(text).values(12)
    three_parts(err.value)
