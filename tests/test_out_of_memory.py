"""Memory runs out in a step: it is undone and done again in smaller micro-batches, and the run ends as it would have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thalweg
from benchmarks.out_of_memory import ROOM, Faults, difference, limited, operators, train
from tests.conftest import three_parts
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
from thalweg.core import CheckpointError, Loss, OutOfMemoryError, Split, read_lines
from thalweg.device import memory, ran_out
from thalweg.engine import evaluate
from thalweg.engine.portions import TRIES, evenly, uncuttable
from thalweg.engine.undo import Undo
from thalweg.optim.bound import Bound
from thalweg.run import RunFolder
from thalweg.watch import Memory


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Collecting garbage takes a quarter of a second: counted in place of done, where nothing is really short."""
    calls: list[int] = []
    monkeypatch.setattr(memory, "release", lambda device, **_: calls.append(1))
    return calls


def forced(
    model: nn.Module,
    loss: Callable[..., Any],
    data: Any,
    fails: Callable[[int, int], bool],
    num: int,
    *,
    seed: int = 0,
    share: tuple[float, float] = (0.0, 1.0),
    **changes: Any,
) -> Any:
    """A step after ``num`` steps in which micro-batches fail; ``share``: where in their passes."""
    faults = Faults(fails, seed, share)
    step, feed = make_step(model, faults.loss(loss), data, **changes)
    faults.begin(operators(step.state.model, loss, {name: part[:4] for name, part in data.items()}))
    rows = []
    for window in feed.windows(0, num):
        with faults:
            rows.append(step.run(window).tolist())
    return step, rows, faults


def above(most: int) -> Callable[[int, int], bool]:
    return lambda attempt, num: num > most


# --- which errors are meant -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("err", "meant"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not execute a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (ValueError("out of memory of the past"), False),
        (OutOfMemoryError("a", "out of memory", "c"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(err: BaseException, meant: bool) -> None:
    assert ran_out(err) is meant


def test_a_tensor_that_is_too_large_is_found_out() -> None:
    with pytest.raises(RuntimeError) as err:
        torch.empty(1 << 55)
    assert ran_out(err.value)


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "gpt"])
@pytest.mark.parametrize("seed", range(20))
def test_every_seventh_micro_batch_fails_and_the_run_is_the_same(name: str, seed: int) -> None:
    """Anywhere in the passes, in the middle of the backward pass too. A size that went through is tried again: same bits."""
    common: dict[str, Any] = {"steps": 4, "batch": 32, "micro_batch": 8}
    free, _, _ = train(name, seed, torch.float32, **common)
    got, step, struck = train(name, seed, torch.float32, fails=lambda attempt, num: attempt % 7 == 0, **common)
    assert struck >= 2 and step.state.limit.most == 0
    assert torch.equal(got, free)


@pytest.mark.parametrize("name", ["digits", "gpt"])
@pytest.mark.parametrize("seed", range(20))
def test_smaller_micro_batches_end_at_the_same_weights(name: str, seed: int) -> None:
    """Dropout is keyed by sample: but for the order of sums it does not matter how a window is cut."""
    most = (1, 3, 8, 16)[seed % 4]
    common: dict[str, Any] = {"steps": 3, "batch": 32, "micro_batch": 32}
    free, untouched, _ = train(name, seed, torch.float64, **common)
    got, step, struck = train(name, seed, torch.float64, fails=above(most), **common)
    assert struck >= 1 and 0 < step.state.limit.most <= most
    assert difference(got, free) < 1e-12
    assert step.state.step == untouched.state.step == 3
    assert int(step.state.applied) == int(untouched.state.applied) == 3


FORMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain dropout": (lambda: mlp(0.3), mean_loss, {}),
    "batch normalization": (lambda: batchnorm_net(0.3), mean_loss, {}),
    "average": (lambda: batchnorm_net(0.3), mean_loss, {"regularize.average": 0.9}),
    "sharpness": (lambda: batchnorm_net(0.3), mean_loss, {"regularize.sharpness": 0.05}),
    "fp16": (lambda: batchnorm_net(0.3), mean_loss, {"precision": "fp16"}),
    "history": (lambda: mlp(0.3), mean_loss, {"train.clip_history": 2.5}),
}


