"""The training step: exact accumulation, order of operations, skipped steps, named streams, no reading back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import thalweg
from tests.models import (
    IGNORED,
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
from thalweg.data import split, tree_map
from thalweg.engine.step import FIELDS


def one_step(model: nn.Module, loss: Any, parts: list[Any], **changes: Any) -> tuple[torch.Tensor, list[float], Any]:
    """(by how much one step over these micro-batches moved all parameters, row, step)."""
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    step, _ = make_step(model, loss, whole, **{"train.batch": len(whole[next(iter(whole))]), **changes})
    row = step.run(parts).tolist()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before, row, step


def cut(data: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return [{k: v[a:b] for k, v in data.items()} for a, b in zip(edges, edges[1:])]


SPLITS = {"1 x 64": [64], "4 x 16": [16] * 4, "16 x 4": [4] * 16, "ragged": [1, 30, 2, 16, 15]}


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("name", [n for n in SPLITS if n != "1 x 64"])
def test_c1_any_split_is_the_same_step_for_ragged_text(name: str, rule: str) -> None:
    torch.manual_seed(0)
    model, data = small_gpt().double(), ragged_text()
    changes = {"train.clip": 0.05, "optimizer.rule": rule, "regularize.average": 0.9}
    if rule == "adamw":  # Adam's first step is lr*sign(g): where g is rounding noise, so is its sign
        changes["optimizer.options.eps"] = 1e-3
    whole, row, _ = one_step(copy.deepcopy(model), text_loss, [data], **changes)
    parts, part_row, _ = one_step(copy.deepcopy(model), text_loss, cut(data, SPLITS[name]), **changes)
    assert float((whole - parts).abs().max() / whole.abs().max()) < 1e-12
    for a, b in zip(row, part_row):
        assert abs(a - b) <= 1e-12 * max(1, abs(a))


def test_c1_gradient_is_that_of_the_mean_over_all_tokens() -> None:
    """Against autograd on the whole batch, not against ourselves: sgd at rate 1 moves by the gradient."""
    torch.manual_seed(0)
    model, data = small_gpt().double(), ragged_text()
    twin = copy.deepcopy(model)
    loss = F.cross_entropy(twin(data["tokens"]).flatten(0, 1), data["targets"].flatten(), ignore_index=IGNORED)
    loss.backward()
    grad = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    changes = {"optimizer.rule": "sgd", "optimizer.lr": 1.0, "train.clip": 0}
    moved, row, _ = one_step(model, text_loss, cut(data, SPLITS["ragged"]), **changes)
    torch.testing.assert_close(moved, -grad, rtol=1e-12, atol=2e-16)
    assert row[0] / row[1] == pytest.approx(float(loss.detach()), rel=1e-12)
    assert row[2] == pytest.approx(float(grad.norm()), rel=1e-12)


@pytest.mark.parametrize("sizes", [[64], [16] * 4, [10, 54]])
def test_c1_a_plain_mean_is_weighted_by_the_batch(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, data = mlp().double(), points(dtype=torch.float64)
    reference, _, _ = one_step(copy.deepcopy(model), mean_loss, [data], **{"optimizer.rule": "sgd"})
    parts, _, _ = one_step(model, mean_loss, cut(data, sizes), **{"optimizer.rule": "sgd"})
    torch.testing.assert_close(parts, reference, rtol=1e-12, atol=1e-15)


def test_short_last_window_of_an_epoch_is_exact() -> None:
    data = points(10, torch.float64)
    changes = {"train.batch": 4, "train.micro_batch": 2, "optimizer.rule": "sgd", "optimizer.lr": 1.0, "train.clip": 0}
    step, feed = make_step(mlp().double(), mean_loss, data, **changes)
    windows = list(feed.windows(0, 3))
    assert [sum(len(m["y"]) for m in w) for w in windows] == [4, 4, 2]
    for window in windows[:2]:
        step.run(window)
    model = copy.deepcopy(step.state.model)
    mean_loss(model, windows[2][0]).backward()
    wanted = [p.detach() - p.grad for p in model.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in step.state.model.parameters()]
    step.run(windows[2])
    for p, q, start in zip(step.state.model.parameters(), wanted, before):
        assert not torch.equal(p, start)
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-15)


def test_window_with_nothing_to_learn_is_skipped() -> None:
    data = ragged_text(8)
    step, _ = make_step(small_gpt(), text_loss, data, **{"train.batch": 8, "optimizer.weight_decay": 0.1})
    before = state_bits(step)
    empty = {**data, "targets": torch.full_like(data["targets"], IGNORED)}
    row = dict(zip(FIELDS, step.run([empty]).tolist()))
    assert row["skipped"] == 1 and row["weight"] == 0
    assert_same_bits(state_bits(step), before)


def test_clip_limits_the_norm_that_acts() -> None:
    changes = {"optimizer.rule": "sgd", "optimizer.lr": 1.0, "train.clip": 0.01}
    model = mlp().double()
    moved, row, _ = one_step(model, mean_loss, [points(dtype=torch.float64)], **changes)
    assert row[2] > 0.01
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-9)


def test_clip_leaves_a_smaller_gradient_alone() -> None:
    torch.manual_seed(0)
    model, data = mlp().double(), [points(dtype=torch.float64)]
    free, row, _ = one_step(copy.deepcopy(model), mean_loss, data, **{"optimizer.rule": "sgd", "train.clip": 0})
    clipped, _, _ = one_step(model, mean_loss, data, **{"optimizer.rule": "sgd", "train.clip": 10 * row[2]})
    assert torch.equal(free, clipped)


def test_a_loss_that_is_not_finite_skips_even_where_its_gradient_is_finite() -> None:
    poison = torch.zeros(())

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return mean_loss(model, batch) + poison

    step, feed = make_step(mlp(), loss, points(), **{"train.batch": 8})
    windows = list(feed.windows(0, 2))
    before = state_bits(step)
    poison.fill_(float("nan"))
    assert dict(zip(FIELDS, step.run(windows[0]).tolist()))["skipped"] == 1
    assert_same_bits(state_bits(step), before)
    poison.zero_()
    assert dict(zip(FIELDS, step.run(windows[1]).tolist()))["skipped"] == 0


def test_the_whole_loss_scale_travels() -> None:
    step, _ = make_step(mlp(), mean_loss, points(), precision="fp16")
    assert step.state.scale is not None
    step.state.scale.scale.fill_(512.0)
    step.state.scale.streak.fill_(1999)
    other, feed = make_step(mlp(), mean_loss, points(), precision="fp16")
    other.state.load(step.state.snapshot({}))
    run_steps(other, feed, 1)
    assert other.state.scale is not None
    assert float(other.state.scale.scale) == 1024.0 and int(other.state.scale.streak) == 0, "2000 finite steps in a row"


POISON = [("fp32", float("nan")), ("bf16", float("inf")), ("fp16", float("nan"))]


@pytest.mark.parametrize(("precision", "value"), POISON)
def test_c4_a_skipped_step_moves_nothing(precision: str, value: float) -> None:
    changes = {
        "precision": precision,
        "schedule.lr": "warmup(5) >> linear()",
        "regularize.average": 0.9,
        "train.batch": 8,
        "train.micro_batch": 4,
    }
    step, feed = make_step(batchnorm_net(), mean_loss, points(), **changes)
    windows = list(feed.windows(0, 6))
    for window in windows[:3]:
        step.run(window)
    twin_rows, rows = [], []
    twin, _ = make_step(batchnorm_net(), mean_loss, points(), **changes)
    twin.state.load(step.state.snapshot({}))
    before = state_bits(step)
    bad = tree_map(lambda t: torch.full_like(t, value) if t.is_floating_point() else t, windows[3][1])
    row = dict(zip(FIELDS, step.run([windows[3][0], bad]).tolist()))
    after = state_bits(step)
    assert row["skipped"] == 1 and step.state.step == 4
    scale = {k for k in before if k.startswith("state/loss_scale")}
    assert_same_bits(
        {k: v for k, v in after.items() if k not in scale}, {k: v for k, v in before.items() if k not in scale}
    )
    if precision == "fp16":
        assert float(after["state/loss_scale"]) == float(before["state/loss_scale"]) / 2
        twin.state.scale.scale.copy_(step.state.scale.scale)  # type: ignore[union-attr]
        twin.state.scale.streak.copy_(step.state.scale.streak)  # type: ignore[union-attr]
    for window in windows[4:]:
        rows.append(step.run(window).tolist())
        twin_rows.append(twin.run(window).tolist())
    assert rows == twin_rows, "rates and counters go on as if the skipped step had not been"
    assert_same_bits(state_bits(step), state_bits(twin))


def test_fp16_scaling_overflows_down_and_then_trains_as_fp32() -> None:
    changes = {"precision": "fp16", "train.batch": 64, "optimizer.rule": "sgd", "optimizer.lr": 0.1}
    step, feed = make_step(mlp(), mean_loss, points(), **changes)
    step.state.scale.scale.fill_(2.0**28)  # type: ignore[union-attr]
    rows = []
    for window in feed.windows(0, 20):
        rows.append(dict(zip(FIELDS, step.run(window).tolist())))
    skipped = [row["skipped"] for row in rows]
    assert skipped[0] == 1 and sum(skipped) < 20, "it recovers"
    scales = [row["scale"] for row in rows]
    assert all(b == a / 2 if s else b >= a for a, b, s in zip(scales, scales[1:], skipped))
    assert int(step.state.applied) == 20 - sum(skipped)
    applied = [row for row in rows if not row["skipped"]]
    assert applied[-1]["loss_sum"] < applied[0]["loss_sum"]


def test_bf16_and_fp16_follow_fp32() -> None:
    finals = {}
    for precision in ("fp32", "bf16", "fp16"):
        torch.manual_seed(0)
        step, feed = make_step(mlp(), mean_loss, points(), **{"precision": precision, "train.batch": 16})
        finals[precision] = [row[0] / row[1] for row in run_steps(step, feed, 20)][-1]
    assert finals["bf16"] == pytest.approx(finals["fp32"], rel=0.05)
    assert finals["fp16"] == pytest.approx(finals["fp32"], rel=0.02)


def test_schedule_follows_applied_updates_and_ends_exactly() -> None:
    changes = {"optimizer.lr": 0.5, "schedule.lr": "warmup(4) >> linear(to=0.25)", "train.steps": 8, "train.batch": 8}
    step, feed = make_step(mlp(), mean_loss, points(), **changes)
    rates = [row[FIELDS.index("lr")] for row in run_steps(step, feed, 8)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.40625, 0.3125, 0.21875, 0.125], rel=1e-6)
    assert run_steps(step, feed, 1)[0][FIELDS.index("lr")] == rates[-1], "beyond the end the last value is held"


def test_average_follows_its_formula() -> None:
    step, feed = make_step(mlp(), mean_loss, points(), **{"regularize.average": 0.6, "train.batch": 16})
    wanted = None
    live = step.state.arenas[0].params
    wanted = live.clone()
    for t in range(1, 7):
        run_steps(step, feed, 1)
        share = 1 - min(0.6, (1 + t) / (10 + t))
        wanted = wanted + share * (live - wanted)
    average = step.state.arenas[0].averages()[0][0]
    assert average is not None
    torch.testing.assert_close(average, wanted, rtol=1e-5, atol=1e-7)
    kept = live.clone()
    with step.state.averaged():
        torch.testing.assert_close(live, wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(live, kept)


def test_c2_streams_are_named_by_step_and_micro_batch() -> None:
    """Dropout masks do not hang on what was drawn before, and differ between micro-batches and steps."""
    masks: list[torch.Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.rand(x.shape[0])
            masks.append(mask)
            return self.linear(x) * mask[:, None]

    changes = {"train.batch": 16, "train.micro_batch": 8}
    step, feed = make_step(Watching(), mean_loss, points(), **changes)
    masks.clear()
    windows = list(feed.windows(0, 3))
    for window in windows:
        torch.rand(7)  # somebody else draws
        step.run(window)
    first = [m.clone() for m in masks]
    assert len({tuple(m.tolist()) for m in first}) == 6
    masks.clear()
    step.state.step = 1
    step.run(windows[1])
    assert torch.equal(torch.stack(masks), torch.stack(first[2:4]))


class Reads(TorchDispatchMode):
    """Fails on any operator that brings a tensor's value, or a shape that hangs on it, to the host."""

    names = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_to_cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
