"""The guard: a bad step is never applied; the run goes on, goes back or ends, as its recipe says, and to the bit."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import thalweg
import thalweg.engine.loop as loop_module
from tests.conftest import run_cli, three_parts
from tests.models import assert_same_bits, make_step, run_steps, state_bits
from tests.test_resume import Stop, steps_of, weights_of
from thalweg.checkpoint import Snapshot
from thalweg.core import Guard, Loss, Recipe, RecipeError, Split, StopReason, read_lines
from thalweg.data import Order
from thalweg.device import choose
from thalweg.engine import Loop
from thalweg.engine.guard import TOLD, Warden, unfit
from thalweg.engine.spikes import LOSS_FLOOR, NORM_FLOOR, Spikes, Watch, robust
from thalweg.precision import LEAST, LossScale
from thalweg.recipes import find_task, recipe_for
from thalweg.run import train_task
from thalweg.watch import Memory, Terminal

NUM, BATCH, SEED = 640, 16, 3
BASE: dict[str, Any] = {
    "seed": SEED,
    "precision": "fp32",
    "train.steps": 90,
    "train.batch": BATCH,
    "train.clip": 0.0,
    "optimizer.lr": 0.02,
    "schedule.lr": "warmup(5) >> cosine(to=0.1)",
    "checkpoint.every": 0,
    "evaluate.every": 0,
}
WATCHED = {"guard.window": 16, "guard.deviations": 6.0}
REWIND = {"guard.every": 4, "guard.rewinds": 9}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))


def samples(num: int = NUM, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=draw)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5]) + 0.1 * torch.randn(num, generator=draw)
    return {"x": x, "y": y, "times": torch.ones(num)}


def squared(model: nn.Module, batch: Any) -> Loss:
    """A sum of squares; a sample whose ``times`` is not 1 has another gradient than its loss says."""
    total = (model(batch["x"]).float().squeeze(1) - batch["y"]).square()
    return Loss((total * batch["times"] - (total * (batch["times"] - 1)).detach()).sum(), len(total))


def spoilt(fault: str, *places: int) -> Split:
    """Data with bad samples."""
    data = samples()
    for at in places:
        if fault in ("nan", "inf"):
            data["x"][at, 2] = float(fault)
        else:
            data["y"][at] = {"label": 3e3, "gradient": 5.0}[fault]
            data["times"][at] = {"label": 1.0, "gradient": 1e6}[fault]
    return Split(train=data, test=samples(64, seed=1))


def go(data: Any, folder: Path | None = None, *, resume: bool = False, **changes: Any) -> Any:
    """(result, events) of a run."""
    memory = Memory()
    recipe = Recipe().override({**BASE, **changes})
    result = thalweg.train(net, squared, data, recipe, folder=folder, resume=resume, sinks=[memory])
    return result, [e for e in memory.events if e.name != "memory"]


@cache
def windows(steps: int, batch: int) -> list[set[int]]:
    """The samples of each step."""
    order = Order(NUM, batch, seed=SEED, keep_last=True)
    return [{*order.window(step)[1].tolist()} for step in range(steps)]


def bad_steps(*places: int, steps: int = 90, batch: int = BATCH) -> list[int]:
    """The steps, from 1, whose window holds one of these samples."""
    return [step + 1 for step, window in enumerate(windows(steps, batch)) if {*places} & window]


def first_at(step: int) -> int:
    """A sample that step ``step`` is the first to hold."""
    return next(i for i in range(NUM) if bad_steps(i)[0] == step)


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.state_dict().values())


@pytest.fixture(scope="module")
def spread() -> float:
    """The worst held-out loss of clean runs with other seeds."""
    return max(go(spoilt("none"), seed=seed)[0].metrics["loss"] for seed in range(6))


# ---------------------------------------------------------------------- policies


@pytest.mark.parametrize("parts", [BATCH, BATCH // 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("policy", ["skip", "rewind", "stop"])
@pytest.mark.parametrize("fault", ["nan", "inf", "label", "gradient"])
def test_the_policy_is_followed(fault: str, policy: str, precision: str, parts: int, spread: float) -> None:
    draw = random.Random(f"{fault} {policy} {precision} {parts}")
    spike = fault in ("label", "gradient")
    far = [
        i for i in range(NUM) if bad_steps(i)[0] > 32 and bad_steps(i)[1] > 60
    ]  # the window is full, also after a rewind
    at = draw.choice(far if spike else [i for i in range(NUM) if bad_steps(i)[0] > 1])
    changes: dict[str, Any] = {"precision": precision, "train.micro_batch": parts}
    changes |= {"guard.spike" if spike else "guard.nonfinite": policy, **(WATCHED if spike else {})}
    changes |= REWIND if policy == "rewind" else {}
    result, events = go(spoilt(fault, at), **changes)
    bad, skipped = bad_steps(at), {r.step for r in result.records if r.skipped}
    assert finite(result.model)
    if precision == "fp16" and fault == "gradient":  # beyond float16 with any scale that training has: skipped by that
        assert {*bad} <= skipped and result.reason is StopReason.FINISHED
        return
    if policy == "stop":
        assert result.reason is StopReason.DIVERGED and result.reason.exit_code == 3
        assert bad[0] == result.records[-1].step == events[-1].step and [e.name for e in events] == [
            "stopped by the guard"
        ]
        return
    assert result.reason is StopReason.FINISHED
    name = "rewound" if policy == "rewind" else "bad step"
    assert [(e.name, e.step) for e in events] == [(name, step) for step in bad]
    assert all(at in e.detail["samples"] for e in events)
    assert {*bad} <= skipped and [r.step for r in result.records] == [*range(1, 91)]
    if policy == "rewind":
        told = {0: 0, **{r.step: r.applied for r in result.records}}
        for event in events:
            since, t = event.detail["to"], event.detail["from"]
            assert since % 4 == 0 and (4 <= t - since <= 8 or since == 0 or event is not events[0])
            if t < 90:  # after the last step there is no record to see it in
                assert told[t + 1] - (not result.records[t].skipped) == told[since], "updates go back, steps do not"
    assert result.metrics["loss"] <= 1.2 * spread


def test_a_spoilt_run_without_a_guard_is_far_off(spread: float) -> None:
    """What the tests above are worth."""
    for fault in ("label", "gradient"):
        assert not go(spoilt(fault, first_at(20)))[0].metrics["loss"] < 1.2 * spread


def test_the_first_copy_is_the_beginning() -> None:
    result, events = go(spoilt("nan", first_at(3)), **{"guard.nonfinite": "rewind", "train.steps": 6})
    assert (events[0].detail["from"], events[0].detail["to"]) == (3, 0)
    assert [r.applied for r in result.records] == [1, 2, 2, 1, 2, 3]


def test_a_bad_last_step_still_ends_with_an_evaluation_and_a_checkpoint(tmp_path: Path) -> None:
    changes = {"guard.nonfinite": "rewind", "guard.every": 3, "train.steps": 9}
    result, events = go(spoilt("nan", first_at(9)), tmp_path / "run", **changes)
    assert result.reason is StopReason.FINISHED and result.evaluations[-1].step == 9
    assert (events[0].detail["from"], events[0].detail["to"]) == (9, 3)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000009" / "state.safetensors")
    assert int(saved["applied"]) == 3


def test_a_rewound_state_is_that_of_the_copy_to_the_bit() -> None:
    """Slots, average, statistics, loss scale, history and what schedules have heard are all weights' company."""
    changes = {
        "precision": "fp16",
        "train.clip_history": 2.5,
        "regularize.average": 0.9,
        "schedule.lr": "loss_plateau(patience=2)",
        "guard.nonfinite": "rewind",
        "guard.spike": "rewind",
        "guard.window": 8,
    }
    step, feed = make_step(net(), squared, samples(), **{**BASE, "train.steps": 30, **changes})
    run_steps(step, feed, 7)
    copy, before = step.state.copied(), state_bits(step)
    run_steps(step, feed, 5)
    assert any(not torch.equal(before[name], t) for name, t in state_bits(step).items())
    step.state.limit.most = 8
    step.state.go_back(copy)
    assert_same_bits(before, state_bits(step))
    assert step.state.step == 12 and float(step.state.t) == float(step.state.applied) + 1 and step.state.limit.most == 8


