"""``parallel = "auto"``: the simplest form that fits each rank's memory, and what the others would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from thalweg.core import Form, Layout, Ledger, Recipe, human_bytes
from thalweg.engine.checks import whole_of
from thalweg.engine.memory.bench import Bench
from thalweg.engine.memory.layouts import gathered, on_rank, rank_sizes, told


@dataclass(frozen=True)
class Way:
    """One form, planned.

    Attributes:
        recipe: complete, as it would be trained so.
        ledger: bytes on the rank that has most.
    """

    layout: Layout
    recipe: Recipe
    ledger: Ledger

    @property
    def name(self) -> str:
        return told(self.layout, self.recipe)


def pick(ways: Sequence[Way], asked: Layout | None, limit: int) -> Way:
    """Of those asked for, the first that fits; the least where none does.

    Args:
        ways: the simplest first.
        asked: None: any.
        limit: bytes of a rank.
    """
    open_ = [way for way in ways if asked is None] or [way for way in ways if way.layout == asked][:1]
    return next((way for way in open_ if way.ledger.peak <= limit), min(open_, key=lambda way: way.ledger.peak))


def forms_of(ways: Sequence[Way], chosen: Way, limit: int, seconds: Callable[[Way], float | None]) -> tuple[Form, ...]:
    """All of them, for people."""
    return tuple(
        Form(way.name, way.ledger, seconds(way), way.ledger.peak <= limit, chosen=way is chosen) for way in ways
    )


def tell_form(ways: Sequence[Way], chosen: Way, limit: int, take: Callable[[str, Any, str], object]) -> None:
    """Why it is this one, in numbers."""
    before = ways[: next(i for i, way in enumerate(ways) if way is chosen)]
    fits = chosen.ledger.peak <= limit
    why = "the simplest that fits" if fits else "takes the least, and does not fit"
    if not fits:
        before = [way for way in ways if way is not chosen]
    peak = f"predicted peak {human_bytes(chosen.ledger.peak)} of {human_bytes(limit)} on a rank"
    others = "".join(f"; {way.name} would take {human_bytes(way.ledger.peak)}" for way in before)
    take("parallel", chosen.name, f"{why}: {peak}{others}")


def rank_ledger(bench: Bench, recipe: Recipe, layout: Layout) -> Ledger:
    """Of the rank that has most, from that of one process with everything."""
    whole = bench.ledger(recipe, layout.feeds)
    if layout.shard == 1 and layout.tensor == 1:
        return whole
    sizes, rows = bench.sizes(recipe), bench.plan_of(recipe).parameters
    num = -(-recipe.train.batch // whole_of(recipe.train.micro_batch))
    here = rank_sizes(recipe, rows, bench.model, bench.device.kind, layout, sizes)
    return on_rank(whole, here, gathered(bench.model, layout, sizes.gradients, -(-num // layout.feeds)))
