"""What a recipe asks of regularization, put in its place: layers of the model, windows of the data, terms of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from thalweg.core import ModelError, Recipe, RecipeError, Task, seed_for
from thalweg.data import Augment, Tensors, tensors
from thalweg.engine.preflight import ModelLoss
from thalweg.engine.scheduled import Scheduled
from thalweg.regularize import (
    Change,
    DropConnect,
    FrozenBatchNorm,
    GhostBatchNorm,
    Mixing,
    StochasticDepth,
    Streams,
    add_dropout,
    add_stochastic_depth,
    connect,
    convert_batchnorm,
    convert_dropout,
    not_converted,
    penalised,
    pipeline,
    set_factors,
)
from thalweg.regularize.dropout import Drop
from thalweg.regularize.keyed import Keyed
from thalweg.schedules import Span

WindowChange = Callable[[int, list[Any]], list[Any]]


class TaskLoss:
    """The task's loss with the recipe's arguments and penalties; those that are scheduled are numbers on the device.

    Args:
        function: ``function(model, batch, **arguments)``.
        arguments: given in the recipe.
        penalties: strengths by name.

    Attributes:
        known: every argument that the function has beyond model and batch, and its value in the recipe.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], penalties: Mapping[str, Any]
    ) -> None:
        self.function, self.arguments, self.penalties = function, dict(arguments), dict(penalties)
        self.known = arguments_of(function, arguments)
        self._call = self._made()

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return self._call(model, batch)

    def move(self, now: Mapping[str, Tensor]) -> None:
        """From now on, take what is scheduled from the timetable."""
        for table, values in (("loss", self.arguments), ("penalties", self.penalties)):
            for name in now:
                if name.startswith(f"{table}."):
                    values[name.removeprefix(f"{table}.")] = now[name]
        self._call = self._made()

    def _made(self) -> ModelLoss:
        loss = penalised(self.function, self.penalties) if self.penalties else self.function
        return partial(loss, **self.arguments) if self.arguments else loss


