"""What would fail in the middle of a run, or never act, is found before step 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from thalweg.core import DataError, Plan, Recipe, RecipeError, Task, did_you_mean
from thalweg.data import Order, Source, batch_size, held_out, lengths_of, resized, shortened, split, tensors
from thalweg.device import Device
from thalweg.engine.preflight import ModelLoss, as_written, in_evaluation_mode, untouched
from thalweg.engine.scheduled import Scheduled, average_lengths
from thalweg.engine.stateful import is_stateful
from thalweg.precision import POLICIES
from thalweg.regularize import check_batch
from thalweg.schedules import Span


def whole_of(value: int | str | None) -> int:
    """A number that the plan has settled."""
    assert isinstance(value, int)
    return value


def check_metric(task: Task, recipe: Recipe, model: nn.Module, test: Source, device: Device) -> None:
    """The metric that chooses must exist; the task's metrics are tried on a few held-out samples."""
    names = {"loss"}
    if task.metrics is not None:
        with untouched(model, device, recipe.seed), in_evaluation_mode(model), torch.no_grad():
            for few in held_out(test, min(whole_of(recipe.evaluate.batch), 2), device.torch_device):
                found = task.metrics(model, few)
                for one in filter(is_stateful, found.values()):
                    one.reset()  # what it has seen here counts nowhere
                names |= set(found)
                break
    if recipe.evaluate.best not in names:
        raise RecipeError(
            f"evaluate.best='{recipe.evaluate.best}' is no metric of this task.",
            f"It has {len(names)}.",
            did_you_mean(recipe.evaluate.best, names),
        )


def check_bucket(recipe: Recipe, source: Source) -> None:
    """Samples are sorted by length where there are lengths, and where windows are of one size."""
    if not recipe.data.bucket:
        return
    if lengths_of(source) is None:
        raise RecipeError(
            f"data.bucket={recipe.data.bucket} sorts samples by length, and this data says none.",
            f"It is a {type(source).__name__}.",
            "Give thalweg.data.Ragged, or an object with gather and lengths (a numpy array), or leave data.bucket out.",
        )
    if recipe.schedule.batch is not None:
        raise RecipeError(
            f"data.bucket={recipe.data.bucket} does not go with schedule.batch.",
            "What is sorted together is cut into windows of one size.",
            "Leave one of the two out.",
        )


def check_same_data(saved: Plan, samples: int, told: Mapping[str, Any]) -> None:
    """A resumed run must go on with the data that it began with."""
    now, then = {"samples": samples, **told}, {"samples": saved.samples, **saved.machine.get("data", {})}
    differing = [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in {**then, **now} if then.get(k) != now.get(k)]
    if differing:
        raise DataError(
            "The data is not what this run began with.", "; ".join(differing) + ".", "Restore it, or start a new run."
        )


def check_heard(moved: list[Scheduled], recipe: Recipe, held_out: bool) -> None:
    """What follows evaluations needs some."""
    wants = [f"schedule.{one.name} has a plateau" for one in moved if "evaluation" in one.schedule.feedback]
    wants += ["evaluate.patience is given"] if recipe.evaluate.patience else []
    wants += ["evaluate.target is given"] if recipe.evaluate.target is not None else []
    if wants and not (held_out and recipe.evaluate.every):
        why = "The task has no held-out data." if not held_out else "evaluate.every=0: there is one, at the end."
        raise RecipeError(
            f"{wants[0]}, and there are no evaluations to follow.", why, "Give held-out data, and evaluate.every."
        )


def tell_guard(recipe: Recipe, tell: Callable[[str, Any, str], Any]) -> None:
    """What the guard takes, and what it does not count; ``tell`` is ``Decisions.take``."""
    guard = recipe.guard
    if guard.rewinding:
        tell(
            "guard.every",
            guard.every,
            "two copies of weights, slots and averages lie in the CPU's memory; the predicted peak does not count them",
        )
    if guard.nonfinite != "skip" and recipe.precision != "auto" and POLICIES[recipe.precision].scaled:
        tell("guard.nonfinite", guard.nonfinite, "a gradient that a smaller loss scale may bring into range is skipped")


