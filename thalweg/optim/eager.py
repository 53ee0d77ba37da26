"""The program run with torch's own operators: tensor by tensor, in tiles that stay in the cache, or stacked by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, blocks, flat, matrix_shape, offsets, views
from thalweg.optim.codecs import BLOCK
from thalweg.optim.program import Program

#: Elements of a tile: fewer cost more calls than the caches give back. AdamW on 50 M elements takes 216 ms a step, 276 with half
#: of them, 435 without tiles (LOG.md).
TILE = 1 << 17

#: Elements of a stack on the CPU: enough matrices for every core to have its own, and temporaries that the C library gives
#: out again instead of asking the system for fresh pages (beyond 32 MiB it always asks; a fresh page costs eight times a used one).
STACK = 1 << 21

Scalars = Mapping[str, Tensor]
#: What a program needs shaped like the gradients, by name: a tensor of each parameter.
Extra = Mapping[str, Sequence[Tensor]] | None
#: ``kernel(batch, scalars, due=, extra=)``: updates the batch in place, unless the scalar "skipped" is 1.
Kernel = Callable[..., None]


def eager(program: Program, *, tile: int = TILE, stack: bool = False) -> Kernel:
    """A kernel that runs the program as it is written.

    Args:
        tile: elements at a time, for programs that work element by element; 0: whole tensors.
        stack: equal shapes in one batched call, for programs that read matrices.
    """

    def kernel(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        if not batch.ps:
            return
        scalars = as_tensors(scalars, program.exact, batch.ps[0].device)
        skipped = scalars.get("skipped")
        last: list[Tensor] = []
        groups = _by_shape(program, batch) if stack else [[i] for i in range(len(batch.ps))]
        places = list(offsets(batch))
        for group in groups:
            if program.reads != "element" and not batch.ps[group[0]].numel():
                continue  # a matrix without rows has no mean and no largest element
            if program.stacks:
                last = _stacked(program, batch, group, scalars, due, extra, skipped)
                continue
            i = group[0]
            mine = {name: tensors[i] for name, tensors in (extra or {}).items()}
            if program.reads == "element" and (tile or program.blocked):
                last = _tiled(program, batch, i, scalars, places[i], tile or batch.ps[i].numel(), due, mine, skipped)
            else:
                last = _whole(program, batch, i, scalars, places[i], due, mine, skipped)
        for part, stored, new in zip(program.parts, batch.slots, last):
            if part.shape == "uniform":
                write(stored[0], new, skipped)

    return kernel


def as_tensors(scalars: Mapping[str, Any], exact: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Scalars as 0-dim tensors on the device."""
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=exact, device=device)
        for name, value in scalars.items()
    }


def write(old: Tensor, new: Tensor, skipped: Tensor | None) -> None:
    """``new`` into ``old``, of as many elements, unless ``skipped`` is 1."""
    write_all([(old, new)], skipped)


def write_all(pairs: Sequence[tuple[Tensor, Tensor]], skipped: Tensor | None) -> None:
    """``write`` for what belongs together: memory is taken before the first of them is written, so that all are or none is."""
    ready = []
    for old, new in pairs:
        shaped = new if new.shape == old.shape else new.reshape(old.shape)
        ready.append(shaped if skipped is None else torch.where(skipped > 0, old, shaped))
    for (old, _), new in zip(pairs, ready):
        old.copy_(new)


def _whole(
    program: Program,
    batch: Batch,
    i: int,
    scalars: Scalars,
    place: int,
    due: int,
    extra: Mapping[str, Tensor],
    skipped: Tensor | None,
) -> list[Tensor]:
    p, g, stored = views(program, batch, i)
    index = _index(p, place) if program.random else None
    drawn = {name: tensor.reshape(p.shape) for name, tensor in extra.items()}
    ndim = batch.ps[i].ndim
    new, *parts = program.run(p, g, stored, scalars, index=index, due=due, extra=drawn, ndim=ndim)
    kept = [(mine[i], v) for part, mine, v in zip(program.parts, batch.slots, parts) if part.shape != "uniform"]
    write_all([(batch.ps[i], new), *kept], skipped)
    return parts


