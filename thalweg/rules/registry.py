"""What an update rule says of itself, and the tables of all rules and stages.

A rule is a pure function of one parameter, its gradient, its slots and scalars. It knows no groups and no devices, writes
nothing in place and takes no branch on a tensor's value. It returns the *change* of the parameter, so that what combines
with any rule (decay, masks, clipping of updates, low precision) is a stage of its own, written once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thalweg.core import RecipeError, Registry, did_you_mean

#: How much of a tensor a function must see at once, from least to most.
REACHES = ("element", "row", "tensor", "matrix")

#: The year of this release: what is "new" is counted from here.
YEAR = 2026

#: Options that are decay rates of running means, and so lie in [0, 1).
_RATES = ("b1", "b2", "b3", "momentum")


@dataclass(frozen=True)
class Slot:
    """One thing that a rule remembers of each parameter.

    Attributes:
        name: in state dicts and checkpoints.
        shape: "like" the parameter; "row" (..., R, 1) and "column" (..., 1, C) of its matrices; "tensor": one number for
            each parameter; "uniform": one number that depends on the rate and the number of the update alone, so that
            parameters updated together share it; or a function from the parameter's matrix shape (..., R, C).
        start: its first value: a number, "param" for a copy of the parameter, or "eye".
        signed: whether it can be negative; a codec may spend the sign's bit otherwise.
        compressible: whether it may be kept in few bits.
    """

    name: str
    shape: str | Callable[[tuple[int, ...]], tuple[int, ...]] = "like"
    start: float | str = 0.0
    signed: bool = True
    compressible: bool = True


Slots = tuple[Slot, ...]


@dataclass(frozen=True)
class Component:
    """A pure function with options and slots: what rules and stages have in common."""

    name: str
    update: Callable[..., Any]
    slots_for: Callable[[Mapping[str, Any]], Slots]
    reads: str
    defaults: Mapping[str, Any]
    needs: tuple[str, ...]
    paper: str
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The component's options with ``given`` put in, checked by name, kind and range."""
        for key, value in given.items():
            if key not in self.defaults:
                raise RecipeError(
                    f"The rule {self.name} has no option '{key}'.",
                    f"Given: {key}={value!r}.",
                    did_you_mean(key, self.defaults),
                )
            default = self.defaults[key]
            if not _same_kind(default, value):
                raise RecipeError(
                    f"{self.name}({key}={value!r}) is not possible.",
                    f"The default is {default!r}.",
                    "Give a value of the same kind.",
                )
            if key in self.choices and value not in self.choices[key]:
                raise RecipeError(
                    f"{self.name}({key}={value!r}) is not known.",
                    f"It has {len(self.choices[key])} of them.",
                    did_you_mean(str(value), self.choices[key]),
                )
            if isinstance(value, (int, float)) and not self._in_range(key, float(value)):
                raise RecipeError(
                    f"{self.name}({key}={value!r}) is out of range.",
                    "Decay rates of moments lie in [0, 1), all else on the side of 0 where the default is.",
                    f"The default is {default!r}.",
                )
        return {**self.defaults, **given}

    def _in_range(self, key: str, value: float) -> bool:
        if key in _RATES:
            return 0 <= value < 1
        default = self.defaults[key]
        return value <= 0 if isinstance(default, (int, float)) and default < 0 else value >= 0


@dataclass(frozen=True)
class Rule(Component):
    """A registered update rule: ``update(p, g, *slots, lr=, t=, **options) -> (change of p, *slots)``.

    Attributes:
        name: what recipes call it.
        slots_for: its slots, given its options.
        reads: "element": the engine may flatten, stack or shard at will; "row", "tensor", "matrix": it must bring that much
            together. "row" and "matrix" see every parameter as (..., R, C), a vector as (1, n).
        defaults: its options and their defaults.
        needs: keyword arguments beyond lr and t that the engine gives: "due" (a Python bool, true each ``clock`` updates),
            "fresh" (a Python bool: due for the first time),
            "noise" (standard normal, shaped like g), "curvature" (of the diagonal, shaped like g, valid when
            due), "ndim" (of the parameter as the model has it), and the names of ``shared``.
        decay_form: the form of weight decay that its paper uses.
        least_ndim: parameters of fewer dimensions are left to another rule (adamw).
        lr: its published default rate.
        paper, reference: where it comes from; the implementation that it equals, up to rounding.
        year, ships: first published; libraries that have it.
        use, avoid, evidence: the card: when to take it, when not, and what has been measured by others.
        scale_free: whether a gradient scaled by a constant gives (but for eps) the same update.
        clock: the option that counts updates between the times when ``due`` is true.
        shared: numbers that belong to all parameters together, with their first values (a number, or an option's name).
        measure: ``measure(p, g, *slots, lr=, t=, **shared, **options) -> sums``: numbers, added up over all parameters.
        settle: ``settle(*sums, lr=, t=, **shared, **options) -> shared``: new values, before ``update`` sees them.
        rate: the shared number that multiplies lr in decay, for rules that find their own rate.
        then: a stage that belongs to the rule, with its options among the rule's: what averages schedule-free weights must
            see decay and all else in the change.
        torch_names: its slots in torch.optim's state dicts.
        still: whether a gradient of zero (and a rate of zero) moves nothing; false where averaging goes on.
        anchored: whether weights are drawn to where they began, whatever the gradient: decay is then not geometric.
        unmoved: number options that no schedule can move: first values of slots, and what an operator takes as a constant.
            First values of ``shared`` need not be listed.
    """

    decay_form: str = "decoupled"
    least_ndim: int = 0
    lr: float = 1e-3
    reference: str = ""
    year: int = YEAR
    ships: tuple[str, ...] = ()
    use: str = ""
    avoid: str = ""
    evidence: str = ""
    scale_free: bool = False
    clock: str | None = None
    shared: Mapping[str, float | str] = field(default_factory=dict)
    measure: Callable[..., Any] | None = None
    settle: Callable[..., Mapping[str, Any]] | None = None
    rate: str | None = None
    then: str | None = None
    torch_names: Mapping[str, str] = field(default_factory=dict)
    still: bool = True
    anchored: bool = False
    unmoved: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """ "settled" if it is at least two years old and at least three libraries ship it, else "new"."""
        return "settled" if YEAR - self.year >= 2 and len(self.ships) >= 3 else "new"

    @property
    def is_global(self) -> bool:
        """Whether its parameters share numbers: two groups are then not two optimizers, by design."""
        return bool(self.shared)