def test_rewinds_are_bounded() -> None:
    at, changes = 41, {"train.batch": 48, "guard.nonfinite": "rewind", "guard.every": 2, "guard.rewinds": 2}
    result, events = go(spoilt("nan", at), **changes)
    assert result.reason is StopReason.DIVERGED
    assert [e.name for e in events] == ["rewound", "rewound", "stopped by the guard"]
    assert "gone back 2 times (guard.rewinds)" in events[-1].text
    assert [r.step for r in result.records if r.skipped] == bad_steps(at, batch=48)[:3]


def test_patience_counts_bad_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_FLUSH_SECONDS", -1.0)  # each step is read at once
    data = samples()
    data["x"][:] = float("nan")
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return squared(model, {**batch, "x": torch.zeros_like(batch["x"]) if calls < 4 else batch["x"]})

    recipe = Recipe().override({**BASE, "guard.patience": 7})
    result = thalweg.train(net, loss, Split(train=data), recipe)
    assert result.reason is StopReason.DIVERGED and [r.skipped for r in result.records][-7:] == [True] * 7
    assert sum(r.skipped for r in result.records) == 7


# ---------------------------------------------------------------------- the same run, whenever it is read or killed


KINDS = {
    "nan": {"guard.nonfinite": "rewind", **REWIND},
    "label": {"guard.spike": "rewind", **REWIND, **WATCHED},
    "gradient": {"guard.spike": "skip", **WATCHED},
}
RICH = {"regularize.average": 0.9, "evaluate.every": 7, "train.steps": 38, "train.micro_batch": 8}


