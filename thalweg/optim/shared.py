"""Numbers that belong to all parameters together, for rules that estimate one for the whole model (Prodigy, D-Adaptation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, views
from thalweg.optim.program import Program
from thalweg.rules import Rule


def first_values(rule: Rule, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A rule's shared numbers before the first update."""
    starts = {name: options[start] if isinstance(start, str) else start for name, start in rule.shared.items()}
    return {name: torch.full((), float(value), dtype=dtype, device=device) for name, value in starts.items()}


def measure(program: Program, batch: Batch, scalars: Mapping[str, Tensor]) -> list[Tensor]:
    """The sums of the rule's ``measure`` over a batch, in the dtype of the scalars."""
    rule = program.rule
    assert rule.measure is not None
    piece = next(piece for piece in program.pieces if piece.component is rule)
    known = program._known(scalars, due=False, ndim=2)
    words = {name: scalars[name].to(program.exact) for name in ("lr", "t", *rule.shared)}
    sums: list[Tensor] = []
    for i in range(len(batch.ps)):
        p, g, stored = views(program, batch, i)
        start, seen, slots = program.prepare(p, g, stored, known)
        mine = slots[piece.first : piece.first + piece.num]
        found = [value.to(program.exact) for value in rule.measure(start, seen, *mine, **words, **piece.options)]
        sums = found if not sums else [a + b for a, b in zip(sums, found)]
    return sums


def settle(
    program: Program, sums: Sequence[Tensor], shared: Mapping[str, Tensor], scalars: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New values of the shared numbers, from the sums over everything."""
    rule = program.rule
    assert rule.settle is not None
    words = {"lr": scalars["lr"].to(program.exact), "t": scalars["t"].to(program.exact)}
    return dict(rule.settle(*sums, **words, **shared, **program.options))
