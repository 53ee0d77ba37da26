"""What a rank holds where several share a model, and what they send: exact counts of the parts, and what is whole for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import Layout, Ledger, ParameterRow, Recipe
from thalweg.device.chips import Chip
from thalweg.engine.blocks import repeated_blocks
from thalweg.engine.precision import gradient_dtype
from thalweg.engine.tensor_plan import CutPiece, tensor_cuts
from thalweg.optim import named_trainable, plain_name
from thalweg.optim.arena import How, make_arenas
from thalweg.optim.sizes import StateSizes, state_sizes

#: Chips of one machine, and bytes a second that each of them has between machines (400 Gb/s): data sheets tell of neither.
MACHINE, NETWORK = 8, 50e9


def part_of(shape: Sequence[int], num: int, rank: int | None = None) -> tuple[int, ...]:
    """The shape of a rank's part of a parameter that is cut along its first dimension, as ``torch.chunk`` cuts it.

    Args:
        rank: whose part; None: the room that every rank has for it, which is the largest part's.

    >>> part_of((10, 3), 4), [part_of((10, 3), 4, rank) for rank in range(4)]
    ((3, 3), [(3, 3), (3, 3), (3, 3), (1, 3)])
    """
    rows = -(-shape[0] // num)
    if rank is not None:
        rows = max(0, min(rows, shape[0] - rank * rows))
    return (rows, *shape[1:])


def rank_sizes(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    model: nn.Module,
    kind: str,
    layout: Layout,
    whole: StateSizes,
) -> StateSizes:
    """Bytes of the training state on the rank that has most.

    Rules that work element by element keep slots of their parts. What a rule must see whole is kept by an owner: its slots are
    shared out by parameters, and counted here as if they went evenly.

    Args:
        whole: of one rank that holds all of it.
    """
    if layout.shard == 1 and layout.tensor == 1:
        return whole
    named = dict(named_trainable(model))
    average = recipe.regularize.averages and recipe.regularize.average_form != "window"
    makes: dict[str, Any] = {"average": average, "device_kind": kind, "gradients": gradient_dtype(recipe)}
    apart = _seen_whole(named, rows, recipe, average)
    shapes = {name: tuple(p.shape) for name, p in named.items()} | tensor_shapes(model, recipe, layout.tensor)
    cut: dict[str, Tensor] = {name: _cut(p, shapes[name], layout.shard) for name, p in named.items()}
    parts = state_sizes(list(cut.items()), rows, recipe.optimizer, **makes)
    if not apart:
        kept, own = parts, StateSizes(0, 0, 0, 0)
    else:
        kept = _sizes_of({n: p for n, p in cut.items() if n not in apart}, rows, recipe, makes)
        own = _sizes_of({n: p for n, p in named.items() if n in apart}, rows, recipe, makes)
    share = layout.shard
    extra = -(-max(0, whole.averages - _plain_averages(named, rows, recipe, makes)) // share)
    return StateSizes(
        parts.parameters,
        parts.gradients,
        kept.slots + -(-own.slots // share),
        kept.averages + -(-own.averages // share) + extra,
        kept.offloaded + -(-own.offloaded // share),
        max(kept.update, own.update, -(-whole.update // share)),
    )


def tensor_shapes(model: nn.Module, recipe: Recipe, world: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a rank's parts of what is cut where ``world`` ranks compute layers together.

    Raises:
        ModelError, RecipeError: for a model that cannot be cut so.
    """
    found: dict[str, tuple[int, ...]] = {}
    for cut in tensor_cuts(model, recipe, world) if world > 1 else ():
        for key, p in model.get_submodule(cut.name).named_parameters(recurse=False):
            if key == "weight" or cut.dim == 0:
                found[plain_name(f"{cut.name}.{key}")] = CutPiece(tuple(p.shape), world, cut.dim, cut.packs).size
    return found


def _cut(p: Tensor, shape: tuple[int, ...], num: int) -> Tensor:
    return nn.Parameter(torch.empty(part_of(shape, num) if shape else shape, dtype=p.dtype, device="meta"))


def _sizes_of(named: Mapping[str, Tensor], rows: Sequence[ParameterRow], recipe: Recipe, makes: Any) -> StateSizes:
    return state_sizes(list(named.items()), rows, recipe.optimizer, **makes) if named else StateSizes(0, 0, 0, 0)


