"""What a recipe leaves open about memory is filled in: by itself nothing is given up; a budget chooses by measured price."""

from __future__ import annotations

from dataclasses import replace

from thalweg.core import Recipe


def settle_memory(recipe: Recipe) -> Recipe:
    """The recipe with slots, release of gradients, offload and recomputation filled in, as they are without a budget."""
    optimizer = recipe.optimizer
    settled = replace(
        optimizer,
        slots=optimizer.slots or "full",
        release_gradients=optimizer.release_gradients or "off",
        offload=bool(optimizer.offload),
    )
    return replace(recipe, optimizer=settled, recompute=recipe.recompute or "none")