@pytest.mark.parametrize("share", [(0.0, 0.2), (0.45, 1.0)], ids=["forward", "backward"])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_cut_at_its_beginning_is_the_run_of_smaller_micro_batches(
    form: str, share: tuple[float, float]
) -> None:
    """To the bit, in all of its state: streams are named anew, statistics count each sample once."""
    model, loss, changes = FORMS[form]
    changes = {"train.batch": 32, "regularize.by_sample": False, **changes}
    torch.manual_seed(0)
    small, feed = make_step(model(), loss, points(), **changes, **{"train.micro_batch": 8})
    rows = run_steps(small, feed, 3)
    torch.manual_seed(0)
    cut, got, faults = forced(model(), loss, points(), above(8), 3, share=share, **changes, **{"train.micro_batch": 32})
    assert faults.struck == 2 and cut.state.limit.most == 8
    assert got == rows
    mine, theirs = state_bits(cut), state_bits(small)
    assert_same_bits(mine, theirs)


def test_a_failure_in_the_second_pass_of_sharpness_leaves_the_weights_where_they_were() -> None:
    """Attempts 1 and 2 are the window at the weights, 3 the neighbour's first: it fails; nothing is counted twice."""
    changes = {"train.batch": 32, "train.micro_batch": 16, "regularize.sharpness": 0.05}
    torch.manual_seed(0)
    free, feed = make_step(batchnorm_net(0.3), mean_loss, points(), **changes)
    rows = run_steps(free, feed, 2)
    torch.manual_seed(0)
    step, got, faults = forced(
        batchnorm_net(0.3), mean_loss, points(), lambda attempt, num: attempt in (3, 7), 2, share=(0.6, 1.0), **changes
    )
    assert faults.struck == 2 and got == rows
    assert_same_bits(state_bits(step), state_bits(free))


def test_an_error_at_the_neighbour_leaves_the_weights_that_were() -> None:
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: Any) -> Any:
        if begun_by(model) and next(calls) == 1:
            raise ZeroDivisionError
        return mean_loss(model, batch)

    step, feed = make_step(mlp(), loss, points(), **{"train.batch": 8, "regularize.sharpness": 0.05})
    before = state_bits(step)
    with pytest.raises(ZeroDivisionError):
        run_steps(step, feed, 1)
    assert_same_bits(state_bits(step), before)


def test_a_failure_while_a_micro_batch_is_counted_counts_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients and its loss have been added already when memory runs out."""
    changes = {"train.batch": 32, "train.micro_batch": 8}
    torch.manual_seed(0)
    free, feed = make_step(batchnorm_net(), mean_loss, points(), **changes)
    rows = run_steps(free, feed, 2)
    torch.manual_seed(0)
    step, feed = make_step(batchnorm_net(), mean_loss, points(), **changes)
    whole, calls = step._collect, iter(range(10**6))

    def collect(*words: Any, **named: Any) -> None:
        whole(*words, **named)
        if next(calls) in (2, 5, 7):
            raise MemoryError

    monkeypatch.setattr(step, "_collect", collect)
    assert run_steps(step, feed, 2) == rows
    assert_same_bits(state_bits(step), state_bits(free))


class Twice(nn.Module):
    """One layer of batch normalization, used twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.b(self.norm(F.relu(self.norm(self.a(x))) + 1))