def test_c5_the_step_reads_nothing_back(precision: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "precision": precision,
        "optimizer.rule": rule,
        "optimizer.weight_decay": 0.1,
        "regularize.average": 0.9,
        "train.batch": 16,
        "train.micro_batch": 8,
        "schedule.lr": "warmup(2) >> cosine()",
    }
    step, feed = make_step(batchnorm_net(dropout=0.1), mean_loss, points(), **changes)
    windows = list(feed.windows(0, 4))
    step.run(windows[0])

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor was read back")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with Reads() as reads:
        for window in windows[1:]:
            step.run(window)
    assert reads.seen == []


def test_the_watch_for_reads_sees_one() -> None:
    with Reads() as reads:
        float(torch.ones(()) + 1)
    assert reads.seen


def test_train_step_is_the_same_step() -> None:
    recipe = {
        "optimizer.lr": 0.01,
        "train.clip": 1.0,
        "train.micro_batch": 16,
        "precision": "fp32",
        "optimizer.weight_decay": 0.1,
    }
    torch.manual_seed(0)
    model = mlp(dropout=0.2)
    twin = copy.deepcopy(model)
    step = thalweg.TrainStep(model, mean_loss, recipe, steps=5)
    engine, feed = make_step(
        twin, mean_loss, points(), **recipe, **{"train.steps": 5, "schedule.lr": "warmup(5%) >> cosine(to=0.1)"}
    )
    for window in feed.windows(0, 5):
        whole = {k: torch.cat([part[k] for part in window]) for k in window[0]}
        result = step(whole)
        row = engine.run(window).tolist()
        assert float(result.loss) == pytest.approx(row[0] / row[1]) and float(result.lr) == row[FIELDS.index("lr")]
        assert float(result.skipped) == 0 and float(result.grad_norm) == row[2]
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a, b)
    snapshot = step.snapshot()
    other = thalweg.TrainStep(mlp(dropout=0.2), mean_loss, recipe, steps=5)
    other.load(snapshot, points())
    assert torch.equal(other.model[0].weight, model[0].weight)