@pytest.mark.parametrize("fault", KINDS)
def test_stopped_anywhere_and_resumed_is_the_same_run(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, data = {**RICH, **KINDS[fault]}, spoilt(fault, first_at(29), first_at(34))
    _, events = go(data, tmp_path / "whole", **changes)
    assert [e.step for e in events] == [29, 34]
    wanted, lines = weights_of(tmp_path / "whole", 38), steps_of(tmp_path / "whole")
    for k in (*range(1, 28, 5), *range(28, 37)) if fault == "nan" else (17, *range(28, 37, 2)):
        folder = tmp_path / f"stopped-{k}"
        asked, whole = Stop(k), Loop.__init__

        def patched(self: Any, *args: Any, asked: Stop = asked, whole: Any = whole, **kwargs: Any) -> None:
            whole(self, *args, **{**kwargs, "stop": asked})
            asked.loop = self

        monkeypatch.setattr(Loop, "__init__", patched)
        stopped, _ = go(data, folder, **changes)
        monkeypatch.undo()
        assert stopped.reason is StopReason.INTERRUPTED
        go(data, folder, resume=True, **changes)
        assert weights_of(folder, 38) == wanted, k
        assert steps_of(folder) == lines, k


@pytest.mark.parametrize("fault", KINDS)
def test_when_rows_are_read_does_not_matter(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seconds in (-1.0, 1e9):
        monkeypatch.setattr(loop_module, "_FLUSH_SECONDS", seconds)
        folder = tmp_path / str(seconds)
        _, events = go(
            spoilt(fault, first_at(29), first_at(34)), folder, **{**RICH, "evaluate.every": 0, **KINDS[fault]}
        )
        found.append((weights_of(folder, 38), steps_of(folder), [(e.step, e.text) for e in events]))
    assert found[0][0] == found[1][0] and found[0][1] == found[1][1]
    assert found[0][2] == found[1][2] and len(found[0][2]) == 2


def test_a_checkpoint_holds_no_more_than_before_without_a_guard_and_the_copies_with_one(tmp_path: Path) -> None:
    go(spoilt("none"), tmp_path / "plain", **{"train.steps": 9})
    folder = tmp_path / "plain" / "checkpoints" / "step-00000009"
    assert {p.name for p in folder.iterdir()} == {
        "weights.safetensors", "state.safetensors", "state.json", "manifest.json"
    }  # fmt: skip
    assert not [name for name in load_file(folder / "state.safetensors") if "guard" in name]
    assert "guard" not in json.loads((folder / "state.json").read_text())
    changes = {"train.steps": 9, "guard.spike": "rewind", "guard.every": 4}
    go(spoilt("none"), tmp_path / "rewind", **changes)
    folder = tmp_path / "rewind" / "checkpoints" / "step-00000009"
    assert json.loads((folder / "state.json").read_text())["guard"] == {
        "rewinds": 0, "steps": {"rewind-old": 4, "rewind-new": 8}
    }  # fmt: skip
    assert int(load_file(folder / "rewind-old.safetensors")["state/applied"]) == 4
    assert {"guard/ring", "guard/seen", "guard/limits"} <= load_file(folder / "state.safetensors").keys()


def test_a_guard_that_finds_nothing_changes_nothing() -> None:
    plain, _ = go(spoilt("none"))
    watched, events = go(spoilt("none"), **{"guard.spike": "rewind", "guard.nonfinite": "stop", **WATCHED, **REWIND})
    assert not events
    assert_same_bits(dict(plain.model.state_dict()), dict(watched.model.state_dict()))


# ---------------------------------------------------------------------- the judgement


@pytest.mark.parametrize("num", [8, 9, 64, 65])
def test_the_robust_score_is_numpys(num: int) -> None:
    values = torch.randn(2, num, dtype=torch.float64).exp()
    middle, deviation = robust(values)
    wanted = np.median(values.numpy(), axis=1)
    np.testing.assert_allclose(middle.numpy(), wanted, rtol=1e-15)
    mad = np.median(np.abs(values.numpy() - wanted[:, None]), axis=1)
    np.testing.assert_allclose(deviation.numpy(), 1.4826 * mad, rtol=1e-14)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive losses", "negative losses"])
def test_limits_are_those_of_the_last_applied_steps_taken_every_16th(sign: float) -> None:
    draw = np.random.default_rng(0)
    spikes = Spikes(5.0, 20, torch.zeros(4, dtype=torch.float64))
    kept: list[tuple[float, float]] = []
    wanted = (math.inf, math.inf)
    for step in range(1, 200):
        loss, norm, ok = sign * draw.lognormal(), draw.lognormal(), bool(draw.random() > 0.3)
        assert above(spikes, loss, norm) == [loss > wanted[0], norm > wanted[1]]
        spikes.take_in(torch.tensor(ok), step)
        kept += [(loss, norm)] if ok else []
        if step % 16 == 0 and len(kept) >= 20:
            losses, norms = (np.array(column) for column in zip(*kept[-20:]))

            def far(values: Any, least: float) -> float:
                middle = np.median(values)
                return float(middle + 5 * max(1.4826 * np.median(np.abs(values - middle)), least))

            plain = far(losses, LOSS_FLOOR * abs(np.median(losses)))
            longer = math.exp(far(np.log(losses), 0.0)) if sign > 0 else -math.inf
            wanted = (max(plain, longer), math.exp(far(np.log(norms), NORM_FLOOR)))
            np.testing.assert_allclose(spikes.limits[:2].numpy(), wanted, rtol=1e-12)
            np.testing.assert_allclose(spikes.limits[2:].numpy(), [np.median(losses), np.exp(np.median(np.log(norms)))])
    assert len(kept) > 100


def test_nothing_is_a_spike_while_the_window_is_young() -> None:
    spikes = Spikes(1.0, 32, torch.zeros(4, dtype=torch.float64))
    for step in range(1, 33):
        assert above(spikes, 1e30, 1e30) == [False, False]
        above(spikes, 1.0, 1.0)
        spikes.take_in(torch.tensor(True), step)
    assert above(spikes, 1e30, 0.0) == [True, False] and above(spikes, 0.0, 1e30) == [False, True]
    assert above(spikes, 1.0, 1.0) == [False, False] and above(spikes, math.nan, math.nan) == [False, False]


def above(spikes: Spikes, loss: float, norm: float) -> list[bool]:
    """Whether a loss, given as a sum over weights of 2, and a norm are too large."""
    values = torch.tensor([loss * 2, 2.0, norm], dtype=torch.float64)
    return [bool(found) for found in spikes.above(*values).flatten()]


def judged(watch: Watch, *, norm: float = 1.0, loss: float = 1.0, weight: float = 1.0, scale: float = 1.0) -> bool:
    n, losses, weights, s = (torch.tensor(v, dtype=torch.float64) for v in (norm, loss, weight, scale))
    return bool(watch.judge(torch.isfinite(n + losses), n, losses, weights, s))


def test_what_trips_makes_later_steps_inert() -> None:
    watch = Watch(Guard(nonfinite="stop"), torch.device("cpu"), torch.float64, scaled=False)
    assert judged(watch) and not judged(watch, norm=math.inf)
    assert bool(watch.tripped) and not bool(watch.still), "the loss scale hears of the step that trips"
    assert not judged(watch) and bool(watch.still), "and of none after it"
    watch.release()
    assert judged(watch)


def test_a_step_without_weight_is_no_fault() -> None:
    watch = Watch(Guard(nonfinite="stop"), torch.device("cpu"), torch.float64, scaled=False)
    assert not judged(watch, norm=math.nan, loss=0.0, weight=0.0)
    assert not bool(watch.tripped)


def test_an_overflow_in_float16_is_the_loss_scales_work() -> None:
    """Unless the loss itself is not finite, or the scale cannot fall further."""
    for given, trips in (
        ({"norm": math.inf, "scale": 65536.0}, False),
        ({"norm": math.nan, "loss": math.nan, "scale": 65536.0}, True),
        ({"norm": math.inf, "scale": LEAST}, True),
    ):
        watch = Watch(Guard(nonfinite="stop"), torch.device("cpu"), torch.float64, scaled=True)
        assert not judged(watch, **given)
        assert bool(watch.tripped) is trips, given


def test_a_spike_leaves_the_loss_scale_alone() -> None:
    device, _ = choose("cpu")
    scale = LossScale.start(device)
    scale.update(torch.tensor(0.0))
    scale.update(torch.tensor(1.0), torch.tensor(True))
    assert float(scale.scale) == 65536 and int(scale.streak) == 1
    scale.update(torch.tensor(1.0), torch.tensor(False))
    assert float(scale.scale) == 32768 and int(scale.streak) == 0


def test_overflows_in_float16_do_not_use_up_patience() -> None:
    """The scale starts far too high for this loss, and falls to where it fits."""

    def loss(model: nn.Module, batch: Any) -> Loss:
        total, weight = squared(model, batch)
        return Loss(total * 1e4, weight)

    changes = {**BASE, "precision": "fp16", "guard.patience": 2, "guard.nonfinite": "stop", "train.steps": 30}
    result = thalweg.train(net, loss, Split(train=samples()), Recipe().override(changes))
    assert result.reason is StopReason.FINISHED
    assert [r.skipped for r in result.records][:3] == [True] * 3 and not result.records[-1].skipped


def test_no_false_alarm_on_digits() -> None:
    task = find_task("digits")
    changes = {
        "precision": "fp32",
        "train.epochs": 10,
        "guard.spike": "skip",
        "checkpoint.every": 0,
        "evaluate.every": 0,
    }
    memory = Memory()
    result = train_task(task, recipe_for(task).override(changes), sinks=[memory])
    assert len(result.records) > 200 and not [r.step for r in result.records if r.skipped]
    assert not [e for e in memory.events if e.name == "bad step"]


def test_digits_hit_once_ends_within_the_spread_of_clean_runs() -> None:
    task = find_task("digits")
    recipe = recipe_for(task).override(
        {"precision": "fp32", "train.epochs": 5, "checkpoint.every": 0, "evaluate.every": 0}
    )
    clean = [train_task(task, recipe.override({"seed": seed})).metrics["accuracy"] for seed in range(3)]
    for policy, factor in (("skip", math.nan), ("rewind", math.inf), ("rewind", 1e5)):
        calls = 0

        def loss(model: Any, batch: Any, factor: float = factor, **options: Any) -> Any:
            nonlocal calls
            calls += model.training
            total, weight = task.loss(model, batch, **options)
            return Loss(total * (factor if calls == 101 else 1.0), weight)

        more = {"guard.every": 10} if policy == "rewind" else {}
        more |= {"guard.spike": policy, "guard.nonfinite": policy}
        memory = Memory()
        result = train_task(replace(task, loss=loss), recipe.override(more), sinks=[memory])
        (event,) = [e for e in memory.events if e.name in ("bad step", "rewound")]
        assert [r.step for r in result.records if r.skipped] == [event.step] and 90 < event.step < 102
        assert len(event.detail["samples"]) == recipe.train.batch and finite(result.model)
        assert ("Gone through again, everything is finite" in event.text) == (not math.isfinite(factor))
        assert result.metrics["accuracy"] >= min(clean) - 0.01


# ---------------------------------------------------------------------- what is found out


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.abs().amax(1, keepdim=True) - 50).neg().clamp(min=-1).log() * 0 + x


class Root(nn.Module):
    """Its gradient at 0 is infinite, times 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x[:, :1] * (x[:, :1] < 50)).abs().sqrt() * 0


class Inner(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 8), part, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        big = x.abs().amax(1, keepdim=True) > 50
        return self.last(self.part(self.first(x) * torch.where(big, 0.0, 1.0) + torch.where(big, 1e3, 0.0)))


def logged(model: nn.Module, batch: Any) -> Any:
    """Infinite in the loss alone."""
    return squared(model, batch).total / BATCH + (51 - batch["x"].abs().amax()).clamp(min=0).log() * 0


@pytest.mark.parametrize(
    ("model", "loss", "module", "way"),
    [
        (lambda: Inner(nn.Sequential(nn.Identity(), Log())), squared, "part.1", "forward"),
        (lambda: Inner(Root()), squared, "part", "backward"),
        (net, logged, "the loss", "forward"),
    ],
    ids=["forward", "backward", "loss"],
)
def test_the_first_module_and_the_sample_are_named(model: Any, loss: Any, module: str, way: str) -> None:
    data = samples()
    at = first_at(4)
    data["x"][at] = 100.0  # finite, and more than the model or the loss bears
    memory = Memory()
    recipe = Recipe().override({**BASE, "train.steps": 10})
    result = thalweg.train(model, loss, Split(train=data), recipe, sinks=[memory])
    (event,) = [e for e in memory.events if e.name == "bad step"]
    assert [event.step] == [4] == [r.step for r in result.records if r.skipped]
    assert event.detail["module"] == module and event.detail["samples"] == [at], event
    assert f"in the {way} pass" in event.text


@pytest.mark.parametrize("kind", ["items", "stream"])
def test_data_sets_have_their_samples_named_and_streams_are_not_read_twice(kind: str) -> None:
    data, at = samples(), 100 if kind == "stream" else first_at(4)
    data["x"][at] = float("nan")
    rows = [{name: t[i] for name, t in data.items()} for i in range(NUM)]

    class Stream:
        passes = 0

        def __iter__(self) -> Any:
            Stream.passes += 1
            return iter(rows)

    memory = Memory()
    recipe = Recipe().override({**BASE, "train.steps": 30})
    thalweg.train(net, squared, rows if kind == "items" else Stream(), recipe, sinks=[memory])
    (event,) = [e for e in memory.events if e.name == "bad step"]
    if kind == "items":
        assert event.detail["samples"] == [at] and event.detail["module"] == "the data"
    else:
        assert "samples" not in event.detail and "a stream" in event.text and Stream.passes <= 3


def test_a_diagnosis_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for told in (0, TOLD):
        monkeypatch.setattr("thalweg.engine.guard.TOLD", told)
        result, events = go(spoilt("nan", first_at(4)), **{"train.micro_batch": 8, "regularize.average": 0.9})
        assert len(events) == min(told, len(bad_steps(first_at(4))))
        found.append((result.model.state_dict(), [(r.loss, r.grad_norm) for r in result.records if not r.skipped]))
    assert_same_bits(dict(found[0][0]), dict(found[1][0]))
    assert found[0][1] == found[1][1]


def test_a_diagnosis_that_fails_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("no such thing")

    monkeypatch.setattr("thalweg.engine.diagnose._looked_into", broken)
    result, events = go(spoilt("nan", first_at(4)), **{"train.steps": 10})
    assert result.reason is StopReason.FINISHED
    assert (
        "Looking into it failed: KeyError: 'no such thing'" in events[0].text
        and first_at(4) in events[0].detail["samples"]
    )


def test_few_bad_steps_are_told_and_all_are_recorded() -> None:
    bad = bad_steps(41, steps=95, batch=48)
    result, events = go(spoilt("nan", 41), **{"train.steps": 95, "train.batch": 48})
    assert [r.step for r in result.records if r.skipped] == bad and len(bad) > TOLD
    assert len(events) == TOLD and events[-1].text.endswith("Later ones stand in the records alone.")


def test_bad_steps_are_never_shown_as_zero(tmp_path: Path) -> None:
    at = first_at(19)
    for fault in ("nan", "inf", "label"):
        folder = tmp_path / fault
        result, events = go(spoilt(fault, at), folder, **{"guard.spike": "skip", **WATCHED})
        lines = [line for line in read_lines(folder / "records.jsonl") if line["kind"] == "step" and line["skipped"]]
        assert lines and all(line["loss"] != 0 and line["grad_norm"] != 0 for line in lines)
        if fault == "label":
            assert all(line["loss"] > 1e5 for line in lines)
            assert events[0].detail["loss"] > events[0].detail["loss_limit"] > events[0].detail["loss_middle"]
        else:
            assert all(not math.isfinite(float(line["loss"])) for line in lines)
        assert [r.step for r in result.records if r.skipped] == [line["step"] for line in lines]
        assert "skipped step" in (folder / "report.html").read_text()


def test_the_terminal_says_which_of_the_two_it_was() -> None:
    import io

    from rich.console import Console

    at = first_at(19)
    for fault, words in (("nan", "the gradient is not finite"), ("label", "far out of line")):
        text = io.StringIO()
        recipe = Recipe().override({**BASE, "guard.spike": "skip", **WATCHED})
        sink = Terminal(Console(file=text, width=200), verbose=False)
        thalweg.train(net, squared, spoilt(fault, at), recipe, sinks=[sink])
        assert f"{words}; the step is skipped" in text.getvalue()
        assert "bad step" not in text.getvalue() and "loss 0.0000" not in text.getvalue()


# ---------------------------------------------------------------------- with what else there is


def test_sharpness_and_two_passes_and_average_windows_go_with_it() -> None:
    at = first_at(19)
    guard = {"guard.spike": "rewind", **REWIND, **WATCHED}
    plain = {"regularize.average_form": "window", "regularize.average_start": "5", "regularize.average_every": "2"}
    for changes in ({"regularize.sharpness": 0.05}, {"optimizer.release_gradients": "two-pass"}, plain):
        result, events = go(spoilt("gradient", at), **{**guard, **changes})
        assert [r.step for r in result.records if r.skipped] == bad_steps(at) and finite(result.model)
        assert [e.name for e in events] == ["rewound"] * len(events)


def test_a_stopped_run_exits_with_3_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch, thalweg\nfrom torch import nn\n"
        "x = torch.randn(160, 4, generator=torch.Generator().manual_seed(0))\nx[7] = float('inf')\n"
        "loss = lambda model, batch: nn.functional.mse_loss(model(batch['x']), batch['x'][:, :1].nan_to_num())\n"
        "task = thalweg.Task(model=lambda: nn.Linear(4, 1), loss=loss, data={'x': x})\n"
    )
    given = [
        "--set",
        "train.batch=4",
        "--set",
        "precision=fp32",
        "--set",
        "checkpoint.every=2",
        "--set",
        "train.epochs=1",
    ]
    done = run_cli("train", "own:task", "--quiet", *given, "--set", "guard.nonfinite=stop", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    assert "Sample 7. What is not finite is in the data. The run ends." in told and "diverged:" in told
    events = [line for line in read_lines(tmp_path / "runs" / "own" / "records.jsonl") if line["kind"] == "event"]
    at = events[-1]["step"]
    saved = sorted((tmp_path / "runs" / "own" / "checkpoints").iterdir())
    assert int(saved[-1].name[5:]) == (at - 1) // 2 * 2
    assert all(t.isfinite().all() for t in load_file(saved[-1] / "weights.safetensors").values())


def test_train_step_skips_spikes_and_refuses_what_it_cannot_do() -> None:
    recipe = {**BASE, "guard.spike": "skip", **WATCHED, "schedule.lr": "constant()"}
    step = thalweg.TrainStep(net(), squared, recipe)
    data = samples()
    for k in range(32):
        assert not step({name: t[k % 10 * 16 : k % 10 * 16 + 16] for name, t in data.items()}).skipped
    before = {name: p.clone() for name, p in step.model.state_dict().items()}
    result = step({**{name: t[:16] for name, t in data.items()}, "y": data["y"][:16] + 1e4})
    assert result.skipped and float(result.loss) > 1e6
    assert_same_bits(before, dict(step.model.state_dict()))
    for changes in ({"guard.nonfinite": "rewind"}, {"guard.spike": "stop"}, {"guard.patience": 3}):
        with pytest.raises(RecipeError) as caught:
            thalweg.TrainStep(net(), squared, {**recipe, **changes})
        asked, _, remedy = three_parts(caught.value)
        assert next(iter(changes)) in asked and "out of TrainStep's reach" in asked and "'skip'" in remedy


def test_gradients_used_at_once_are_refused() -> None:
    changes = {"optimizer.release_gradients": "one-pass", "guard.spike": "skip"}
    with pytest.raises(RecipeError) as caught:
        go(spoilt("none"), **changes)
    asked, numbers, remedy = three_parts(caught.value)
    assert "with this guard" in asked and "guard.spike='skip'" in numbers and "two-pass" in remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonfinite": "ignore"}, ("guard.nonfinite='ignore' is not known", "skip, rewind, stop")),
        ({"nonfinite": "off"}, ("guard.nonfinite='off' is not known", "skip, rewind, stop")),
        ({"spike": "on"}, ("guard.spike='on' is not known", "off, skip, rewind, stop")),
        ({"spike": "skip", "deviations": 0.0}, ("guard.deviations=0.0", "such as 16")),
        ({"spike": "skip", "deviations": -1.0}, ("guard.deviations=-1.0", "such as 16")),
        ({"spike": "skip", "deviations": float("nan")}, ("guard.deviations=nan", "such as 16")),
        ({"spike": "skip", "window": 7}, ("guard.window=7 is too small", "8 or more")),
        ({"patience": 0}, ("guard.patience=0 is too small", "1 or more")),
        ({"spike": "rewind", "every": 0}, ("guard.every=0 is too small", "1 or more")),
        ({"spike": "rewind", "rewinds": 0}, ("guard.rewinds=0 is too small", "guard.spike='stop'")),
        (
            {"deviations": 5.0},
            ("guard.deviations=5.0 has no effect", "guard.spike='off'", "leave guard.deviations out"),
        ),
        ({"window": 16}, ("guard.window=16 has no effect", "guard.spike='off'")),
        ({"spike": "skip", "every": 7}, ("guard.every=7 has no effect", "guard.nonfinite='rewind'")),
        ({"nonfinite": "stop", "rewinds": 7}, ("guard.rewinds=7 has no effect", "guard.nonfinite='stop'")),
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Guard(**changes)
    told = " ".join(three_parts(caught.value))
    assert all(word in told for word in words), told


def test_the_plan_says_what_a_guard_takes() -> None:
    plan = go(spoilt("none"), **{"train.steps": 6, "guard.nonfinite": "rewind", "precision": "fp16"})[0].plan
    told = {(d.path, d.reason) for d in plan.decisions}
    assert any(path == "guard.every" and "two copies" in reason for path, reason in told)
    assert any(path == "guard.nonfinite" and "loss scale" in reason for path, reason in told)
    sizes = {name: size for name, size in plan.sizes.items() if name != "gradients"}
    assert sizes.pop("copies to rewind to") == 2 * sum(sizes.values()) > 0


def test_unfit_names_the_first_trained_tensor_that_is_not_finite() -> None:
    good = {"a": torch.ones(2), "mask": torch.full((2,), -math.inf), "count": torch.tensor(1)}
    state = {"m/a": torch.zeros(2), "heard": torch.tensor([math.inf]), "guard/limits": torch.tensor([math.inf])}
    assert unfit(Snapshot({"weights": good, "state": state}, {}), {"a"}) == ""
    for group, name in (("weights", "a"), ("state", "m/a"), ("average", "a")):
        groups = {"weights": dict(good), "state": dict(state), "average": dict(good)}
        groups[group][name] = torch.tensor([1.0, math.nan])
        told = unfit(Snapshot(groups, {}), ["a"])
        assert told == f"'{name}' of the {group} has 1 of 2 values that are not finite"
    step, feed = make_step(net(), squared, samples(), **{**BASE, "guard.spike": "skip"})
    run_steps(step, feed, 3)
    names = [name for name, _ in step.state.model.named_parameters()]
    assert unfit(step.state.snapshot({}), names) == ""
    with torch.no_grad():
        step.state.model[4].weight[0, 3] = math.nan
    assert "'4.weight' of the weights has 1 of 16" in unfit(step.state.snapshot({}), names)


def test_a_step_that_raises_after_one_that_trips_keeps_what_is_good(tmp_path: Path) -> None:
    """The copy is gone back to, and saved; with 'stop' nothing is."""
    at = first_at(5)
    for policy, wanted in (("rewind", [5]), ("stop", [])):
        calls, began = 0, [False]
        begin = Warden.begin

        def counted(self: Warden, begin: Any = begin, began: list[bool] = began) -> None:
            began[0] = True
            begin(self)

        def loss(model: nn.Module, batch: Any, began: list[bool] = began) -> Any:
            nonlocal calls
            calls += began[0]
            if calls > 7:
                raise KeyError("a bug of the user's")
            return squared(model, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Warden, "begin", counted)
            patch.setattr(loop_module, "_FLUSH_SECONDS", 1e9)
            changes = {"train.steps": 20, "guard.nonfinite": policy}
            with pytest.raises(KeyError):
                thalweg.train(
                    net, loss, spoilt("nan", at), Recipe().override({**BASE, **changes}), folder=tmp_path / policy
                )
        assert [int(p.name[5:]) for p in sorted((tmp_path / policy / "checkpoints").iterdir())] == wanted
