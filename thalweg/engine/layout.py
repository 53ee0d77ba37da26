"""How the ranks of a run stand: what the recipe asks for, or what its memory asks for."""

from __future__ import annotations

from thalweg.core import Layout, Recipe, RecipeError
from thalweg.core.parallel import layout_of, told
from thalweg.engine.settle import Decisions
from thalweg.parallel import Ranks, ranks_on_each


def settle_layout(recipe: Recipe, ranks: Ranks, decide: Decisions) -> Layout:
    """How the ranks stand, and why.

    Raises:
        RecipeError: for what these ranks cannot be.
    """
    asked = recipe.parallel
    if ranks.world == 1:
        if asked != "auto":
            decide.take("parallel", told(asked), "not used: one rank holds all of it, and it is the same run")
        return Layout()
    layout = layout_of(asked, ranks.world, ranks_on_each(ranks.world))
    if layout is None:
        layout = Layout(data=ranks.world)
        decide.take("parallel", "ddp", "each rank holds the whole model, and one sum a step is all that is sent")
    check_layout(layout, asked)
    return layout


def check_layout(layout: Layout, asked: object) -> None:
    """Refuse what is not there."""
    if layout.shard > 1 or layout.tensor > 1:
        raise RecipeError(
            f"parallel={told(asked)} is not possible.",  # type: ignore[arg-type]
            f"It spreads parameters: {layout}.",
            "Use parallel='ddp'.",
        )
