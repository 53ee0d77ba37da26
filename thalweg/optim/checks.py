"""Checks of what an optimizer and its groups are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from thalweg.core import RecipeError, did_you_mean
from thalweg.rules import DECAYS, STAGES, Rule


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise RecipeError(f"{name}={value!r} is not known.", "It is one of a few.", did_you_mean(str(value), known))
    return value


def number(name: str, value: float | Tensor, below: float = float("inf")) -> float | Tensor:
    """The value, checked; a tensor holds one number, which is not read."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value
    if not isinstance(value, (int, float)) or not 0 <= value < below:
        raise RecipeError(
            f"{name}={value!r} is not possible.", f"It is a number from 0 to below {below:g}.", f"Give such a {name}."
        )
    return value


def named(betas: Iterable[Any]) -> dict[str, Any]:
    return dict(zip(("b1", "b2", "b3"), betas))


def betas(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The decay rates of moments as torch's classes name them; none where the first has another name."""
    if "b1" not in group:
        return ()
    return tuple(group[name] for name in ("b1", "b2", "b3") if group.get(name) is not None)


def decay_form(form: str | None, rule: Rule) -> str:
    return rule.decay_form if form is None else one_of("decay_form", form, DECAYS)


def stages(given: str | Iterable[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: options} of stages however they were given, checked."""
    if isinstance(given, str):
        given = [given]
    listed = given if isinstance(given, Mapping) else {name: {} for name in given}
    for name, options in listed.items():
        STAGES[name].options(options)
    return {name: dict(options) for name, options in listed.items()}