class Spectral(nn.Module):
    """Its forward pass moves buffers that are nobody's running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
        self.b = nn.Linear(8, 3)
        self.register_buffer("still", torch.ones(3))

    def forward(self, x: Any) -> Any:
        return self.b(self.norm(self.a(x).view(-1, 2, 4)).flatten(1)) * self.still


@pytest.mark.parametrize("model", [Twice, Spectral])
@pytest.mark.parametrize("seed", range(6))
def test_what_a_broken_pass_left_in_buffers_is_taken_back(model: Any, seed: int) -> None:
    changes = {"train.batch": 32, "train.micro_batch": 8}
    torch.manual_seed(0)
    free, feed = make_step(model(), mean_loss, points(), **changes)
    rows = run_steps(free, feed, 4)
    torch.manual_seed(0)
    step, got, faults = forced(
        model(), mean_loss, points(), lambda attempt, num: attempt > 1 and attempt % 3 == 0, 4, seed=seed, **changes
    )
    assert faults.struck >= 4 and got == rows
    assert_same_bits(state_bits(step), state_bits(free))


def test_one_failure_in_a_backward_pass_costs_the_window_and_the_next_one_a_micro_batch() -> None:
    """Eight micro-batches; attempts 6 and 12 fail in the backward pass: 5 are done again, then 1."""
    changes = {"train.batch": 64, "train.micro_batch": 8}
    fails = lambda attempt, num: attempt in (6, 12)
    _, _, faults = forced(small_gpt(), text_loss, ragged_text(), fails, 1, share=(0.6, 0.9), **changes)
    assert faults.struck == 2
    assert faults.attempts == 8 + 6 + 1


def test_a_failure_in_a_forward_pass_costs_one_micro_batch_and_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*words: Any) -> None:
        raise AssertionError("the gradients were copied")

    monkeypatch.setattr(Undo, "keep", never)
    fails = lambda attempt, num: attempt == 6
    changes = {"train.batch": 64, "train.micro_batch": 8}
    _, _, faults = forced(batchnorm_net(), mean_loss, points(), fails, 1, share=(0.0, 0.1), **changes)
    assert faults.struck == 1 and faults.attempts == 9


def test_where_no_copy_fits_the_window_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Undo, "keep", lambda self, before: None)
    fails = lambda attempt, num: num == 8 and attempt % 5 == 0
    changes = {"train.batch": 64, "train.micro_batch": 8, "regularize.by_sample": True}
    step, _, _ = forced(small_gpt(0.1), text_loss, ragged_text(), fails, 2, share=(0.6, 0.9), **changes)
    assert step.state.limit.most == 4 and step.state.step == 2


def test_a_step_after_a_failure_runs_the_operators_that_it_always_ran(no_collection: list[int]) -> None:
    """Nothing is copied or collected while nothing fails, also not in a run that has met a failure before."""
    counts = []
    for fails in (lambda attempt, num: False, lambda attempt, num: attempt == 4):
        step, _, faults = forced(
            batchnorm_net(),
            mean_loss,
            points(),
            fails,
            2,
            share=(0.9, 1.0),
            **{"train.batch": 32, "train.micro_batch": 8},
        )
        (window,) = make_step(mlp(), mean_loss, points(), **{"train.batch": 32, "train.micro_batch": 8})[1].windows(
            2, 3
        )
        step.loss, faults.count, collected = mean_loss, 0, len(no_collection)
        with faults:
            step.run(window)
        counts.append(faults.count)
        assert len(no_collection) == collected
    assert faults.struck == 1 and counts[0] == counts[1]


# --- telling ----------------------------------------------------------------------------------------------------------


def test_a_cut_is_told_with_what_follows_the_split() -> None:
    seen = Memory()
    loss = failing(mean_loss, lambda num: num > 8)
    recipe = {"train.steps": 3, "train.batch": 32, "precision": "fp32", "evaluate.every": 0}
    thalweg.train(batchnorm_net(0.3), loss, points(), recipe, sinks=[seen])
    told = [event for event in seen.events if event.name == "out of memory"]
    assert [event.detail["most"] for event in told] == [16, 8]
    assert all("forward pass of" in event.text and "the batch stays what it is" in event.text for event in told)
    assert "regularize.by_sample" in told[1].text and "regularize.ghost" in told[1].text
    assert "micro-batch of 8 samples" in told[1].text


def test_a_cut_that_changes_nothing_names_nothing() -> None:
    seen = Memory()
    recipe = {"train.steps": 2, "train.batch": 32, "precision": "fp32", "regularize.by_sample": True}
    thalweg.train(mlp(0.3), failing(mean_loss, lambda num: num > 16), points(), recipe, sinks=[seen])
    (told,) = [event for event in seen.events if event.name == "out of memory"]
    assert "follows the split" not in told.text and "follows" not in told.detail


def test_tries_at_the_same_size_are_told_at_ever_greater_intervals() -> None:
    calls = iter(range(10**6))
    seen = Memory()
    loss = failing(mean_loss, lambda num: next(calls) % 3 == 2)
    recipe = {"train.steps": 20, "train.batch": 16, "train.micro_batch": 8, "precision": "fp32", "evaluate.every": 0}
    thalweg.train(mlp(), loss, points(), recipe, sinks=[seen])
    told = [event.detail["times"] for event in seen.events if event.name == "out of memory"]
    assert told[:4] == [1, 2, 4, 8] and len(told) <= 5


def failing(loss: Callable[..., Any], fails: Callable[[int], bool]) -> Callable[..., Any]:
    """A loss that runs out of memory in training, but not in the checks before step 0."""
    begun = []

    def wrapped(model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled() and isinstance(begun_by(model), Arena_):
            begun.append(1)
            if fails(len(batch["y"])):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(model, batch)

    return wrapped


class Arena_:
    """Marks a model whose parameters have been laid out for training."""


def begun_by(model: nn.Module) -> Any:
    """Training has begun where gradients are views of a flat buffer."""
    grad = next(model.parameters()).grad
    return Arena_() if grad is not None and grad._is_view() else None


# --- checkpoints ------------------------------------------------------------------------------------------------------

BASE = {
    "precision": "fp32",
    "train.steps": 8,
    "train.batch": 16,
    "optimizer.lr": 0.01,
    "schedule.lr": "warmup(2) >> cosine(to=0.1)",
    "checkpoint.every": 3,
    "evaluate.every": 4,
}


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    snapshot = RunFolder(folder).store.load(step)
    return {f"{group}/{name}": t for group, tensors in snapshot.groups.items() for name, t in tensors.items()}


def test_the_smaller_size_comes_back_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process never runs out: it must take the smaller size from the checkpoint to get the same bits."""
    data = Split(train=points(50), test=points(20, seed=1))
    loss = failing(mean_loss, lambda num: num > 5)
    make = lambda: batchnorm_net(0.3)
    torch.manual_seed(0)
    whole = thalweg.train(make, loss, data, BASE, folder=tmp_path / "whole")
    broken = iter(range(10**6))

    def breaking(model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled() and begun_by(model) and next(broken) == 26:
            raise ZeroDivisionError
        return loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        thalweg.train(make, breaking, data, BASE, folder=tmp_path / "half")
    at = RunFolder(tmp_path / "half").store.steps()[-1]
    assert 3 <= at < 8
    seen = Memory()
    thalweg.train(make, mean_loss, data, BASE, folder=tmp_path / "half", resume=True, sinks=[seen])
    assert any("Memory ran out earlier" in event.text and " 4 samples" in event.text for event in seen.events)
    assert_same_bits(weights(tmp_path / "half", 8), weights(tmp_path / "whole", 8))
    assert RunFolder(tmp_path / "half").store.load(8).facts["most_samples"] == {"micro-batch": 4}
    lines = [line for line in read_lines(tmp_path / "whole" / "records.jsonl") if line.get("name") == "out of memory"]
    assert [line["most"] for line in lines] == [8, 4] and {line["step"] for line in lines} == {1}
    assert "Memory ran out in the forward pass of 16 samples" in (tmp_path / "whole" / "report.html").read_text()
    assert whole.records[-1].step == 8


def test_at_one_sample_the_run_ends_with_an_error_and_its_last_state_is_kept(tmp_path: Path) -> None:
    steps = iter(range(10**6))
    loss = failing(mean_loss, lambda num: next(steps) >= 2)
    with pytest.raises(OutOfMemoryError) as err:
        thalweg.train(mlp, loss, points(), {**BASE, "checkpoint.every": 0}, folder=tmp_path / "run")
    asked, numbers, remedy = three_parts(err.value)
    assert "one sample" in asked
    assert f"{TRIES} tries" in numbers and "free on cpu" in numbers and "CUDA out of memory" in numbers
    assert "recompute" in remedy and "precision" in remedy
    assert RunFolder(tmp_path / "run").store.steps() == [2]
    again = thalweg.train(
        mlp, mean_loss, points(), {**BASE, "checkpoint.every": 0}, folder=tmp_path / "run", resume=True
    )
    assert again.records[0].step == 3 and again.records[-1].step == 8


def test_a_batch_that_cannot_be_cut_is_tried_and_refused() -> None:
    data = {**points(), "y": torch.randint(0, 3, (64,))}

    class Listed(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return {"x": data["x"][index], "y": data["y"][index], "name": f"sample {index}"}

    with pytest.raises(OutOfMemoryError) as err:
        thalweg.train(mlp, failing(mean_loss, lambda num: True), Listed(), {**BASE, "train.batch": 8})
    asked, _, remedy = three_parts(err.value)
    assert "8 samples, which cannot be cut: it holds a list" in asked and "train.batch" in remedy


def test_a_portion_too_small_for_the_model_says_so() -> None:
    with pytest.raises(OutOfMemoryError) as err:
        loss = failing(mean_loss, lambda num: num > 1)
        thalweg.train(batchnorm_net, loss, points(), {**BASE, "train.batch": 8})
    asked, numbers, remedy = three_parts(err.value)
    assert "over 8 samples, and 1 do not go through" in asked
    assert "more than 1 value per channel" in numbers and "recompute" in remedy


# --- the update -------------------------------------------------------------------------------------------------------


def test_a_failure_in_the_update_is_not_saved_as_a_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = Bound.__call__, iter(range(10**6))

    def run(self: Bound, due: int) -> None:
        if next(calls) == 4:
            next(iter(self.arenas[0].places.values()))[1].data.add_(1)  # half of it
            raise torch.OutOfMemoryError("CUDA out of memory.")
        whole(self, due)

    monkeypatch.setattr(Bound, "__call__", run)
    seen = Memory()
    with pytest.raises(OutOfMemoryError) as err:
        thalweg.train(mlp, mean_loss, points(), BASE, folder=tmp_path / "run", sinks=[seen])
    asked, numbers, remedy = three_parts(err.value)
    assert "update of the weights" in asked and "not saved" in numbers and "last checkpoint" in remedy
    assert RunFolder(tmp_path / "run").store.steps() == [3]
    assert any(event.name == "not saved" for event in seen.events)
    monkeypatch.undo()
    torch.manual_seed(0)
    thalweg.train(mlp, mean_loss, points(), BASE, folder=tmp_path / "run", resume=True)
    thalweg.train(mlp, mean_loss, points(), BASE, folder=tmp_path / "free")
    assert_same_bits(weights(tmp_path / "run", 8), weights(tmp_path / "free", 8))


def test_a_step_after_a_half_moved_update_is_refused_until_a_state_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    step, feed = make_step(mlp(), mean_loss, points(), **{"train.batch": 8})
    first, second = feed.windows(0, 2)
    step.run(first)
    good = step.state.snapshot({})
    kept = {group: {n: t.clone() for n, t in tensors.items()} for group, tensors in good.groups.items()}

    def broken(*words: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Bound, "__call__", broken)
    with pytest.raises(OutOfMemoryError):
        step.run(second)
    monkeypatch.undo()
    for act in (lambda: step.run(second), lambda: step.state.snapshot({})):
        with pytest.raises(CheckpointError) as err:
            act()
        assert "broke off" in three_parts(err.value)[0]
    step.state.load(type(good)(kept, good.facts))
    step.run(second)
    assert step.state.step == 2


def test_memory_that_runs_out_before_the_update_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step, feed = make_step(batchnorm_net(), mean_loss, points(), **{"train.batch": 8})
    first, second = feed.windows(0, 2)
    step.run(first)
    before = state_bits(step)

    def broken(*words: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.linalg, "vector_norm", broken)
    with pytest.raises(OutOfMemoryError) as err:
        step.run(second)
    assert "nothing of this step has been applied" in three_parts(err.value)[2]
    assert_same_bits(state_bits(step), before)


# --- evaluation, and a loop of one's own ------------------------------------------------------------------------------


def test_an_evaluation_goes_on_in_smaller_batches(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Loss:
        if not model.training and begun_by(model) and len(batch["y"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Loss(F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))

    def metrics(model: nn.Module, batch: Any) -> dict[str, Any]:
        right = model(batch["x"]).argmax(1) == batch["y"]
        return {"accuracy": (right.sum(), len(right))}

    def plain(model: nn.Module, batch: Any) -> Loss:
        return Loss(F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))

    data = Split(train=points(50), test=points(21, seed=1))
    recipe = {**BASE, "evaluate.batch": 16}
    seen = Memory()
    got = thalweg.train(mlp, loss, data, recipe, metrics=metrics, folder=tmp_path / "run", sinks=[seen])
    free = thalweg.train(mlp, plain, data, recipe, metrics=metrics)
    for mine, theirs in zip(got.evaluations, free.evaluations):
        assert mine.metrics == pytest.approx(theirs.metrics, rel=1e-6)
    assert [r.loss for r in got.records] == [r.loss for r in free.records]
    told = [event for event in seen.events if event.name == "out of memory"]
    assert [event.detail["most"] for event in told] == [8, 4, 2] and "evaluation" in told[0].text
    assert RunFolder(tmp_path / "run").store.load(8).facts["most_samples"] == {"batch of an evaluation": 2}


def test_an_evaluation_of_one_sample_that_does_not_fit_is_an_error() -> None:
    step, _ = make_step(mlp(), mean_loss, points(), **{"train.batch": 8})

    def never(model: nn.Module, batch: Any) -> Any:
        raise MemoryError

    with pytest.raises(OutOfMemoryError) as err:
        evaluate(step.state, thalweg.data.as_source(points(8)), never, None, step.policy, batch=8)
    assert "one sample" in three_parts(err.value)[0] and "an evaluation" in err.value.numbers


def test_a_loop_of_ones_own_is_warned() -> None:
    step = thalweg.TrainStep(
        mlp(0.3), failing(mean_loss, lambda num: num > 8), {"train.batch": 32, "precision": "fp32"}, steps=4
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step(points(32))
    texts = [str(one.message) for one in told]
    assert len(texts) == 2 and "at most 16" in texts[0] and "at most 8" in texts[1] and "by_sample" in texts[1]
    assert step.snapshot().facts["most_samples"] == {"micro-batch": 8}
    step(points(32, seed=1))


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 13, 24, 33])
@pytest.mark.parametrize("grain", [1, 4, 8])
@pytest.mark.parametrize("most", [1, 2, 5, 8, 16])
def test_portions_are_even_and_hold_every_sample(size: int, most: int, grain: int) -> None:
    x = torch.arange(size)
    parts = evenly({"x": x, "scale": torch.tensor(2.0)}, most, grain)
    assert torch.equal(torch.cat([part["x"] for part in parts]), x)
    sizes = [len(part["x"]) for part in parts]
    assert all(part["scale"] == 2.0 for part in parts) and max(sizes) <= most
    if size > most >= grain:
        assert all(num % grain == 0 for num in sizes[:-1])
    if grain == 1:
        assert max(sizes) - min(sizes) <= 1


def test_ghost_batches_stay_whole_as_long_as_they_can() -> None:
    torch.manual_seed(0)
    changes = {"train.batch": 32, "regularize.ghost": 4, "regularize.by_sample": True}
    free, feed = make_step(batchnorm_net(0.3).double(), mean_loss, points(dtype=torch.float64), **changes)
    run_steps(free, feed, 2)
    torch.manual_seed(0)
    model = batchnorm_net(0.3).double()
    step, _, _ = forced(model, mean_loss, points(dtype=torch.float64), above(5), 2, **changes)
    assert step.state.limit.grain == 4 and step.state.limit.most == 4
    for name, mine in state_bits(step).items():
        torch.testing.assert_close(mine, state_bits(free)[name], rtol=1e-9, atol=1e-12)


def test_what_cannot_be_cut_is_found() -> None:
    assert uncuttable({"x": torch.zeros(4), "mask": None, "rate": 0.5, "kind": "image"}) == ""
    assert "5 rows" in uncuttable([torch.zeros(4), torch.zeros(5)])
    assert uncuttable((torch.zeros(4), ["a", "b", "c", "d"])) == "it holds a list"
    assert uncuttable({"x": torch.zeros(4), "graph": object()}) == "it holds a object"


# --- release of gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one-pass", "two-pass"])
def test_released_gradients_are_tried_again_whole_until_weights_move(form: str) -> None:
    changes = {"train.batch": 32, "train.clip": 0.0 if form == "one-pass" else 1.0, "optimizer.release_gradients": form}
    torch.manual_seed(0)
    free, feed = make_step(batchnorm_net(0.3), mean_loss, points(), **changes)
    rows = run_steps(free, feed, 2)
    torch.manual_seed(0)
    attempts = 2 if form == "two-pass" else 1  # passes of a step
    fails = lambda attempt, num: attempt == attempts + 1
    step, got, faults = forced(batchnorm_net(0.3), mean_loss, points(), fails, 2, share=(0.0, 0.2), **changes)
    assert faults.struck == 1 and got == rows
    assert_same_bits(state_bits(step), state_bits(free))
    torch.manual_seed(0)
    late = lambda attempt, num: attempt == 2 * attempts  # the pass of the second step that updates
    with pytest.raises(OutOfMemoryError) as err:
        forced(batchnorm_net(0.3), mean_loss, points(), late, 2, share=(0.97, 1.0), **changes)
    assert "may have moved" in three_parts(err.value)[0]


def test_released_gradients_cannot_be_cut() -> None:
    changes = {"train.batch": 32, "train.clip": 0.0, "optimizer.release_gradients": "one-pass"}
    with pytest.raises(OutOfMemoryError) as err:
        forced(mlp(), mean_loss, points(), above(8), 1, share=(0.0, 0.2), **changes)
    assert "cannot be cut" in three_parts(err.value)[0] and "release_gradients" in err.value.asked


# --- a real limit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "gpt"])
def test_a_limit_of_the_address_space_that_the_micro_batch_does_not_fit_into(name: str) -> None:
    for share in (1.0, 0.85, 0.7, 0.55):  # how much the heap had to spare differs from process to process
        told = limited(name, 0, torch.float64, 2, int(ROOM[name, 8] * share))
        if told["micro-batch at the end"]:
            break
    assert 0 < told["micro-batch at the end"] < 64
    assert told["difference"] < 1e-12
