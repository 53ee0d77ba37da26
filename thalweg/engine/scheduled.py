"""What a recipe schedules: each value with its schedule, as numbers over the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thalweg.core import Recipe, RecipeError, did_you_mean
from thalweg.data import Order
from thalweg.optim.table import check_groups
from thalweg.rules import RULES, STAGES, Rule
from thalweg.schedules import Schedule, Span, parse
from thalweg.schedules.span import is_length

#: Values that must be known to the host before a step, and so go by steps attempted.
BY_STEPS = ("batch", "sequence", "image_size")
_SEQUENCE_UNIT = 8  # tokens; lengths of sequences are whole multiples of it
_IMAGE_UNIT = 4  # pixels; heights and widths are whole multiples of it


@dataclass(frozen=True)
class Scheduled:
    """A value that moves.

    Attributes:
        name: "lr", "weight_decay", "options.b1", "groups.head.*.lr", ...
        base: what the recipe gives.
        factor: whether the schedule is a factor on ``base``, or gives the value itself.
        taken: what the engine takes for ``base``, where that differs between parameters or layers: 1 for the factor alone.
        owner: the rule whose option it is.
    """

    name: str
    schedule: Schedule
    base: float
    factor: bool = True
    taken: float | None = None
    owner: Rule | None = None

    def values(self, span: Span) -> list[float]:
        """The value at each update, as a person reads it."""
        if not self.factor:
            return self.schedule.values(span, peak=self.base)
        return [self.base * value for value in self.schedule.values(span)]

    def row(self, span: Span) -> list[float]:
        """The value at each update, as the engine takes it."""
        if self.taken is None:
            return self.values(span)
        return [self.taken * value for value in self.schedule.values(span)]

    @property
    def told(self) -> float:
        """What a value that the engine takes is multiplied by to be read."""
        return self.base / self.taken if self.taken else 1.0


def scheduled(recipe: Recipe, loss: Mapping[str, Any] | None = None) -> list[Scheduled]:
    """Everything that the recipe schedules.

    Args:
        loss: the loss function's arguments and their values; None: they are not known, and loss schedules are told as
            factors.

    Raises:
        RecipeError: for a schedule that cannot be read, or of a value that is not there.
    """
    return list(_scheduled(recipe, loss))


def _scheduled(recipe: Recipe, loss: Mapping[str, Any] | None) -> Iterator[Scheduled]:
    optimizer, regularize, wanted = recipe.optimizer, recipe.regularize, recipe.schedule
    check_groups(optimizer.groups)
    peak = RULES[optimizer.rule].lr if optimizer.lr is None else optimizer.lr
    yield Scheduled("lr", parse(wanted.lr), peak)
    simple = {
        "weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
        "clip": (recipe.train.clip, "train.clip"),
        "average": (regularize.average, "regularize.average"),
    }
    for name, (base, path) in simple.items():
        if (text := getattr(wanted, name)) is not None:
            grouped = name == "weight_decay" and any("weight_decay" in group for group in optimizer.groups.values())
            if not base and not grouped:
                raise RecipeError(
                    f"schedule.{name} moves a value that is switched off.",
                    f"{path}={base:g}.",
                    f"Give {path}, or leave schedule.{name} out.",
                )
            taken = 1.0 if name == "weight_decay" else None
            schedule = parse(text)
            if name == "average" and schedule.feedback:
                raise RecipeError(
                    f"schedule.average listens to the run: '{schedule}'.",
                    "How far the average moves is laid out before the run.",
                    "Use other pieces.",
                )
            yield Scheduled(name, schedule, base or 1.0, factor=name != "average", taken=taken)
    for name in ("dropout", "stochastic_depth"):
        if (text := getattr(wanted, name)) is not None:
            yield Scheduled(name, parse(text), getattr(regularize, name) or 1.0, taken=1.0)
    yield from _options(recipe)
    yield from _groups(recipe, peak)
    for name, text in wanted.loss.items():
        if loss is not None and name not in loss:
            raise RecipeError(
                f"schedule.loss.{name} moves no argument of the task's loss.",
                f"It has {len(loss)}.",
                did_you_mean(name, loss) if loss else "Give the loss an argument of that name.",
            )
        base = 1.0 if loss is None else _number(f"loss.{name}", loss[name])
        yield Scheduled(f"loss.{name}", parse(text), base)
    for name, text in wanted.penalties.items():
        if name not in regularize.penalties:
            raise RecipeError(
                f"schedule.penalties.{name} moves a penalty that is not there.",
                f"regularize.penalties has {', '.join(regularize.penalties) or 'none'}.",
                f"Give regularize.penalties.{name} its strength.",
            )
        base = _number(f"regularize.penalties.{name}", regularize.penalties[name])
        yield Scheduled(f"penalties.{name}", parse(text), base)


def _options(recipe: Recipe) -> Iterator[Scheduled]:
    """The rule's own options; where a second rule takes the rest, those of either."""
    optimizer = recipe.optimizer
    rules = rules_of(recipe)
    for name, text in recipe.schedule.options.items():
        owner = next((rule for rule in rules if name in rule.defaults), None)
        if owner is None:
            known = sorted({option for rule in rules for option in movable(rule)})
            raise RecipeError(
                f"schedule.options.{name} moves a value that the rule {rules[0].name} does not have.",
                f"It has {len(known)} that can move.",
                did_you_mean(name, known) if known else "Leave it out.",
            )
        check_movable(owner, name, f"schedule.options.{name}")
        base = _base(f"optimizer.options.{name}", optimizer.options.get(name, owner.defaults[name]), owner)
        yield Scheduled(f"options.{name}", parse(text), base, factor=False, owner=owner)


