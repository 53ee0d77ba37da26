"""Updates whose numbers lie in the same tensors in every step: what each segment is given is put together once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from thalweg.optim.arena import Arena, Segment, numbers_of, update
from thalweg.optim.memory import memory
from thalweg.optim.program import due_now


class Bound:
    """``update`` of arenas on the CPU, by numbers that stay where they are.

    Args:
        numbers: as for ``update``; their values are read anew in each step, the tensors are held.
        single: the divisor in float32, which whoever writes the divisor writes too.
    """

    def __init__(self, arenas: Sequence[Arena], numbers: Mapping[str, Any], single: torch.Tensor) -> None:
        self.arenas, self.numbers = arenas, numbers
        given = numbers_of(arenas[0].scalar_dtype, **numbers)
        self.given = {**given, "single divisor": single}
        #: (a segment's own rate, the scheduled one, factor) where they differ
        self.rates: list[tuple[Any, Any, float]] = []
        self.calls: list[Callable[[int], None]] | None = None
        if all(self._stays(arena) for arena in arenas):
            self.calls = [self._call(arena, segment) for arena in arenas for segment in arena.segments]

    @staticmethod
    def _stays(arena: Arena) -> bool:
        """Whether an arena's update makes no tensor of the numbers before it uses them."""
        return type(arena) is Arena and not arena.shared and not any(s.treatment.moves for s in arena.segments)

    def _call(self, arena: Arena, segment: Segment) -> Callable[[int], None]:
        scalars = arena.scalars(segment, self.given)
        if segment.treatment.lr != 1:
            scalars["lr"] = torch.zeros((), dtype=arena.scalar_dtype)
            self.rates.append((memory(scalars["lr"]), memory(self.given["lr"]), segment.treatment.lr))
        run, batch, program = segment.update.run, segment.batch, segment.program
        if segment.update.bind is not None and (call := segment.update.bind(batch, scalars)) is not None:
            return lambda due: call()
        if program.rule.clock is None and "noise" not in program.tensors:
            return lambda due: run(batch, scalars, due=due_now(program.rule, program.options, due))
        return lambda due: arena.run_one(segment, scalars, due=due)

    def __call__(self, due: int) -> None:
        """One update; ``due`` as for ``update``."""
        if self.calls is None:
            update(self.arenas, **self.numbers, due=due)
            return
        for own, rate, factor in self.rates:
            own[0] = rate[0] * factor
        for arena in self.arenas:
            arena.torn = True
        for call in self.calls:
            call(due)
        for arena in self.arenas:
            arena.updated()
