"""Gradients used and freed in the backward pass: the same run as without, and what cannot be is refused."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import thalweg
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
from thalweg.core import ModelError, Recipe, RecipeError
from thalweg.engine import Step
from thalweg.engine.release import Release, check_release
from thalweg.optim import parameter_table
from thalweg.optim.arena import update
from thalweg.rules import RULES

BASE = {"train.batch": 16, "train.clip": 0.0, "optimizer.weight_decay": 0.1}
GPT_BASE = {**BASE, "optimizer.lr": 0.01}
SINGLE = [name for name in RULES if not RULES[name].is_global and "curvature" not in RULES[name].needs]


def three_parts(err: Exception) -> list[str]:
    parts = str(err).split("\n")
    assert len(parts) >= 2, err
    return parts


def run(kind: str, passes: str, num: int = 4, **changes: Any) -> tuple[Step, list[list[float]]]:
    torch.manual_seed(0)
    made = {
        "mlp": lambda: (mlp(0.3), mean_loss, points()),
        "batchnorm": lambda: (batchnorm_net(0.3), mean_loss, points()),
        "gpt": lambda: (small_gpt(0.2), text_loss, ragged_text()),
        "tied": lambda: (tied_gpt(), text_loss, ragged_text()),
        "now and then": lambda: (NowAndThen(), mean_loss, points()),
    }
    model, loss, data = made[kind]()
    step, feed = make_step(model, loss, data, **{**BASE, **changes, "optimizer.release_gradients": passes})
    return step, run_steps(step, feed, num)


def tied_gpt() -> nn.Module:
    model = small_gpt(0.2)
    model.head.weight = model.tokens.weight
    return model


class NowAndThen(nn.Module):
    """A layer that is not used where the first number of the batch is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        used: Tensor = self.last(self.first(x) if self.training and x[0, 0] > 0 else x)
        return used


#: Torch's fused operator computes the last few elements of a tensor, beyond the width of a vector, with other roundings than the
#: rest; the models above that are compared with it have no such tensor.
def assert_same_run(kind: str, passes: str, num: int = 4, **changes: Any) -> None:
    """To the bit: weights, slots, averages, statistics; loss, skips and rate of the rows, and the norm up to rounding."""
    with_it, rows = run(kind, passes, num, **changes)
    without, expected = run(kind, "off", num, **changes)
    assert_same_bits(state_bits(with_it), state_bits(without))
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.tensor(rows)[:, [0, 1, 3, 4]], torch.tensor(expected)[:, [0, 1, 3, 4]])


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"regularize.average": 0.9, "schedule.lr": "warmup(2) >> cosine()"},
        {"optimizer.slots": "int8", "optimizer.way": "eager"},
        {"optimizer.slots": "int8", "optimizer.way": "compiled"},
        {"optimizer.slots": "bf16", "optimizer.way": "compiled"},
        {"optimizer.slots": "bf16+error", "optimizer.way": "eager"},
        {"optimizer.rule": "nadam", "optimizer.way": "compiled"},
        {"optimizer.rule": "schedule_free_adamw"},
        {"optimizer.rule": "adam_mini", "optimizer.way": "eager"},
        {"optimizer.stages": {"cautious": {}, "gradient_noise": {}}},
        {"optimizer.layer_decay": 0.7, "optimizer.groups": {"blocks.*.qkv*": {"lr": 0.1, "rule": "sgd"}}},
        {"schedule.weight_decay": "linear()", "schedule.options": {"b1": "warmup(4, start=0.5)"}},
    ],
    ids=lambda c: "-".join(map(str, c.values()))[:40] or "plain",
)
def test_the_run_is_the_same_to_the_bit(passes: str, changes: dict[str, Any]) -> None:
    assert_same_run("gpt", passes, **changes)


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("slots", ["full", "int8"])
def test_random_bits_of_rounding_are_drawn_by_the_same_numbers(passes: str, way: str, slots: str) -> None:
    assert_same_run("gpt", passes, **{"precision": "bf16-pure", "optimizer.way": way, "optimizer.slots": slots})


def test_random_bits_where_a_rule_reads_rows() -> None:
    assert_same_run("gpt", "one-pass", **{"precision": "bf16-pure", "optimizer.rule": "lamb", "optimizer.way": "eager"})


@pytest.mark.parametrize("rule", SINGLE)
def test_every_rule_that_takes_a_parameter_at_a_time(rule: str) -> None:
    found, _ = run("gpt", "one-pass", 3, **{"optimizer.rule": rule, "optimizer.lr": 1e-3})
    expected, _ = run("gpt", "off", 3, **{"optimizer.rule": rule, "optimizer.lr": 1e-3})
    a, b = state_bits(found), state_bits(expected)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