def _groups(recipe: Recipe, peak: float) -> Iterator[Scheduled]:
    for pattern, group in recipe.optimizer.groups.items():
        rule = RULES[group.get("rule", recipe.optimizer.rule)]
        for name, text in group.get("schedule", {}).items():
            path = f"groups.{pattern}.{name}"
            if name == "lr":
                yield Scheduled(path, parse(text), _peak_of(group, recipe, peak), taken=peak)
                continue
            if name == "weight_decay":
                base = float(group.get("weight_decay", recipe.optimizer.weight_decay))
                yield Scheduled(path, parse(text), base or 1.0, taken=1.0)
                continue
            if rule.least_ndim and "rule" not in group:
                raise RecipeError(
                    f"optimizer.groups.'{pattern}' schedules {name}, and does not say of which rule.",
                    f"{rule.name} takes matrices, and {recipe.optimizer.otherwise} the rest.",
                    f"Give the group its rule, such as rule = '{recipe.optimizer.otherwise}'.",
                )
            check_movable(rule, name, f"optimizer.groups.'{pattern}'.schedule.{name}")
            own = recipe.optimizer.options if rule.name == recipe.optimizer.rule else {}
            options = {**own, **group.get("options", {})}
            base = _base(path, options.get(name, rule.defaults[name]), rule)
            yield Scheduled(path, parse(text), base, factor=False, owner=rule)


def _peak_of(group: Mapping[str, Any], recipe: Recipe, peak: float) -> float:
    """The peak rate of a group, as its row of the parameter table has it before rates by depth."""
    other = group.get("rule", recipe.optimizer.rule)
    own = peak if other == recipe.optimizer.rule else RULES[other].lr
    return float(group.get("lr", own)) * float(group.get("lr_scale", 1.0))


def rules_of(recipe: Recipe) -> list[Rule]:
    """The recipe's rule, and the one that takes what it does not."""
    rule = RULES[recipe.optimizer.rule]
    return [rule, RULES[recipe.optimizer.otherwise]] if rule.least_ndim else [rule]


def movable(rule: Rule) -> list[str]:
    """Options of a rule that a schedule can move: numbers that its maths takes as they come.

    Not those that decide what is computed (counts, switches), and not those of its averaging, which remember.
    """
    fixed = {*(STAGES[rule.then].defaults if rule.then else {}), *rule.unmoved, *map(str, rule.shared.values())}
    numbers = {name for name, value in rule.defaults.items() if isinstance(value, float) and math.isfinite(value)}
    return sorted(numbers - fixed)


def check_movable(rule: Rule, name: str, where: str) -> None:
    known = movable(rule)
    if name not in known:
        has = "does not have" if name not in rule.defaults else "cannot change while it runs"
        raise RecipeError(
            f"{where} moves a value that the rule {rule.name} {has}.",
            f"It has {len(known)} that can move.",
            did_you_mean(name, known) if known else "Leave it out.",
        )


def _base(path: str, value: Any, rule: Rule) -> float:
    """The value that a schedule of an option starts from."""
    base = _number(path, value)
    if base == 0:
        raise RecipeError(
            f"A schedule moves {path}, and it is switched off.",
            f"It is 0, so that {rule.name} leaves out what it is for.",
            "Give it a value above 0.",
        )
    return base