def check_average(recipe: Recipe, span: Span) -> None:
    """Weights that count must come before the end."""
    wanted = recipe.regularize
    start, _ = average_lengths(recipe, span)
    if wanted.average_form != "ema" and start > span.steps:
        raise RecipeError(
            f"regularize.average_start={wanted.average_start!r} lies beyond the run.",
            f"It is update {start}, and the run has {span.steps}.",
            "Give an earlier one, such as '75%'.",
        )


def check_sequences(task: Task, batch: Any) -> None:
    first = next(t for _, t in tensors(batch) if t.ndim >= 2)
    if task.unit != "tokens" and first.is_floating_point():
        raise RecipeError(
            "schedule.sequence cuts the second dimension, and this data's may be no time.",
            f"Its first tensor is {tuple(first.shape)} of {first.dtype}, and the task counts {task.unit}.",
            "Say Task(unit='tokens') where it is time; else leave schedule.sequence out.",
        )


def try_shortest(model: nn.Module, loss: ModelLoss, batch: Any, length: int, device: Device, seed: int) -> None:
    """The shortest sequences of the run go through the model now, not in the middle of it."""
    (short,) = shortened([length])(0, [batch])
    asked = f"The model or the loss does not take sequences of {length}."
    remedy = "Raise the least length of schedule.sequence, or leave it out."
    _go_through(model, loss, short, device, seed, asked, remedy)


def try_sizes(
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    sizes: Sequence[tuple[int, int]],
    inputs: str | int,
    device: Device,
    seed: int,
) -> None:
    """Images of every size of the run go through the model now, not in the middle of it: the smallest as a whole micro-batch,
    of the others a few samples."""
    smallest, *others = sorted({*sizes})
    few = split(batch, min(_FEW_IMAGES, batch_size(batch)))[0]
    for size in (smallest, *others):
        asked = f"The model does not take images of {size[0]} x {size[1]} pixels."
        remedy = _NO_SMALLER if size == smallest else _NOT_BETWEEN
        through = partial(_go_through, model, loss, device=device, seed=seed, asked=asked, remedy=remedy)
        if size != smallest:
            with suppress(DataError):  # a loss may want them all
                through(_resized(few, size, inputs))
                continue
        through(_resized(batch, size, inputs))


def _resized(batch: Any, size: tuple[int, int], inputs: str | int) -> Any:
    return resized([size], inputs)(0, [batch])[0]


_NO_SMALLER = (
    "Raise the least factor of schedule.image_size, let the model pool over whatever is left, or leave it out."
)
_NOT_BETWEEN = (
    "It takes smaller ones: choose factors of schedule.image_size whose sizes it takes (whole multiples of 4 pixels, and "
    "held-out images as they are), or let the model pool over whatever is left."
)
_FEW_IMAGES = 2  # what a model can be tried on, batch normalization too


def _go_through(
    model: nn.Module, loss: ModelLoss, batch: Any, device: Device, seed: int, asked: str, remedy: str
) -> None:
    """One forward pass that leaves nothing behind.

    Raises:
        DataError: of ``asked`` and ``remedy``, where the model or the loss refuses.
    """
    try:
        with untouched(model, device, seed), torch.no_grad(), as_written():
            loss(model, batch)
    except (RuntimeError, ValueError, IndexError) as err:
        raise DataError(asked, f"{type(err).__name__}: {err}"[:300], remedy) from err


def check_smallest_batch(
    model: nn.Module, recipe: Recipe, samples: int, sizes: list[int] | None, values: Mapping[str, float]
) -> None:
    """BatchNorm cannot train on a single value a channel: find that now, not at the end of the first epoch."""
    train = recipe.train
    micro = whole_of(train.micro_batch)
    told = f"{samples} samples, train.batch={train.batch}, train.micro_batch={micro}"
    taken = [train.batch, *([samples % train.batch] if train.last == "keep" else [])]
    if sizes is not None:
        taken = list(sizes)
        if samples:
            order = Order(samples, max(sizes), seed=0, keep_last=train.last == "keep", sizes=sizes)
            taken = [stop - first for _, first, stop in map(order.place, range(len(sizes)))]
    rests = [size % micro for size in taken]
    for num in (micro, *(rest for rest in sorted({*rests}) if rest)):
        check_batch(model, num, dict.fromkeys(values, 1.0), told)  # a single image is no batch, whatever its pixels
