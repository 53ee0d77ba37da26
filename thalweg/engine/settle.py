"""What a recipe leaves open about the optimizer, the length of the run and its evaluations is filled in, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from thalweg.core import DataError, Decision, Recipe, RecipeError, Task, divisors
from thalweg.data import Source, Stream
from thalweg.engine.checks import whole_of
from thalweg.engine.scheduled import batch_sizes, epochs_of
from thalweg.rules import RULES, STAGES


class Decisions:
    """Collects what was decided and why."""

    def __init__(self) -> None:
        self.made: list[Decision] = []

    def take(self, path: str, value: Any, reason: str) -> Any:
        self.made.append(Decision(path, value, reason))
        return value

    def unless_given(self, path: str, given: Any, derive: Callable[[], tuple[Any, str]]) -> Any:
        """``given``, or what ``derive`` says: (value, reason)."""
        return given if given is not None else self.take(path, *derive())


def settle_optimizer(recipe: Recipe, decide: Decisions) -> Recipe:
    optimizer = recipe.optimizer
    rule = RULES[optimizer.rule]
    options = {name: value for name, value in rule.options(optimizer.options).items() if _can_be_written(value)}
    for name in sorted(options.keys() - optimizer.options.keys()):
        decide.take(f"optimizer.options.{name}", options[name], f"published default of {rule.name} ({rule.paper})")
    lr = decide.unless_given(
        "optimizer.lr", optimizer.lr, lambda: (rule.lr, f"published default of {rule.name} ({rule.paper})")
    )
    form = optimizer.decay_form
    if optimizer.weight_decay:
        form = decide.unless_given("optimizer.decay_form", form, lambda: (rule.decay_form, f"the form of {rule.name}"))
    for name, given in optimizer.stages.items():
        STAGES[name].options(given)
    if "curvature" in rule.needs:
        raise RecipeError(
            f"optimizer.rule='{rule.name}' needs a second gradient, of labels drawn from the model.",
            "A task's loss gives one.",
            f"Use thalweg.optim.{rule.name.capitalize()} and its estimate_curvature in a loop of your own, or another rule.",
        )
    other = optimizer.otherwise_lr
    if rule.least_ndim:
        rest = RULES[optimizer.otherwise]
        if rest.least_ndim:
            raise RecipeError(
                f"optimizer.otherwise='{rest.name}' cannot take the rest.",
                f"It is for parameters of {rest.least_ndim} or more dimensions.",
                "Use a rule for any parameter, such as adamw.",
            )
        why = f"published default of {rest.name}, for what {rule.name} does not take"
        other = decide.unless_given("optimizer.otherwise_lr", other, lambda: (rest.lr, why))
    settled = replace(optimizer, options=options, lr=lr, decay_form=form or rule.decay_form, otherwise_lr=other)
    return replace(recipe, optimizer=settled)


def _can_be_written(value: Any) -> bool:
    """Whether a recipe can hold a value: None and infinity, as defaults, are left out."""
    return value is not None and not (isinstance(value, float) and math.isinf(value))


def settle_length(recipe: Recipe, source: Source, decide: Decisions) -> tuple[Recipe, int, int]:
    train = recipe.train
    samples = source.num if isinstance(source, Stream) else len(source)
    micro = train.micro_batch or ("auto" if recipe.memory_budget else None)  # a budget decides what is left open
    micro = decide.unless_given("train.micro_batch", micro, lambda: (train.batch, "the whole batch in one pass"))
    asked = "train.micro_batch='auto'"
    if micro == "auto" and recipe.schedule.batch is not None:
        raise RecipeError(
            f"{'memory_budget' if train.micro_batch is None else asked} does not go with schedule.batch.",
            "The sizes of windows are whole micro-batches, so another machine would train on others.",
            f"Give train.micro_batch, one of {', '.join(map(str, divisors(train.batch)))}.",
        )
    if train.last == "drop" and 0 < samples < train.batch:
        raise DataError(
            "train.last='drop' drops the only window of an epoch.",
            f"{samples} samples, train.batch={train.batch}.",
            "Use train.last='keep' or a smaller batch.",
        )
    per_epoch = samples / train.batch
    per_epoch = max(1, math.ceil(per_epoch) if train.last == "keep" else math.floor(per_epoch))
    steps = train.steps
    if steps is None:
        if not samples:
            raise RecipeError(
                "The length of the run is not known.",
                "The data is a stream that does not say how long it is.",
                "Give train.steps.",
            )
        epochs = decide.unless_given(
            "train.epochs", train.epochs, lambda: (10.0, "neither steps nor epochs were given")
        )
        steps = max(1, round(epochs * per_epoch))
        told = f"{epochs:g} epochs of {per_epoch} steps ({samples} samples)"
        if recipe.schedule.batch is not None:
            steps = _steps_for(epochs, samples, replace(recipe, train=replace(train, micro_batch=micro)), steps)
            told = f"{epochs:g} epochs of {samples} samples, in steps of changing size"
        decide.take("train.steps", steps, told)
    elif train.epochs is not None:
        decide.take("train.epochs", train.epochs, f"not used: train.steps={steps} was given too")
    return replace(recipe, train=replace(train, micro_batch=micro)), steps, samples


def _steps_for(epochs: float, samples: int, recipe: Recipe, least: int) -> int:
    """The fewest steps that cover so many epochs, where the batch size changes with the length of the run."""

    def covers(steps: int) -> bool:
        parts = epochs_of(samples, batch_sizes(recipe, steps), recipe.train.last) or [0.0]
        return sum(parts) >= epochs - 1e-9

    low, high = least, least
    while not covers(high):
        low, high = high, 2 * high
        if high > _MOST_STEPS:
            raise RecipeError(
                f"train.epochs={epochs:g} takes too many steps with schedule.batch='{recipe.schedule.batch}'.",
                f"More than {_MOST_STEPS}.",
                "Give train.steps, or a schedule whose batches are larger.",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if covers(middle) else (middle, high)
    return high


_MOST_STEPS = 10**8


def settle_evaluation(recipe: Recipe, task: Task, held_out: bool, steps: int, decide: Decisions) -> Recipe:
    evaluate, checkpoint = recipe.evaluate, recipe.checkpoint
    tenth = max(1, steps // 10)
    if held_out:
        every = decide.unless_given("evaluate.every", evaluate.every, lambda: (tenth, "ten times a run"))
        batch = decide.unless_given(
            "evaluate.batch", evaluate.batch, lambda: (whole_of(recipe.train.micro_batch), "the micro-batch")
        )
        smaller = evaluate.best.split("_")[-1] in ("loss", "error", "perplexity", "mae", "mse", "rmse")
        goal = decide.unless_given(
            "evaluate.goal", evaluate.goal, lambda: ("min" if smaller else "max", f"by the name '{evaluate.best}'")
        )
        evaluate = replace(evaluate, every=every, batch=batch, goal=goal)
    else:
        evaluate = replace(
            evaluate, every=0, batch=evaluate.batch or whole_of(recipe.train.micro_batch), goal=evaluate.goal or "min"
        )
    saves = decide.unless_given("checkpoint.every", checkpoint.every, lambda: (tenth, "ten times a run"))
    return replace(recipe, evaluate=evaluate, checkpoint=replace(checkpoint, every=saves))