def _plain_averages(named: Mapping[str, Tensor], rows: Sequence[ParameterRow], recipe: Recipe, makes: Any) -> int:
    """Of the averages, what moves in the update; the rest are copies of the weights."""
    return _sizes_of(named, rows, recipe, makes).averages


def _seen_whole(named: Mapping[str, Tensor], rows: Sequence[ParameterRow], recipe: Recipe, average: bool) -> set[str]:
    """Parameters whose update reads more than one element at a time."""
    how = How(slots=recipe.optimizer.slots or "full", rounding=recipe.optimizer.rounding, average=average, way="eager")
    shapes = [(name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))) for name, p in named.items()]
    segments = [s for arena in make_arenas(shapes, rows, recipe.optimizer, how) for s in arena.segments]
    return {name for s in segments if s.program.reads != "element" or s.program.blocked for name in s.names}


def gathered(model: nn.Module, layout: Layout, gradients: int, micro_batches: int) -> int:
    """Bytes that are whole for a while on each rank, at most, where parameters lie in parts.

    What is outside of the blocks is gathered once a pass and stays; of blocks, the one that runs and the next. A block's
    gradient is whole twice, as it was computed and as it is sent. With several micro-batches on a rank, gradients stay whole
    until the last of them, because they are sent once a step.

    Args:
        gradients: bytes of all gradients, whole.
        micro_batches: of a rank in a step.
    """
    if layout.shard == 1:
        return 0
    outside, block = _outside_and_block(model)
    if micro_batches > 1:
        return outside + 2 * block + gradients + max(block, outside)
    return 2 * outside + max(4 * block, outside)


def _outside_and_block(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters outside of the blocks, and of the largest block."""
    blocks = list(repeated_blocks(model).values())
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return outside, max((sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)


def on_rank(whole: Ledger, mine: StateSizes, gathered_bytes: int) -> Ledger:
    """The ledger of a rank, from that of one that holds everything."""
    saved = whole.parameters + whole.gradients + whole.slots + whole.averages
    saved -= mine.parameters + mine.gradients + mine.slots + mine.averages
    return replace(
        whole,
        parameters=mine.parameters,
        gradients=mine.gradients,
        slots=mine.slots,
        averages=mine.averages,
        gathered=gathered_bytes,
        peak=whole.peak - saved + gathered_bytes,
    )


def talk_seconds(chip: Chip, layout: Layout, weights: int, gradients: int, micro_batches: int) -> float:
    """Seconds that ranks talk in a step, as if nothing ran meanwhile.

    Every pass gathers weights twice; gradients are sent once a step, whatever the accumulation.

    Args:
        weights, gradients: bytes of the whole model's.
        micro_batches: of a rank in a step.
    """
    d, s = layout.data, layout.shard
    gather = 2 * micro_batches * (s - 1) / s * weights / _rate(chip, s)
    scatter = (s - 1) / s * gradients / _rate(chip, s)
    add = 2 * (d - 1) / d * (gradients / s) / _rate(chip, d * s if d > 1 else 1)
    return gather + scatter + add


def _rate(chip: Chip, among: int) -> float:
    return chip.link if among <= MACHINE else min(chip.link, NETWORK)


def candidates(recipe: Recipe, model: nn.Module, ranks: int, on_each: int = MACHINE) -> Iterator[tuple[Layout, Recipe]]:
    """What ``parallel = "auto"`` chooses from, the simplest first."""
    yield Layout(data=ranks), recipe
    shapes = [Layout(shard=ranks)]
    if on_each < ranks and ranks % on_each == 0:
        shapes.insert(0, Layout(data=ranks // on_each, shard=on_each))
    for layout in shapes:
        yield layout, recipe
    if recipe.recompute is None and repeated_blocks(model):
        for layout in shapes:
            yield layout, replace(recipe, recompute="blocks")


def told(layout: Layout, recipe: Recipe | None = None) -> str:
    """A layout for people.

    >>> told(Layout(data=8, shard=8)), told(Layout(data=4)), told(Layout(data=4, tensor=2))
    ('hsdp (data=8, shard=8)', 'ddp', 'data=4, tensor=2')
    """
    if layout.tensor > 1:
        return str(layout)
    name = layout.form if layout.form != "hsdp" else f"hsdp ({layout})"
    again = recipe is not None and recipe.recompute not in (None, "none")
    return f"{name}, recompute={recipe.recompute}" if again and recipe is not None else name
