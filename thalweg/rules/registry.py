"""What an update rule says of itself, and the table of all rules.

A rule is a pure function of one parameter, its gradient, its slots and scalars. It knows no groups and no devices, writes
nothing in place and takes no branch on a tensor's value. Weight decay is not its business: the engine applies it as a stage
before the rule, decoupled or coupled, once for all rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from thalweg.core import RecipeError, Registry, did_you_mean


@dataclass(frozen=True)
class Rule:
    """A registered update rule.

    Attributes:
        name: what recipes call it.
        update: ``update(p, g, *slots, lr=, t=, **options) -> (p, *slots)``; ``t`` is the number of this update, from 1.
        slots_for: the names of its slots, given its options; slots begin at 0.
        reads: "element": the engine may flatten, stack or shard at will.
        decay_form: the form of weight decay that its paper uses.
        lr: its published default rate.
        defaults: its options and their defaults.
        paper: where it comes from.
        scale_free: whether a gradient scaled by a constant gives (but for eps) the same update.
    """

    name: str
    update: Callable[..., Any]
    slots_for: Callable[[Mapping[str, Any]], tuple[str, ...]]
    reads: str
    decay_form: str
    lr: float
    defaults: Mapping[str, Any]
    paper: str
    scale_free: bool

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's options with ``given`` put in, checked by name and kind."""
        for key, value in given.items():
            if key not in self.defaults:
                raise RecipeError(
                    f"The rule {self.name} has no option '{key}'.",
                    f"Given: {key}={value!r}.",
                    did_you_mean(key, self.defaults),
                )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if isinstance(self.defaults[key], bool) != isinstance(value, bool) or not (
                number or isinstance(value, bool)
            ):
                raise RecipeError(
                    f"{self.name}({key}={value!r}) is not possible.",
                    f"The default is {self.defaults[key]!r}.",
                    "Give a value of the same kind.",
                )
            if number and not self._in_range(key, float(value)):
                raise RecipeError(
                    f"{self.name}({key}={value!r}) is out of range.",
                    "Decay rates of moments lie in [0, 1), eps at 0 or above.",
                    f"The default is {self.defaults[key]!r}.",
                )
        return {**self.defaults, **given}

    @staticmethod
    def _in_range(key: str, value: float) -> bool:
        return 0 <= value < 1 if key in ("b1", "b2", "momentum") else value >= 0


RULES: Registry[Rule] = Registry("update rule")


def rule(
    *,
    slots: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]],
    reads: str,
    decay: str,
    lr: float,
    paper: str,
    name: str | None = None,
    scale_free: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a pure update function; its keyword options and their defaults are read off its signature."""

    def register(update: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(update).parameters.values()
        defaults = {
            p.name: p.default
            for p in parameters
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in ("lr", "t")
        }
        slots_for = slots if callable(slots) else lambda options: slots
        title = name or update.__name__
        RULES.add(title, Rule(title, update, slots_for, reads, decay, lr, defaults, paper, scale_free))
        return update

    return register
