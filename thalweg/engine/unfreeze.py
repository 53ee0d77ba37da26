"""Layers that wait their turn: nothing of them moves, and no gradient of theirs is computed.

Gradual unfreezing (Howard and Ruder 2018, arXiv:1801.06146): a new output layer learns first, before what it sends down can
spoil what the layers below have learnt elsewhere. The update itself leaves them alone by the number of updates, on the device
(``Arena.scalars``); here autograd is told by the number of steps, on the host. Steps that are skipped put the two apart: the
gradient of a layer is then there, and counts in the norm, as many steps before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from thalweg.core import Layout, ParameterRow, Recipe, RecipeError
from thalweg.engine.scheduled import length_of
from thalweg.optim import Arena
from thalweg.rules import RULES
from thalweg.schedules import Span

#: Why a step with layers that wait is not compiled.
IN_TURN = "layers that wait are left out of the backward pass (optimizer.unfreeze)"


class Waiting:
    """The parameters that wait, and until which step."""

    def __init__(self, arenas: Sequence[Arena]) -> None:
        self._until: list[tuple[int, nn.Parameter]] = [
            (segment.treatment.thaws, arena.places[name][1])
            for arena in arenas
            for segment in arena.segments
            if segment.treatment.thaws
            for name in segment.names
        ]
        self._borders = sorted({until for until, _ in self._until})
        self._stage = -1

    def turn(self, step: int) -> None:
        """Step ``step`` (from 0) begins."""
        stage = sum(border <= step for border in self._borders)
        if stage != self._stage:
            self._stage = stage
            for until, p in self._until:
                p.requires_grad_(step >= until)

    def release(self) -> None:
        """All may be trained again, whoever does."""
        for _, p in self._until:
            p.requires_grad_(True)
        self._stage = -1


def waiting(arenas: Sequence[Arena]) -> Waiting | None:
    """None where nothing waits."""
    found = any(segment.treatment.thaws for arena in arenas for segment in arena.segments)
    return Waiting(arenas) if found else None


def thaw_of(recipe: Recipe, span: Span) -> int:
    """Updates before the layer furthest from the output trains; 0 where none waits.

    Raises:
        RecipeError: for what is no length.
    """
    text = recipe.optimizer.unfreeze
    if text is None:
        return 0
    return round(span.reach(0.0, length_of("optimizer.unfreeze", text)))


def check_unfreeze(recipe: Recipe, stand: Layout) -> None:
    """
    Raises:
        RecipeError: with what has no place for layers that wait.
    """
    optimizer = recipe.optimizer
    if optimizer.unfreeze is None:
        return
    shares = next((name for name in (optimizer.rule, optimizer.otherwise) if RULES[name].shared), "")
    against = [
        (f"compile='{recipe.compile}'", recipe.compile not in ("off", "auto")),
        (
            f"optimizer.release_gradients='{optimizer.release_gradients}'",
            optimizer.release_gradients not in (None, "off"),
        ),
        ("a model in parts or cut layers", stand.shard > 1 or stand.tensor > 1),
        (f"the rule {shares}, whose rate is one for all parameters", bool(shares)),
    ]
    for what, there in against:
        if there:
            raise RecipeError(
                f"optimizer.unfreeze='{optimizer.unfreeze}' does not go with {what}.",
                "Layers that wait are left out of the backward pass, and of the update.",
                "Leave one of the two out.",
            )


def tell_unfreeze(rows: Sequence[ParameterRow], recipe: Recipe, take: Callable[[str, Any, str], Any]) -> None:
    """When each layer begins."""
    if recipe.optimizer.unfreeze is None:
        return
    first: dict[int, str] = {}
    for row in rows:
        first[row.thaws] = row.name
    told = ", ".join(f"'{name}' {f'after {n} updates' if n else 'at once'}" for n, name in sorted(first.items()))
    take("optimizer.unfreeze", recipe.optimizer.unfreeze, f"layers begin to train in turn: {told}")
