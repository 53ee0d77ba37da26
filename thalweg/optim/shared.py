"""Numbers that belong to all parameters together, for rules that estimate one for the whole model (Prodigy, D-Adaptation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, flat, is_sharded, views
from thalweg.optim.eager import as_tensors, in_blocks, write
from thalweg.optim.lower import WORTH_COMPILING
from thalweg.optim.program import Program
from thalweg.rules import Rule


def first_values(rule: Rule, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A rule's shared numbers before the first update."""
    starts = {name: options[start] if isinstance(start, str) else start for name, start in rule.shared.items()}
    return {name: torch.full((), float(value), dtype=dtype, device=device) for name, value in starts.items()}


def measure(program: Program, batch: Batch, scalars: Mapping[str, Any]) -> list[Tensor]:
    """The sums of the rule's ``measure`` over a batch, in the dtype of the scalars; one pass where a kernel can be built."""
    if is_sharded(batch.ps):
        return _sharded(program, batch, scalars)
    if batch.ps[0].device.type == "cpu" and sum(p.numel() for p in batch.ps) >= WORTH_COMPILING:
        kernel = _kernel(program)
        lies_alike = all(p.stride() == g.stride() and flat(p) is not None for p, g in zip(batch.ps, batch.gs))
        if kernel is not None and lies_alike and batch.gs[0].dtype == program.dtype:
            return kernel(batch, scalars)
    given = as_tensors(scalars, program.exact, batch.ps[0].device)
    sums: list[Tensor] = []
    for i in range(len(batch.ps)):
        p, g, stored = views(program, batch, i)
        if program.blocked:
            p, g, stored = in_blocks(program, p, g, stored)
        found = [value.to(program.exact) for value in _measured(program, p, g, stored, given)]
        sums = found if not sums else [a + b for a, b in zip(sums, found)]
    return sums


def _sharded(program: Program, batch: Batch, scalars: Mapping[str, Any]) -> list[Tensor]:
    """Each rank measures its own part; what it found is added up over the ranks."""
    from thalweg.optim.sharded import added_up, layout, local

    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(batch.ps):
        groups.setdefault(layout(p), []).append(i)
    found = []
    for which in groups.values():
        slots = [part if len(part) < len(batch.ps) else [local(part[i]) for i in which] for part in batch.slots]
        part = Batch([local(batch.ps[i]) for i in which], [local(batch.gs[i]) for i in which], slots)
        found.append([added_up(value, batch.ps[which[0]]) for value in measure(program, part, scalars)])
    return [torch.stack(values).sum() for values in zip(*found)]


def _measured(
    program: Program, p: Tensor, g: Tensor, stored: Sequence[Tensor], scalars: Mapping[str, Tensor]
) -> Sequence[Tensor]:
    """The rule's ``measure`` of one parameter, on the gradient as the rule will see it."""
    rule = program.rule
    assert rule.measure is not None
    piece = next(piece for piece in program.pieces if piece.component is rule)
    start, seen, slots = program.prepare(p, g, stored, program.known(scalars, due=False, ndim=2))
    words = {name: scalars[name].to(program.exact) for name in ("lr", "t", *rule.shared)}
    options = {n: scalars[n].to(program.exact) if isinstance(v, Tensor) else v for n, v in piece.options.items()}
    sums: Sequence[Tensor] = rule.measure(
        start, seen, *slots[piece.first : piece.first + piece.num], **words, **options
    )
    return sums


@cache
def _kernel(program: Program) -> Callable[[Batch, Mapping[str, Any]], list[Tensor]] | None:
    """The measuring as compiled C, or None where it cannot be."""
    from thalweg.optim.native import NoCompiler, native_sums
    from thalweg.optim.trace import Untraceable

    parts = [part for part in program.parts if part.shape == "like"]
    if program.reads != "element" or program.blocked or len(parts) != len(program.parts):
        return None
    names = tuple(dict.fromkeys((*program.scalars, *program.rule.shared)))
    inputs = {"p": ("full", program.dtype), "g": ("full", program.dtype)}
    inputs |= {part.name: ("full", program.dtype_of(part)) for part in parts}
    inputs |= dict.fromkeys(names, ("uniform", program.exact))

    def function(**given: Tensor) -> Sequence[Tensor]:
        stored = [given[part.name] for part in parts]
        return _measured(program, given["p"], given["g"], stored, {name: given[name] for name in names})

    num = len(
        function(**{name: torch.zeros((2, 2) if kind == "full" else (), dtype=d) for name, (kind, d) in inputs.items()})
    )
    try:
        caller = native_sums(function, inputs, num)
    except (NoCompiler, Untraceable):
        return None
    return lambda batch, scalars: list(caller([batch.ps, batch.gs, *batch.slots], scalars).clone())


def settle(
    program: Program, sums: Sequence[Tensor], shared: Mapping[str, Tensor], scalars: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New values of the shared numbers, from the sums over everything."""
    rule = program.rule
    assert rule.settle is not None
    words = {"lr": scalars["lr"].to(program.exact), "t": scalars["t"].to(program.exact)}
    given = next(piece for piece in program.pieces if piece.component is rule).options
    options = {n: scalars[n].to(program.exact) if isinstance(v, Tensor) else v for n, v in given.items()}
    return dict(rule.settle(*sums, **words, **shared, **options))


def settle_over(
    measured: Sequence[tuple[Program, Batch, Mapping[str, Any]]],
    shared: Mapping[str, Tensor],
    *,
    rates: Sequence[Tensor],
    skipped: Tensor | None,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> None:
    """Settle ``shared`` in place: measured over all parameters of a rule, settled once, with the largest rate.

    Args:
        measured: (program of the rule, batch, its scalars), of which the first has the "t" that counts.
        rates: 0-dim, in the dtype of the scalars.
        skipped: where it is 1, nothing changes.
        total: a sum over all parameters, from the sums over those that are here.
    """
    found = [measure(program, batch, {**scalars, **shared}) for program, batch, scalars in measured]
    sums = list(total(torch.stack([torch.stack(values).sum() for values in zip(*found)])).unbind())
    program, _, first = measured[0]
    new = settle(program, sums, shared, {**first, "lr": torch.stack(list(rates)).max()})
    for name, value in new.items():
        write(shared[name], value, skipped)