@pytest.mark.parametrize("kind", ["batchnorm", "tied", "now and then"])
def test_statistics_tied_weights_and_layers_that_are_not_always_used(kind: str, passes: str) -> None:
    assert_same_run(kind, passes, num=6, **{"regularize.average": 0.9, "optimizer.way": "eager"})


def test_a_layer_that_is_not_used_in_a_step_still_decays() -> None:
    step, _ = run("now and then", "one-pass", 0)
    model = step.state.model
    before = model.first.weight.detach().clone()  # type: ignore[union-attr, operator]
    x = -torch.ones(16, 6)
    step.run([{"x": x, "y": torch.zeros(16, dtype=torch.int64)}])
    torch.testing.assert_close(model.first.weight.detach(), before * (1 - 1e-3 * 0.1))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [{"train.clip": 0.5}, {"train.clip": 1.0, "train.clip_history": 0.5}, {"precision": "fp16", "train.clip": 0.5}],
    ids=["clip", "clip_history", "fp16"],
)
def test_two_passes_clip_and_scale_as_one_that_keeps_gradients(changes: dict[str, Any]) -> None:
    found, rows = run("gpt", "two-pass", 6, **{**changes, "optimizer.rule": "sgd", "optimizer.lr": 0.1})
    expected, others = run("gpt", "off", 6, **{**changes, "optimizer.rule": "sgd", "optimizer.lr": 0.1})
    assert max(row[2] for row in others) > 0.5, "something is clipped"
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(others), rtol=2e-3, atol=1e-6)
    a, b = state_bits(found), state_bits(expected)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-5)


def poisoned(model: nn.Module, batch: Any) -> Tensor:
    """A loss that is finite, and infinite gradients of the first layer alone where the batch says so."""
    hidden = model[0](batch["x"])
    if batch["x"][0, 0] > 1e3:
        hidden = Poison.apply(hidden)
    return F.cross_entropy(model[3](model[1](hidden)), batch["y"])


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / x.abs().amax().detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * float("inf")


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
def test_what_a_gradient_that_is_not_finite_moves(passes: str) -> None:
    model = mlp()
    step, _ = make_step(model, poisoned, points(), **BASE, **{"optimizer.release_gradients": passes})
    batch = {"x": torch.full((16, 6), 2e3), "y": torch.zeros(16, dtype=torch.int64)}
    before = {name: value.clone() for name, value in state_bits(step).items()}
    row = dict(zip(step.fields, step.run([batch]).tolist()))
    after = state_bits(step)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert row["grad_norm"] != row["grad_norm"] or row["grad_norm"] == float("inf")
    if passes == "two-pass":
        assert row["skipped"] == 1 and not moved
    else:
        assert row["skipped"] == 0
        assert {"weights/3.weight", "weights/3.bias", "state/applied"} <= moved
        assert not any(name.endswith(("/0.weight", "/0.bias")) for name in moved)


def test_one_pass_moves_nothing_where_the_loss_is_not_finite() -> None:
    step, _ = make_step(mlp(), mean_loss, points(), **BASE, **{"optimizer.release_gradients": "one-pass"})
    before = {name: value.clone() for name, value in state_bits(step).items()}
    row = dict(
        zip(step.fields, step.run([{"x": torch.full((16, 6), float("inf")), "y": torch.zeros(16).long()}]).tolist())
    )
    assert row["skipped"] == 1
    assert_same_bits(state_bits(step), before)


