"""Every scheduled value of a run that has not begun: from the recipe alone, or with the task's data and model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from thalweg.core import Plan, Recipe, RecipeError, Task
from thalweg.engine import levers
from thalweg.engine.build import run_span
from thalweg.engine.regularizers import TaskLoss, check_values
from thalweg.engine.resolve import resolve
from thalweg.engine.scheduled import Scheduled, batch_sizes, by_steps, image_sizes, scheduled, sequence_lengths, span_of
from thalweg.engine.settle import Decisions, settle_optimizer
from thalweg.schedules import Span, parse
from thalweg.schedules.curve import Curve

_LONGEST = 10**7  # updates
_UNHEARD = "a piece that listens to the run is drawn as if nothing had been heard"
_WITHOUT_DATA = {
    "tokens": "It is not known how many tokens a step takes: no data was given.",
    "epochs": "It is not known how long an epoch is: no data was given.",
}


def preview(recipe: Recipe) -> list[Curve]:
    """The values that a recipe schedules, without its data; the length of the run is ``train.steps``.

    Raises:
        RecipeError: for a schedule that cannot be, or a length that only the data could answer.
    """
    recipe = settle_optimizer(recipe, Decisions())
    moved = scheduled(recipe)
    steps = recipe.train.steps
    if steps is None:
        epochs = recipe.train.epochs
        raise RecipeError(
            "The length of the run is not known without its data.",
            f"train.steps is not given{'' if epochs is None else f', and train.epochs={epochs:g}'}.",
            "Give --task, or --steps.",
        )
    _check_length(recipe)
    span = span_of(recipe, steps, {"examples": float(recipe.train.batch)}, _WITHOUT_DATA)
    try:
        check_values(moved, span)
    except RecipeError as err:
        if err.numbers in _WITHOUT_DATA.values():
            raise RecipeError(err.asked, err.numbers, f"Give --task. {err.remedy}") from None
        raise
    found = [_curve(one, recipe, span) for one in moved]
    found += _of_batch(recipe, batch_sizes(recipe, steps))
    if recipe.schedule.sequence is not None:
        values = by_steps(recipe.schedule.sequence, "sequence", steps)
        about = "factor on the length of sequences, which the data has (--task)"
        found.append(_by_steps("sequence", recipe.schedule.sequence, values, about))
    if recipe.schedule.image_size is not None:
        values = by_steps(recipe.schedule.image_size, "image_size", steps)
        about = "factor on height and width of the images, which the data has (--task)"
        found.append(_by_steps("image_size", recipe.schedule.image_size, values, about))
    return found


def preview_of_task(task: Task, recipe: Recipe) -> list[Curve]:
    """The values that a task's run with this recipe would have; its data and model are looked at as before a run.

    Raises:
        ThalwegError: for anything that would keep the run from beginning.
    """
    _check_length(recipe)
    if isinstance(task.model, nn.Module):  # what a recipe puts into a model goes into a copy
        task = replace(task, model=copy.deepcopy(task.model))
    # Nothing here hangs on these, and they would be measured.
    settled = {"precision": "fp32", "memory_format": "contiguous", "threads": torch.get_num_threads()}
    recipe = recipe.override({name: v for name, v in settled.items() if getattr(recipe, name) in ("auto", None)})
    with levers.kept():
        resolved = resolve(task, recipe)
    plan, loss = resolved.plan, resolved.loss
    recipe, span = plan.recipe, run_span(plan)
    known = loss.known if isinstance(loss, TaskLoss) else None
    found = [_curve(one, recipe, span, plan, known) for one in scheduled(recipe, known)]
    found += _of_batch(recipe, batch_sizes(recipe, plan.steps))
    lengths = sequence_lengths(recipe, plan.steps, plan.sequence)
    if lengths is not None:
        about = f"tokens of a sequence, of {plan.sequence}"
        found.append(_by_steps("sequence", str(recipe.schedule.sequence), lengths, about))
    if recipe.schedule.image_size is not None and plan.image:
        heights = [height for height, _ in image_sizes(recipe, plan.steps, plan.image) or []]
        about = f"pixels of an image's height, of {plan.image[0]}"
        found.append(_by_steps("image_size", recipe.schedule.image_size, heights, about))
    return found


def _check_length(recipe: Recipe) -> None:
    if recipe.train.steps is not None and recipe.train.steps > _LONGEST:
        raise RecipeError(
            f"train.steps={recipe.train.steps} is too long to be drawn.",
            f"A preview has up to {_LONGEST} updates.",
            "Give --steps.",
        )


def _curve(
    one: Scheduled, recipe: Recipe, span: Span, plan: Plan | None = None, known: Mapping[str, object] | None = None
) -> Curve:
    notes: tuple[str, ...] = (_UNHEARD,) if one.schedule.listening(span) else ()
    if not one.factor:
        if one.name == "average":
            notes += ("a young average keeps less: at most (1 + t)/(10 + t) at update t",)
        about = f"the value itself; the recipe's is {one.base:g}"
        return Curve(one.name, str(one.schedule), tuple(one.values(span)), about, notes=notes)
    base, about = _base(one, recipe, plan, known)
    values = tuple(base * value for value in one.schedule.values(span))
    return Curve(one.name, str(one.schedule), values, about, notes=notes)


def _base(one: Scheduled, recipe: Recipe, plan: Plan | None, known: Mapping[str, object] | None) -> tuple[float, str]:
    """What a factor is a factor on, as a person reads it: (number, words). Where there are several numbers, it is 1."""
    optimizer = recipe.optimizer
    if one.name in ("dropout", "stochastic_depth"):
        rate = getattr(recipe.regularize, one.name)
        if not rate:
            return 1.0, "factor on the rate of each layer"
        last = ", of the last branch" if one.name == "stochastic_depth" else ""
        return rate, f"factor on regularize.{one.name}={rate:g}{last}"
    if one.name.startswith("groups."):
        pattern, _, what = one.name.removeprefix("groups.").rpartition(".")
        return _base_of_group(one, recipe, plan, pattern, what)
    if one.name.startswith("loss."):
        name = one.name.removeprefix("loss.")
        if known is None and name not in recipe.loss:
            return 1.0, f"factor on the loss's {name}, which the task has (--task)"
        base = one.base if known is not None else float(recipe.loss[name])
        return base, f"factor on loss.{name}={base:g}"
    paths = {"lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay", "clip": "train.clip"}
    if one.name == "weight_decay" and not optimizer.weight_decay:
        return 1.0, "factor on the weight_decay of each group"
    return one.base, f"factor on {paths.get(one.name, f'regularize.{one.name}')}={one.base:g}"


def _base_of_group(one: Scheduled, recipe: Recipe, plan: Plan | None, pattern: str, what: str) -> tuple[float, str]:
    peak = recipe.optimizer.lr or 0.0
    rows = [row for row in plan.parameters if row.moves.get(what) == one.name] if plan else []
    bases = sorted({row.lr * peak if what == "lr" else row.weight_decay for row in rows})
    if not bases:
        return 1.0, f"factor on the {what} of '{pattern}'"
    if len(bases) > 1:
        return 1.0, f"factor on the {what} of '{pattern}', which is {bases[0]:g} to {bases[-1]:g}"
    return bases[0], f"factor on the {what} of '{pattern}', {bases[0]:g}"


def _of_batch(recipe: Recipe, sizes: list[int] | None) -> Iterator[Curve]:
    if sizes is not None:
        train = recipe.train
        unit = train.unit
        about = f"samples of a window, of {train.batch}, in multiples of {unit}"
        yield _by_steps("batch", str(recipe.schedule.batch), sizes, about)


def _by_steps(name: str, text: str, values: list[int] | list[float], about: str) -> Curve:
    return Curve(name, str(parse(text)), tuple(map(float, values)), about, counted="step")