def arguments_of(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A loss function's arguments beyond model and batch, with the values that they will have."""
    parameters = list(inspect.signature(function).parameters.values())[2:]
    named = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return {**named, **given}


def change_model(model: nn.Module, run: Callable[[], object], recipe: Recipe) -> tuple[list[Change], list[str]]:
    """Change the model's layers as the recipe asks.

    Args:
        run: one forward pass of the model, in which residual branches are found.

    Returns:
        What was changed; what could not be, by name.

    Raises:
        ModelError: for layers that cannot be changed, or a model in which there is no place for what is asked.
    """
    wanted, schedule = recipe.regularize, recipe.schedule
    changes: list[Change] = []
    left: list[str] = []
    if wanted.ghost:
        changes += convert_batchnorm(model, to="ghost", size=wanted.ghost)
    if wanted.batchnorm == "frozen":
        changes += convert_batchnorm(model, to="frozen")
    moves = schedule.dropout is not None or schedule.stochastic_depth is not None
    if wanted.by_sample or moves:
        changes += convert_dropout(model)
        left = not_converted(model)
    if wanted.stochastic_depth:
        with _told("Build it in: thalweg.regularize.StochasticDepth; or leave regularize.stochastic_depth out."):
            changes += add_stochastic_depth(model, run, wanted.stochastic_depth, mode=wanted.stochastic_depth_mode)
    if wanted.dropout:
        places = wanted.dropout_at
        named = len(places) == 1 and places[0] in ("residual", "head")
        with _told("Give regularize.dropout_at = ['head'], or patterns of modules' names such as ['blocks.*.mlp']."):
            changes += add_dropout(model, run, wanted.dropout, at=places[0] if named else places)
    for name in ("dropout", "stochastic_depth"):
        if getattr(schedule, name) is not None and not any(
            isinstance(layer, Keyed) and layer.rate == name for layer in model.modules()
        ):
            raise RecipeError(
                f"schedule.{name} moves the rate of no layer.",
                f"The model has no layer of {name.replace('_', ' ')}.",
                f"Give regularize.{name}, or put such layers into the model.",
            )
    return changes, left


@contextmanager
def _told(remedy: str) -> Iterator[None]:
    """What can be done in a recipe about a model that cannot be changed."""
    try:
        yield
    except ModelError as err:
        if "already" in err.asked:
            remedy = "Leave it out of the recipe, or train a fresh model: give a function that makes one."
        raise ModelError(err.asked, err.numbers, remedy) from None


def not_used(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """(path, value, reason) of what the recipe asks and this model has no use for."""
    wanted, layers = recipe.regularize, list(model.modules())
    if not any(isinstance(layer, _BatchNorm) for layer in layers):
        why = "not used: the model has no batch normalization"
        asked = {
            "ghost": wanted.ghost,
            "precise": wanted.precise,
            "batchnorm": wanted.batchnorm != "pooled" and "frozen",
        }
        yield from ((f"regularize.{name}", value, why) for name, value in asked.items() if value)
    if wanted.by_sample and not any(isinstance(layer, Keyed) for layer in layers):
        yield "regularize.by_sample", True, "not used: the model has no layer of dropout that can be keyed"


def what_follows_the_split(
    model: nn.Module, recipe: Recipe, micro_batch: int | None = None
) -> Iterator[tuple[str, Any, str]]:
    """(path, value, reason) of what makes a run depend on how a window is cut into micro-batches, where it is cut.

    Args:
        micro_batch: samples of one; None: as the recipe says.
    """
    size = recipe.train.micro_batch if micro_batch is None else micro_batch
    if not isinstance(size, int) or size >= recipe.train.batch:
        return
    if recipe.precision == "bf16-pure" and recipe.train.micro_batch == recipe.train.batch:
        why = "gradients are added up in bfloat16; give train.micro_batch, and they are float32"
        yield "precision", recipe.precision, why
    layers = [layer for layer in model.modules() if layer.training]
    drops = [layer for layer in layers if isinstance(layer, (Drop, _DropoutNd)) and layer.p > 0]
    by_step = [x for x in drops if isinstance(x, DropConnect) or (isinstance(x, StochasticDepth) and x.mode == "batch")]
    drops = [layer for layer in drops if layer not in by_step]
    if drops and not recipe.regularize.by_sample:
        why = f"the masks of {len(drops)} layers follow the micro-batch; with true, the split does not matter"
        yield "regularize.by_sample", False, why
    alone = [x for x in layers if isinstance(x, _BatchNorm) and not isinstance(x, (GhostBatchNorm, FrozenBatchNorm))]
    if alone:
        why = f"{len(alone)} layers normalise each micro-batch of {size} samples by itself; a size makes it theirs"
        yield "regularize.ghost", 0, why
    for ghost in sorted({x.size for x in layers if isinstance(x, GhostBatchNorm) and size % x.size}):
        why = f"a micro-batch of {size} samples is not a whole number of ghost batches of {ghost}; the last one is smaller"
        yield "regularize.ghost", ghost, why


def make_streams(model: nn.Module, recipe: Recipe, device: Any, now: Mapping[str, Tensor]) -> Streams | None:
    """The random numbers of the model's dropout layers, connected; None where it has none of ours."""
    streams = Streams(recipe.seed, device, by_sample=recipe.regularize.by_sample)
    if not connect(model, streams):
        return None
    set_factors(model, {name: now.get(name) for name in ("dropout", "stochastic_depth")})
    return streams


def augmentation(recipe: Recipe, task: Task, given: Augment | None) -> Augment | None:
    """The task's own augmentation, then the recipe's."""
    if not recipe.regularize.augment:
        return given
    ours = pipeline(recipe.regularize.augment, inputs=task.inputs)
    if given is None:
        return ours
    theirs = given
    return lambda batch, draw: ours(theirs(batch, draw), draw)


def mixing(recipe: Recipe, task: Task, source: Any) -> WindowChange | None:
    """What mixes the windows of the data, for ``ChangedFeed``; None where nothing is mixed."""
    wanted = recipe.regularize
    if not (wanted.mixup or wanted.cutmix) or not wanted.mix_share:
        return None
    mix = Mixing(
        num_classes=_classes(task, source),
        inputs=task.inputs,
        targets=task.targets,
        mixup=wanted.mixup,
        cutmix=wanted.cutmix,
        share=wanted.mix_share,
    )
    return lambda step, window: mix(window, seed_for(recipe.seed, "mix", step))


def _classes(task: Task, source: Any) -> int:
    """How many classes there are: the task says so, or the labels of in-memory data do."""
    if task.classes:
        return task.classes
    found = None
    if isinstance(source, Tensors):
        found = dict(tensors(source.tree)).get(str(task.targets))
    if found is None or found.is_floating_point() or not found.numel():
        raise RecipeError(
            "Mixing makes soft targets, and it is not known of how many classes.",
            f"The task says classes={task.classes}, and its data has no integer labels in memory under '{task.targets}'.",
            "Give Task(classes=..., inputs=..., targets=...).",
        )
    return int(found.max()) + 1


def check_values(moved: list[Scheduled], span: Span) -> None:
    """Every scheduled value lies in the range of what it moves, over the whole run.

    Raises:
        RecipeError: naming the value and where it leaves its range.
    """
    for one in moved:
        values = one.values(span)
        low, high = min(values), max(values)
        name = one.name.rpartition(".")[2]
        if one.name == "clip" and low <= 0:
            raise _outside(one, low, "above 0, for 0 would stop every update")
        if one.name == "average" and high >= 1:
            raise _outside(one, high, "below 1")
        if name == "label_smoothing" and high > 1:
            raise _outside(one, high, "up to 1")
        if one.owner is not None:
            for value in (low, high):
                one.owner.options({name: value})


def _outside(one: Scheduled, value: float, range_: str) -> RecipeError:
    return RecipeError(
        f"schedule.{one.name} leaves the range of what it moves.",
        f"'{one.schedule}' gives {value:g}, and it must stay {range_}.",
        "Change the schedule's end or its start.",
    )