@pytest.mark.parametrize("rule", ["nadam", "schedule_free_adamw"])
def test_a_number_that_a_segment_shares_moves_once_though_one_of_its_tensors_is_skipped(rule: str) -> None:
    changes = {**BASE, "optimizer.rule": rule, "optimizer.release_gradients": "one-pass", "optimizer.weight_decay": 0.0}
    steps = [make_step(mlp(), poisoned, points(), **changes)[0] for _ in range(2)]
    for step, size in zip(steps, (2e3, 1.0)):
        step.run([{"x": torch.full((16, 6), size), "y": torch.zeros(16, dtype=torch.int64)}])
    for arena, other in zip(*(step.state.arenas for step in steps)):
        shared = [
            s.batch.slots[k][0]
            for s in arena.segments
            for k, part in enumerate(s.program.parts)
            if part.shape == "uniform"
        ]
        told = [
            s.batch.slots[k][0]
            for s in other.segments
            for k, part in enumerate(s.program.parts)
            if part.shape == "uniform"
        ]
        assert shared and all(torch.equal(a, b) for a, b in zip(shared, told))


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
def test_gradients_are_freed_as_they_come(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer's own backward pass, no gradient of a layer behind it is alive."""
    alive: list[int] = []
    held: list[weakref.ref[Tensor]] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.register_hook(lambda g: alive.append(sum(ref() is not None for ref in held)))
            return x

    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), Watch()) for _ in range(6)]
    model = nn.Sequential(nn.Linear(6, 64), *layers, nn.Linear(64, 3))
    step, feed = make_step(model, mean_loss, points(), **BASE, **{"optimizer.release_gradients": passes})
    use = Release._update

    def noted(self: Release, piece: Any, g: Tensor, *more: Any) -> None:
        held.append(weakref.ref(g))
        use(self, piece, g, *more)

    monkeypatch.setattr(Release, "_update", noted)
    run_steps(step, feed, 1)
    assert len(held) >= 10 and alive and max(alive) <= 2
    assert all(p.grad is None for p in model.parameters())
    assert step.state.nbytes()["gradients"] == 0 and all(not arena.grads.numel() for arena in step.state.arenas)


def test_the_model_has_no_hooks_outside_of_a_step() -> None:
    step, _ = run("mlp", "one-pass", 2)
    model = step.state.model
    weight = model[0].weight  # type: ignore[index]
    before = weight.detach().clone()
    mean_loss(model, points()).backward()
    assert weight.grad is not None and torch.equal(weight.detach(), before)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]


def test_checkpoints_fit_runs_with_and_without() -> None:
    changes = {"optimizer.slots": "int8", "regularize.average": 0.9}
    whole, _ = run("gpt", "off", 6, **changes)
    for first, then in (("off", "one-pass"), ("two-pass", "off")):
        half, _ = run("gpt", first, 3, **changes)
        other, _ = run("gpt", then, 0, **changes)
        other.state.load(half.state.snapshot({}))
        torch.manual_seed(0)
        _, feed = make_step(small_gpt(0.2), text_loss, ragged_text(), **BASE, **changes)
        run_steps(other, feed, 3)
        assert_same_bits(state_bits(other), state_bits(whole))