@dataclass(frozen=True)
class Stage(Component):
    """What combines with any rule.

    Attributes:
        kind: where it acts, in this order: "gradient" ``(p, g, *slots) -> (g, *slots)`` before the rule; "update"
            ``(p, g, d, *slots) -> (d, *slots)`` on the rule's change; "decay" ``(p, g, d, wd=, peak=) -> (d,)``; "total"
            ``(p, g, d, *slots) -> (d, *slots)`` on the change with decay in it; "weights" ``(p, q, *slots) -> (q, *slots)``
            on the new parameter q. Each also gets ``lr`` and ``t`` where it names them.
        still: whether a gradient of zero moves nothing.
        evaluate: ``evaluate(p, *slots, **options)``: the weights to evaluate and to ship, where they are not p.
    """

    kind: str = "update"
    still: bool = True
    evaluate: Callable[..., Any] | None = None


RULES: Registry[Rule] = Registry("update rule")
STAGES: Registry[Stage] = Registry("stage")

Slotted = tuple[str | Slot, ...] | Callable[[Mapping[str, Any]], tuple[str | Slot, ...]]


def rule(
    *,
    slots: Slotted = (),
    reads: str,
    decay: str,
    lr: float,
    paper: str,
    name: str | None = None,
    fixed: Mapping[str, Any] | None = None,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    **about: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a pure update function; its keyword options and their defaults are read off its signature.

    Args:
        slots: names or ``Slot``s, or a function of the options that gives them.
        fixed: other defaults than the function's own, for a second name of the same maths.
        about: the other attributes of ``Rule``.
    """

    def add(update: Callable[..., Any]) -> Callable[..., Any]:
        made = make_rule(
            update,
            slots=slots,
            reads=reads,
            decay=decay,
            lr=lr,
            paper=paper,
            name=name,
            fixed=fixed,
            choices=choices,
            **about,
        )
        RULES.add(made.name, made)
        return update

    return add


def make_rule(
    update: Callable[..., Any],
    *,
    slots: Slotted = (),
    reads: str = "element",
    decay: str = "decoupled",
    lr: float = 1e-3,
    paper: str = "",
    name: str | None = None,
    fixed: Mapping[str, Any] | None = None,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    **about: Any,
) -> Rule:
    """A rule that is not registered, from a function of maths."""
    defaults, needs = _signature(update)
    if about.get("then"):
        defaults |= STAGES[about["then"]].defaults
    return Rule(
        name=name or update.__name__,
        update=update,
        slots_for=_slots_for(slots),
        reads=_reach(reads),
        defaults={**defaults, **(fixed or {})},
        needs=needs,
        paper=paper,
        choices=choices or {},
        decay_form=decay,
        lr=lr,
        **about,
    )


def stage(
    *,
    kind: str,
    reads: str = "element",
    slots: Slotted = (),
    paper: str = "",
    name: str | None = None,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    still: bool = True,
    evaluate: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a stage; options and needs are read off its signature."""

    def add(update: Callable[..., Any]) -> Callable[..., Any]:
        defaults, needs = _signature(update)
        made = Stage(
            name=name or update.__name__,
            update=update,
            slots_for=_slots_for(slots),
            reads=_reach(reads),
            defaults=defaults,
            needs=needs,
            paper=paper,
            choices=choices or {},
            kind=kind,
            still=still,
            evaluate=evaluate,
        )
        STAGES.add(made.name, made)
        return update

    return add


def _signature(update: Callable[..., Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(options with defaults, keyword arguments without): the second are what the engine must give."""
    words = [p for p in inspect.signature(update).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    options = {p.name: p.default for p in words if p.default is not inspect.Parameter.empty}
    return options, tuple(p.name for p in words if p.default is inspect.Parameter.empty)


def _slots_for(slots: Slotted) -> Callable[[Mapping[str, Any]], Slots]:
    def made(options: Mapping[str, Any]) -> Slots:
        listed = slots(options) if callable(slots) else slots
        return tuple(Slot(slot) if isinstance(slot, str) else slot for slot in listed)

    return made


def _reach(reads: str) -> str:
    assert reads in REACHES, reads
    return reads


def _same_kind(default: Any, value: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, str) or isinstance(value, str):
        return isinstance(default, str) and isinstance(value, str)
    if default is None or isinstance(default, (int, float)):
        return (value is None and default is None) or isinstance(value, (int, float))
    return True