def test_train_step_asks_for_the_length_of_a_schedule() -> None:
    with pytest.raises(thalweg.ThalwegError, match="length of the run"):
        thalweg.TrainStep(mlp(), mean_loss)
    thalweg.TrainStep(mlp(), mean_loss, {"schedule.lr": "constant()"})(points())


def test_mixed_dtypes_have_an_arena_each() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3).double())
    model[0].register_forward_hook(lambda m, i, o: o.double())
    step, feed = make_step(
        model, mean_loss, points(), **{"train.batch": 16, "optimizer.rule": "sgd", "train.clip": 0.01}
    )
    assert len(step.state.arenas) == 2
    before = [p.detach().clone() for p in model.parameters()]
    row = run_steps(step, feed, 1)[0]
    moved = math.sqrt(sum(float((p.detach() - q).double().square().sum()) for p, q in zip(model.parameters(), before)))
    assert moved == pytest.approx(0.01 * 0.1, rel=1e-4) and row[2] > 0.01


def test_split_cuts_along_samples() -> None:
    parts = split({"x": torch.arange(10), "scale": torch.tensor(2.0)}, 4)
    assert [len(part["x"]) for part in parts] == [4, 4, 2] and all(float(part["scale"]) == 2 for part in parts)


def test_loss_pair_may_be_a_plain_tuple() -> None:
    def pair(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

    torch.manual_seed(0)
    model = mlp()
    a, _, _ = one_step(copy.deepcopy(model), pair, [points()])
    b, _, _ = one_step(model, lambda m, batch: Loss(*pair(m, batch)), [points()])
    assert torch.equal(a, b)
