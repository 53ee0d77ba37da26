"""Parameters that have been updated together since they began: one count of updates, one program, one kernel.

A parameter that joins later, or misses a step, counts for itself: it gets the bias correction of an optimizer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, is_sharded, new_slots, slots_of
from thalweg.optim.lower import Update, lower
from thalweg.optim.program import DUE, NOT_DUE, Program, due_now


class Cohort:
    """Parameters, their slots, and how they are updated.

    Args:
        slots: for each part of the program what is there already, or None for its first value.

    Attributes:
        t: number of the last applied update, 0-dim float32, on the device.
        tries: updates attempted, on the host: what periodic work is timed by.
    """

    def __init__(
        self,
        program: Program,
        ps: Sequence[Tensor],
        folds: Sequence[str],
        *,
        way: str | None = None,
        slots: Sequence[list[Tensor] | None] | None = None,
        t: Tensor | None = None,
        tries: int = 0,
    ) -> None:
        device = ps[0].device
        self.program = program
        self.ps, self.folds, self.way = list(ps), list(folds), way
        self.t = torch.zeros((), dtype=torch.float32, device=device) if t is None else t
        self.tries = tries
        self.slots = [
            new_slots(program, part, self.ps, self.folds) if mine is None else mine
            for part, mine in zip(program.parts, slots or [None] * len(program.parts))
        ]
        elements = sum(p.numel() for p in ps)
        self.update: Update = lower(program, device=device.type, elements=elements, way=way, keep=True)
        if is_sharded(ps):
            from thalweg.optim.sharded import sharded  # it imports torch.distributed

            self.update = replace(self.update, run=sharded(program, self.update.run))
        self.batch = Batch(self.ps, [], self.slots, self.folds)
        self.ids = [id(p) for p in ps]

    def hold(self, gs: list[Tensor]) -> None:
        """Take the gradients of this step."""
        self.batch.gs = gs

    def count(self, skipped: Tensor | None) -> None:
        """Number the coming update; a skipped one gives its number back."""
        self.t.add_(1 if skipped is None else 1 - skipped.to(torch.float32))

    def run(self, scalars: Mapping[str, Any], extra: Mapping[str, Sequence[Tensor]]) -> None:
        """Update all parameters in place."""
        due = due_now(self.program.rule, self.program.options, self.tries)
        if "curvature" in self.program.tensors:
            due = DUE if "curvature" in extra else NOT_DUE
        if self.update.how == "fused" and scalars.get("divisor") is not None:  # it would write the quotient back
            self.batch.gs = [g.clone() for g in self.batch.gs]
        self.update.run(self.batch, {**scalars, "t": self.t}, due=due, extra=extra)
        self.tries += 1

    def state(self, i: int) -> dict[str, Any]:
        """The state of one parameter, by name; uniform parts and the count are shared tensors."""
        found: dict[str, Any] = {"step": self.t}
        for part, mine in zip(self.program.parts, self.slots):
            found[part.name] = mine[0 if part.shape == "uniform" else i]
        return found

    def split(self, which: Sequence[int]) -> Cohort:
        """A cohort of the parameters numbered ``which``, that goes its own way from here; the slots are the same tensors."""
        slots = slots_of(self.program, self.slots, which)
        ps, folds = [self.ps[i] for i in which], [self.folds[i] for i in which]
        return Cohort(self.program, ps, folds, way=self.way, slots=slots, t=self.t.clone(), tries=self.tries)
