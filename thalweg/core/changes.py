"""What may differ between the recipe of a run and the one that it is resumed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thalweg.core.errors import RunFolderError
from thalweg.core.plan import Decision, Plan
from thalweg.core.recipe import Recipe

#: How a run is saved and read, and how its ranks share it, and nothing of what it is: these may always differ.
FREE = ("checkpoint", "data.workers", "data.timeout", "data.folder", "parallel", "tensor_plan", "steps_per_call")
#: These decide which samples have been seen, and by which name random numbers are drawn: a run cannot go on without them.
FIXED = ("seed", "train.batch", "train.last", "schedule.batch", "data.bucket", "data.options")


@dataclass(frozen=True)
class Difference:
    """A value that differs: ``before`` in the folder, ``now`` in what was asked for. None was left to the plan."""

    path: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} there, {self.now!r} here"

    def within(self, paths: Sequence[str]) -> bool:
        return any(self.path == path or self.path.startswith(f"{path}.") for path in paths)

    def named(self, words: Sequence[str]) -> bool:
        """Whether one of ``words`` means it: the whole path, its table, or its last part."""
        return self.within(words) or any(self.path.endswith(f".{word}") for word in words)


def differences(now: Recipe, before: Recipe) -> list[Difference]:
    """Field by field; a table of options is one field.

    >>> [str(c) for c in differences(Recipe().override({"optimizer.lr": "0.1"}), Recipe())]
    ['optimizer.lr: None there, 0.1 here']
    """
    found = []
    for field in dataclasses.fields(Recipe):
        a, b = getattr(before, field.name), getattr(now, field.name)
        if not dataclasses.is_dataclass(a):
            found.append(Difference(field.name, a, b))
            continue
        for inner in dataclasses.fields(a):
            path = f"{field.name}.{inner.name}"
            found.append(Difference(path, getattr(a, inner.name), getattr(b, inner.name)))
    return [change for change in found if change.before != change.now]


def refuse_changes(folder: Path, changes: Sequence[Difference], accept: Sequence[str]) -> None:
    """Refuse what differs and was not accepted; the differences are shown.

    Args:
        accept: paths such as "optimizer.lr", tables such as "optimizer", or last parts such as "lr".

    Raises:
        RunFolderError: naming them.
    """
    fixed = [change for change in changes if change.within(FIXED)]
    if fixed:
        raise RunFolderError(
            f"{folder} belongs to a run with another recipe.",
            "; ".join(map(str, changes)) + ".",
            f"{', '.join(c.path for c in fixed)} cannot change in a run: which samples it has seen would not be known. "
            "Start a new run with --name.",
        )
    refused = [change for change in changes if not change.within(FREE) and not change.named(accept)]
    if refused:
        raise RunFolderError(
            f"{folder} belongs to a run with another recipe.",
            "; ".join(map(str, refused)) + ".",
            f"Go on with what is new by --accept {','.join(c.path for c in refused)}, resume without changing the recipe, or "
            "start a new run with --name.",
        )


_ACCEPTED = "accepted on resuming; was "
_PLANNED = ", as it was planned for "


def accepted(plan: Plan) -> list[str]:
    """A line for each change that a run was allowed so far, in order."""
    made = [decision for decision in plan.decisions if decision.reason.startswith(_ACCEPTED)]
    return [_line(d.path, d.reason.removeprefix(_ACCEPTED), d.value) for d in made]


def as_it_was(path: str, before: Any, now: Any, steps: int) -> tuple[Decision, str]:
    """(for the plan, a line for a person): ``now`` is what ``before`` meant in a run that was planned with so many steps."""
    was = f"{before!r}{_PLANNED}{steps} steps"
    return Decision(path, now, _ACCEPTED + was), _line(path, was, now)


def _line(path: str, was: str, now: Any) -> str:
    before, planned, rest = was.partition(_PLANNED)
    return f"{path}: {before} before, {now!r} from here on{planned}{rest}"


def changed_plan(plan: Plan, recipe: Recipe, changes: Sequence[Difference]) -> tuple[Plan, list[str]]:
    """A run's plan with accepted changes; what had been derived stays, unless it is what changes.

    Returns:
        The plan, and a line for each change that a person should know.
    """
    complete = plan.recipe
    for change in changes:
        table, _, name = change.path.partition(".")
        if not name:
            complete = replace(complete, **{table: change.now})
        elif change.now is not None or not change.within(FREE):
            complete = replace(complete, **{table: replace(getattr(complete, table), **{name: change.now})})
    if any(change.path == "train.epochs" for change in changes) and recipe.train.steps is None:
        complete = replace(complete, train=replace(complete.train, steps=None))
    told = [_line(c.path, repr(c.before), c.now) for c in changes if not c.within(FREE)]
    made = [Decision(c.path, c.now, f"{_ACCEPTED}{c.before!r}") for c in changes if not c.within(FREE)]
    steps = complete.train.steps or plan.steps
    return replace(plan, recipe=complete, steps=steps, decisions=(*plan.decisions, *made)), told