def _number(path: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{path}={value!r} cannot be scheduled.", "It is no number.", "Schedule numbers alone.")
    return float(value)


def batch_sizes(recipe: Recipe, steps: int) -> list[int] | None:
    """Samples in each step's window, where they change: whole micro-batches, at least one."""
    text, train = recipe.schedule.batch, recipe.train
    if text is None:
        return None
    unit = train.unit
    factors = by_steps(text, "batch", steps)
    sizes = [max(1, round(train.batch * factor / unit)) * unit for factor in factors]
    if max(sizes) > train.batch:
        raise RecipeError(
            "schedule.batch rises above the batch.",
            f"{max(sizes)} samples, train.batch={train.batch}.",
            "Give train.batch the largest size, and schedule factors up to 1.",
        )
    return sizes


def sequence_lengths(recipe: Recipe, steps: int, whole: int) -> list[int] | None:
    """Tokens of a sequence at each step, where they change: multiples of 8, at least one of them."""
    text = recipe.schedule.sequence
    if text is None:
        return None
    if whole < 2:
        raise RecipeError(
            "schedule.sequence shortens sequences, and this data has none.",
            "No tensor of a batch has a second dimension of 2 or more.",
            "Leave schedule.sequence out.",
        )
    unit = min(_SEQUENCE_UNIT, whole)
    factors = by_steps(text, "sequence", steps)
    return [whole if f >= 1 else min(whole, max(1, round(whole * f / unit)) * unit) for f in factors]


def image_sizes(recipe: Recipe, steps: int, whole: Sequence[int] | None) -> list[tuple[int, int]] | None:
    """(height, width) of the images at each step, where they change: multiples of 4 pixels, at least one of them.

    Args:
        whole: of the data's own images; None: a batch has none where the task says.
    """
    text = recipe.schedule.image_size
    if text is None:
        return None
    if whole is None:
        raise RecipeError(
            "schedule.image_size makes images smaller, and this data has none.",
            "A batch has no (samples, channels, height, width) under the task's inputs.",
            "Give Task(inputs=...) their name, or leave schedule.image_size out.",
        )
    factors = by_steps(text, "image_size", steps)
    if max(factors) > 1:
        raise RecipeError(
            "schedule.image_size rises above the size of the images.",
            f"It reaches {max(factors):g} times {whole[0]} x {whole[1]} pixels.",
            "Schedule factors up to 1.",
        )
    if min(factors) <= 0:
        raise RecipeError(
            "schedule.image_size leaves nothing of the images.",
            f"It is {min(factors):g} times {whole[0]} x {whole[1]} pixels at step {factors.index(min(factors)) + 1}.",
            "Schedule factors above 0 and up to 1, such as 'constant(30%, value=0.6) >> constant(value=1)'.",
        )

    def scaled(side: int, factor: float) -> int:
        unit = min(_IMAGE_UNIT, side)
        return side if factor >= 1 else min(side, max(1, round(side * factor / unit)) * unit)

    return [(scaled(whole[0], f), scaled(whole[1], f)) for f in factors]


def by_steps(text: str, name: str, steps: int) -> list[float]:
    """A schedule of what decides how much a step takes: it can only be counted in steps."""
    why = f"schedule.{name} decides how much of the data a step takes."
    span = Span(steps, {}, {"examples": why, "tokens": why, "epochs": why})
    schedule = parse(text)
    if schedule.feedback:
        raise RecipeError(
            f"schedule.{name} listens to the run.",
            "Which samples a step takes is known before the run.",
            "Use other pieces.",
        )
    return schedule.values(span)


def length_of(path: str, text: str) -> int | str:
    """A length as a recipe writes it: "50" updates, "75%", "2 epochs"."""
    length = int(text) if text.isdecimal() else text
    if not is_length(length):
        raise RecipeError(
            f"{path}={text!r} is no length.",
            "A length is a whole number of updates, a share of the run, or an amount with a unit.",
            "Write it as in a schedule: '50', '75%' or '2 epochs'.",
        )
    return length


def average_lengths(recipe: Recipe, span: Span) -> tuple[int, int]:
    """(first update or step whose weights count, updates between two) of averages that are plain means."""
    wanted = recipe.regularize
    start = span.reach(0.0, length_of("regularize.average_start", wanted.average_start))
    every = span.reach(0.0, length_of("regularize.average_every", wanted.average_every))
    return max(1, round(start)), max(1, round(every))


def span_of(
    recipe: Recipe,
    steps: int,
    per_step: Mapping[str, float],
    why_not: Mapping[str, str],
    *,
    samples: int = 0,
    sequence: int = 0,
) -> Span:
    """The run as its schedules see it.

    Args:
        per_step: what a whole batch takes of each unit.
        why_not: for a unit that is missing, why.
        samples: in an epoch; 0: not known.
        sequence: tokens of a whole sequence; 0: not known, or there are none.
    """
    sizes = batch_sizes(recipe, steps)
    lengths = sequence_lengths(recipe, steps, sequence) if sequence else None
    if sizes is None and lengths is None:
        return Span(steps, dict(per_step), dict(why_not))
    shares = [size / recipe.train.batch for size in sizes] if sizes else [1.0] * steps
    parts = [length / sequence for length in lengths] if lengths else [1.0] * steps
    rates: dict[str, Sequence[float]] = {
        unit: tuple(rate * size * (part if unit == "tokens" else 1.0) for size, part in zip(shares, parts))
        for unit, rate in per_step.items()
    }
    epochs = epochs_of(samples, sizes, recipe.train.last)
    if epochs is not None and "epochs" in rates:
        rates["epochs"] = tuple(epochs)
    return Span(steps, rates, dict(why_not))


def epochs_of(samples: int, sizes: Sequence[int] | None, last: str) -> list[float] | None:
    """The part of an epoch that each step takes, where batch sizes change and the length of an epoch is known."""
    if sizes is None or not samples:
        return None
    order = Order(samples, max(sizes), seed=0, keep_last=last == "keep", sizes=sizes)
    places = [order.place(step) for step in range(len(sizes))]
    done = [0.0, *(epoch + stop / samples for epoch, _, stop in places)]
    return [b - a for a, b in zip(done, done[1:])]