def _tiled(
    program: Program,
    batch: Batch,
    i: int,
    scalars: Scalars,
    place: int,
    tile: int,
    due: int,
    extra: Mapping[str, Tensor],
    skipped: Tensor | None,
) -> list[Tensor]:
    p, size = batch.ps[i], batch.ps[i].numel()
    flat_p, flat_g = as_lain(p, p), as_lain(batch.gs[i], p)
    drawn = {name: as_lain(tensor, p) for name, tensor in extra.items()}
    per_element = [part.shape == "like" for part in program.parts]
    stored = [
        as_lain(mine[i], p) if like else (mine[0] if part.shape == "uniform" else mine[i])
        for part, mine, like in zip(program.parts, batch.slots, per_element)
    ]
    tile = max(tile // BLOCK, 1) * BLOCK
    parts: list[Tensor] = []
    for start in range(0, max(size, 1), tile):
        stop = min(start + tile, size)
        cut = slice(start, stop)
        rows = slice(start // BLOCK, -(-stop // BLOCK))
        seen_p, seen_g = flat_p[cut], flat_g[cut]
        pieces = {"like": cut, "block": rows}
        old = [s[pieces[part.shape]] if part.shape in pieces else s for s, part in zip(stored, program.parts)]
        index = _index(seen_p, place + start) if program.random else None
        more = {name: tensor[cut] for name, tensor in drawn.items()}
        given = old
        if program.blocked:
            seen_p, seen_g, given = in_blocks(program, seen_p, seen_g, old)
            index = None if index is None else blocks(index)
            more = {name: blocks(tensor) for name, tensor in more.items()}
        new, *parts = program.run(seen_p, seen_g, given, scalars, index=index, due=due, extra=more, ndim=p.ndim)
        targets = [(old, value) for old, value in zip([flat_p[cut], *old], [new, *parts]) if old.ndim]
        write_all([(old, value.reshape(-1)[: old.numel()]) for old, value in targets], skipped)
    for flattened, part in ((flat_p, p), *((s, m[i]) for s, m, like in zip(stored, batch.slots, per_element) if like)):
        if torch.compiler.is_compiling():  # of an arena, which has no gaps
            break
        if flattened.data_ptr() != part.data_ptr():  # a copy, because the tensor has gaps
            part.copy_(flattened.view(p.shape) if flat(p) is None else flattened.as_strided(p.shape, p.stride()))
    return parts


def as_lain(x: Tensor, p: Tensor) -> Tensor:
    """The elements of ``x`` in the order in which those of ``p`` lie; a copy where memory cannot be seen that way."""
    if x.stride() != p.stride() and x.numel():
        if flat(p) is None:  # it has gaps: both are taken in the order of their indices
            return x.reshape(-1)
        x = torch.empty_like(p, dtype=x.dtype).copy_(x)
    lain = flat(x)
    return x.reshape(-1) if lain is None else lain


def in_blocks(program: Program, p: Tensor, g: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A parameter, its gradient and its stored parts as rows of ``BLOCK``, for codecs with a scale for each."""
    stored = [
        blocks(as_lain(s, p), part) if part.shape == "like" else s[:, None] if part.shape == "block" else s
        for part, s in zip(program.parts, parts)
    ]
    return blocks(as_lain(p, p)), blocks(as_lain(g, p)), stored


def _stacked(
    program: Program,
    batch: Batch,
    group: Sequence[int],
    scalars: Scalars,
    due: int,
    extra: Extra,
    skipped: Tensor | None,
) -> list[Tensor]:
    seen = [views(program, batch, i) for i in group]
    uniform = [part.shape == "uniform" for part in program.parts]
    stored = [seen[0][2][k] if alone else _join([parts[k] for _, _, parts in seen]) for k, alone in enumerate(uniform)]
    p, g = _join([s[0] for s in seen]), _join([s[1] for s in seen])
    shape = seen[0][0].shape
    drawn = {name: _join([tensors[i].reshape(shape) for i in group]) for name, tensors in (extra or {}).items()}
    ndim = batch.ps[group[0]].ndim
    new, *parts = program.run(p, g, stored, scalars, due=due, extra=drawn, ndim=ndim)
    pairs = []
    for k, i in enumerate(group):
        pairs.append((batch.ps[i], new[k]))
        pairs += [(mine[i], value[k]) for mine, value, alone in zip(batch.slots, parts, uniform) if not alone]
    write_all(pairs, skipped)
    return parts


def _join(xs: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as a batch; one alone is a batch too, so that it meets the same operators, and the same bits."""
    return torch.stack(list(xs)) if len(xs) > 1 else xs[0].contiguous()[None]


def _by_shape(program: Program, batch: Batch) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, p in enumerate(batch.ps):
        key = (matrix_shape(p.shape, batch.fold(i)), p.ndim)
        groups.setdefault(key if program.stacks else (i,), []).append(i)
    if batch.ps[0].device.type != "cpu":
        return list(groups.values())
    return [stack for group in groups.values() for stack in stacks(group, batch.ps[group[0]].numel())]


def stacks(group: Sequence[int], elements: int) -> list[list[int]]:
    """``group`` in portions that fit into a stack, at ``elements`` each; at least one."""
    many = max(1, STACK // max(elements, 1))
    return [list(group[k : k + many]) for k in range(0, len(group), many)]


def _index(p: Tensor, place: int) -> Tensor:
    return torch.arange(place, place + p.numel(), dtype=torch.int32, device=p.device).view(p.shape)
