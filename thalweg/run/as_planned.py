"""What goes by the steps of a run stays where it was planned, whatever length of the run is accepted on resuming.

A share of a longer run is another step. Batches would then have been of other sizes than those that were taken, so that samples
would come twice or never; images that had grown would be small again, and layers that train would be frozen again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from thalweg.core import Plan, Recipe, RecipeError, RunFolderError
from thalweg.core.changes import Difference, as_it_was
from thalweg.engine.scheduled import BY_STEPS, by_steps


def as_planned(folder: Path, before: Plan, now: Plan, changes: Sequence[Difference]) -> tuple[Plan, list[str]]:
    """A plan of another length with what went by the steps of the one before, and a line for each value that had to be kept.

    Args:
        now: with the accepted ``changes``; what these name is not kept.

    Raises:
        RunFolderError: for other epochs of batches that change with them.
    """
    named = {change.path for change in changes}
    if not named & {"train.steps", "train.epochs"}:
        return now, []
    recipe, made, told = now.recipe, [], []
    for path, text in _kept(folder, before, now.recipe, named):
        table, _, name = path.partition(".")
        was = getattr(getattr(recipe, table), name)
        recipe = replace(recipe, **{table: replace(getattr(recipe, table), **{name: text})})
        decision, line = as_it_was(path, was, text, before.steps)
        made.append(decision)
        told.append(line)
    return replace(now, recipe=recipe, decisions=(*now.decisions, *made)), told


def _kept(folder: Path, before: Plan, recipe: Recipe, named: set[str]) -> Iterator[tuple[str, str | None]]:
    """(path, value that means for the new length what the recipe's meant for the old one)."""
    old, new = before.steps, recipe.train.steps or _steps_of(before, recipe)
    if recipe.train.steps is None and _moves(recipe.schedule.batch, "batch", old, 2 * old):
        raise RunFolderError(
            f"{folder} belongs to a run whose batches change with its epochs.",
            f"schedule.batch='{recipe.schedule.batch}', and train.epochs={recipe.train.epochs:g} would be accepted.",
            "Give the new length as train.steps: batches then stay as they were planned.",
        )
    for name in BY_STEPS:
        text = getattr(recipe.schedule, name)
        if f"schedule.{name}" not in named and _moves(text, name, old, new):
            first = f"first({text}, {min(old, new)}, of={old})"
            yield f"schedule.{name}", f"{first} >> hold()" if new > old else first
    share = recipe.optimizer.unfreeze
    if "optimizer.unfreeze" not in named and share is not None and share.endswith("%") and new != old:
        thaw = max(row.thaws for row in before.parameters)
        yield "optimizer.unfreeze", str(thaw) if thaw else None


def _steps_of(before: Plan, recipe: Recipe) -> int:
    """Steps of the recipe's epochs, where each has as many."""
    share = before.per_step.get("epochs")
    return max(1, round((recipe.train.epochs or 0.0) / share)) if share else before.steps


def _moves(text: str | None, name: str, old: int, new: int) -> bool:
    """Whether a schedule has other values at the steps that both lengths have."""
    if text is None or old == new:
        return False
    both = min(old, new)
    try:
        return by_steps(text, name, old)[:both] != by_steps(text, name, new)[:both]
    except RecipeError:  # it is longer than the shorter of them
        return True
