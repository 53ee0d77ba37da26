"""Runs a rule through the engine's program, for tests over the table of rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, fold_of, new_part
from thalweg.optim.eager import eager
from thalweg.optim.program import Program, due_now
from thalweg.optim.shared import first_values, measure, settle
from thalweg.rules import RULES, STAGES, Rule


def trajectory(
    rule: str | Rule,
    starts: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    *,
    lr: float | Sequence[float] = 0.01,
    decay: float = 0.0,
    form: str | None = None,
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    noise: Sequence[Sequence[Tensor]] | None = None,
    tile: int = 1 << 16,
    stack: bool = False,
    keep: list[list[Tensor]] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The parameters ``starts`` after one update for each list of gradients.

    Args:
        lr: a rate, or one for each update.
        keep: a list that gets the parameters after every update.
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    full = rule.options(options)
    found = [(STAGES[name], STAGES[name].options(given)) for name, given in (stages or {}).items()]
    program = Program(
        rule, full, stages=found, decay_form=(form or rule.decay_form) if decay else None, dtype=starts[0].dtype
    )
    ps = [p.clone() for p in starts]
    folds = [fold_of(p.shape) for p in ps]
    slots = [[new_part(program, part, p, fold) for p, fold in zip(ps, folds)] for part in program.parts]
    slots = [mine[:1] if part.shape == "uniform" else mine for part, mine in zip(program.parts, slots)]
    kernel = eager(program, tile=tile, stack=stack)
    shared = first_values(rule, full, ps[0].device, torch.float64)
    rates = [lr] * len(gradients) if isinstance(lr, (int, float)) else list(lr)
    for t, gs in enumerate(gradients, start=1):
        batch = Batch(ps, [g.clone() for g in gs], slots, folds)
        numbers = {"lr": rates[t - 1], "t": float(t), "wd": decay, "peak": max(rates)}
        scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | shared
        if rule.shared:
            shared = settle(program, measure(program, batch, scalars), shared, scalars)
            scalars |= shared
        due = due_now(rule, full, t - 1)
        kernel(batch, scalars, due=due, extra=None if noise is None else {"noise": noise[t - 1]})
        if keep is not None:
            keep.append([p.clone() for p in ps])
    return ps