class Shared(nn.Module):
    """One layer in two stretches of a pass that are computed again in the backward pass, the old way."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.last, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        last: Tensor = self.last(x)
        return last


def test_recomputation_with_a_shared_layer() -> None:
    changes = {**BASE, "optimizer.way": "eager"}
    states = []
    for passes in ("one-pass", "off"):
        torch.manual_seed(0)
        step, feed = make_step(Shared(False), mean_loss, points(), **{**changes, "optimizer.release_gradients": passes})
        run_steps(step, feed, 3)
        states.append(state_bits(step))
    assert_same_bits(*states)


def test_a_gradient_that_comes_twice_is_an_error() -> None:
    step, _ = make_step(Shared(False), mean_loss, points(), **BASE, **{"optimizer.release_gradients": "two-pass"})
    step.state.model.reentrant = True  # type: ignore[assignment]
    before = {name: value.clone() for name, value in state_bits(step).items()}
    with pytest.raises(ModelError) as caught:
        step.run([points(16)])
    assert "'inner.weight' came twice" in str(caught.value) or "'inner.bias' came twice" in str(caught.value)
    assert "use_reentrant=False" in three_parts(caught.value)[-1]
    assert_same_bits(state_bits(step), before)
    assert not any(arena.torn for arena in step.state.arenas)


def test_an_error_in_the_middle_leaves_the_mark_of_a_half_moved_state() -> None:
    step, feed = make_step(mlp(), mean_loss, points(), **BASE, **{"optimizer.release_gradients": "one-pass"})
    run_steps(step, feed, 1)
    assert not any(arena.torn for arena in step.state.arenas)

    def fail(g: Tensor) -> Tensor:
        raise ValueError("in the middle")

    def broken(model: nn.Module, batch: Any) -> Tensor:
        hidden = model[0](batch["x"])
        hidden.register_hook(fail)
        return F.cross_entropy(model[3](hidden), batch["y"])

    step.loss = broken
    with pytest.raises(ValueError, match="in the middle"):
        step.run([points(16)])
    assert any(arena.torn for arena in step.state.arenas)
    assert all(p.grad is None for p in step.state.model.parameters())


def refusal(**changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make_step(mlp(), mean_loss, points(), **{**BASE, "optimizer.release_gradients": "one-pass", **changes})
    return three_parts(caught.value)


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"train.micro_batch": 8},
            ("several micro-batches", "train.batch=16, train.micro_batch=8", "train.micro_batch=16"),
        ),
        ({"regularize.sharpness": 0.05}, ("sharpness-aware", "all gradients at once", "regularize.sharpness=0")),
        ({"optimizer.rule": "prodigy"}, ("the rule prodigy", "all gradients at once", "such as adamw")),
        ({"optimizer.rule": "d_adapt_adam"}, ("the rule d_adapt_adam", "all gradients at once", "such as adamw")),
    ],
    ids=["micro-batch", "sharpness", "prodigy", "d-adaptation"],
)
def test_refused_in_one_pass_and_in_two(passes: str, changes: dict[str, Any], told: tuple[str, ...]) -> None:
    parts = refusal(**changes, **{"optimizer.release_gradients": passes})
    assert all(text in "\n".join(parts) for text in (*told, f"'{passes}'", "release_gradients='off'"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.clip": 1.0}, ("with clipping", "train.clip=1", "Give train.clip=0")),
        ({"train.clip_history": 2.5}, ("with clipping", "train.clip_history=2.5", "Give train.clip_history=0")),
        ({"precision": "fp16"}, ("with a loss scale", "precision='fp16'", "precision='bf16'")),
    ],
    ids=["clip", "clip_history", "fp16"],
)
def test_refused_in_one_pass_alone(changes: dict[str, Any], told: tuple[str, ...]) -> None:
    text = "\n".join(refusal(**changes))
    assert all(part in text for part in (*told, "release_gradients='two-pass'"))
    make_step(mlp(), mean_loss, points(), **{**BASE, **changes, "optimizer.release_gradients": "two-pass"})


def test_own_loop_with_batches_that_are_cut_is_refused_at_the_call() -> None:
    recipe = {
        "train.batch": 8,
        "train.clip": 0.0,
        "optimizer.release_gradients": "one-pass",
        "schedule.lr": "constant()",
    }
    step = thalweg.TrainStep(mlp(), mean_loss, {**recipe, "precision": "fp32", "train.micro_batch": 8})
    step(points(8))
    with pytest.raises(RecipeError) as caught:
        step(points(20))
    assert "This window has 3" in str(caught.value) and "at most train.micro_batch" in str(caught.value)


@pytest.mark.parametrize("passes", ["one-pass", "two-pass"])
def test_the_plan_says_what_it_means(passes: str) -> None:
    told: list[tuple[str, Any, str]] = []
    recipe = Recipe().override({**BASE, "optimizer.release_gradients": passes, "precision": "fp32"})
    rows = parameter_table(mlp(), optimizer=recipe.optimizer)
    check_release(recipe, "cpu", rows, lambda *one: told.append(one))
    ((path, value, why),) = told
    assert (path, value) == ("optimizer.release_gradients", passes)
    assert ("not finite stays as it is" in why) if passes == "one-pass" else ("twice" in why)


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    changes = {"optimizer.release_gradients": "two-pass", "train.clip": 0.5, "optimizer.slots": "int8"}
    recipe = {**BASE, **changes, "precision": "fp32", "train.steps": 6, "checkpoint.every": 3, "device": "cpu"}
    given = (lambda: small_gpt(0.2), text_loss, ragged_text(), recipe)
    whole = thalweg.train(*given, folder=tmp_path / "run")
    again = thalweg.train(*given, folder=tmp_path / "run", resume=3)
    assert_same_bits(dict(whole.model.named_parameters()), dict(again.model.named_parameters()))


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("way", ["eager", "stacked"])
def test_memory_that_runs_out_in_an_update_leaves_no_weight_without_its_slots(
    way: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "muon" if way == "stacked" else "adamw"
    changes = {**BASE, "optimizer.rule": rule, "optimizer.way": way, "optimizer.options": {}, "precision": "fp32"}
    step, _ = make_step(nn.Linear(6, 3, bias=False), mean_loss, points(), **changes)
    before = {name: value.clone() for name, value in state_bits(step).items()}
    (arena,) = step.state.arenas
    calls = iter(range(1, 100))
    choose = torch.where

    def short(*given: Any, **more: Any) -> Tensor:
        if next(calls) == at:
            raise torch.OutOfMemoryError("none left")
        return choose(*given, **more)

    arena.grads.fill_(1.0)
    one = torch.ones(())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "where", short)
        try:
            update([arena], lr=one, t=one, divisor=one, skipped=torch.zeros(()))
        except torch.OutOfMemoryError:
            assert arena.torn
            arena.torn = False  # such a state is not saved; here it is looked at
            assert_same_bits(state_bits(step), before)
        else:
            assert next(calls) <= at and not arena.torn, "the update took less memory than that, and went through"
