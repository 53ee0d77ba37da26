"""Gradients added up in one order, whoever computes them: ``exact_reduce``.

A plain sum over ranks is ((m0 + m2) + (m1 + m3)) where one process adds (((m0 + m1) + m2) + m3), and rounding tells them apart.
Here each micro-batch's gradient stays apart until it is added to the total at its turn, by one process or by many: on ranks each
gets its piece of the gradients of a round, adds them in the order of ranks, and the pieces are put together at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.core import DeviceError, Recipe, RecipeError
from thalweg.data import batch_size
from thalweg.device import Device
from thalweg.engine.portions import OnePass, go_through

if TYPE_CHECKING:
    from thalweg.engine.step import Step


class InOrder:
    """The sums of a window, micro-batch by micro-batch.

    Args:
        step: whose gradients, sums and statistics they are.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.ranks = step, step.ranks
        arenas, world = step.state.arenas, self.ranks.world
        self._sizes = [-(-arena.grads.numel() // world) for arena in arenas]  # of a rank's piece
        self._totals = [torch.zeros(size, dtype=a.grads.dtype, device=a.device) for a, size in zip(arenas, self._sizes)]

    def accumulate(self, parts: Sequence[Any], one: OnePass, *, counted: bool) -> list[Any]:
        """As ``Step._accumulate``: afterwards gradients and all that is counted are sums over the window of all ranks."""
        for total in self._totals:
            total.zero_()
        counts: Tensor | None = None
        done: list[Any] = []
        first = 0
        micros = self._micro_batches(parts)
        for turn in range(self.ranks.largest(len(micros))):
            with torch.no_grad():
                if turn:
                    for arena in self.step.state.arenas:
                        arena.grads.zero_()
                    if counted:
                        count_anew(self.step)
            if turn < len(micros):
                went = self._through(micros[turn], one, len(done), first, counted)
                first += sum(map(batch_size, micros[turn]))
                done += went
            with torch.no_grad():
                self._add_gradients()
                if counted:
                    counts = counted_in_order(self.step, counts)
        with torch.no_grad():
            self._give_back(counts)
        return done

    def _micro_batches(self, parts: Sequence[Any]) -> list[list[Any]]:
        """The portions of each micro-batch; memory may have cut each into several."""
        size, held = self.step.options.micro_batch, 0
        found: list[list[Any]] = []
        for part in parts:
            if not found or held >= size > 0 or not size:
                found.append([])
                held = 0
            found[-1].append(part)
            held += batch_size(part)
        return found

    def _through(self, micro: list[Any], one: OnePass, index: int, first: int, counted: bool) -> Sequence[Any]:
        """The passes of one micro-batch; what fails in it is done again without the others."""

        def numbered(place: int, sample: int, batch: Any, last: bool) -> int:
            return one(index + place, first + sample, batch, False)

        return go_through(micro, numbered, self.step.state.limit, self.step.undo, counted=counted)

    def _add_gradients(self) -> None:
        world = self.ranks.world
        for arena, total, size in zip(self.step.state.arenas, self._totals, self._sizes):
            arena.hold_gradients()
            flat = arena.grads
            if world > 1 and flat.numel() < size * world:
                flat = torch.cat([flat, flat.new_zeros(size * world - flat.numel())])
            for theirs in self.ranks.exchange(flat.view(world, size)):
                total += theirs

    def _give_back(self, counts: Tensor | None) -> None:
        """Totals of the window where the gradients and sums of one micro-batch were."""
        step = self.step
        for arena, total in zip(step.state.arenas, self._totals):
            whole = self.ranks.gather(total).reshape(-1)
            arena.grads.copy_(whole[: arena.grads.numel()])
        if counts is not None:
            step.take_counted(counts)


@torch.no_grad()
def count_anew(step: Step) -> None:
    """Nothing of the next micro-batch has been counted; what the last one counted is in the totals."""
    step.sums.zero_()
    if step.state.statistics.layers:
        step.state.statistics.restore()
        step.state.statistics.begin()


@torch.no_grad()
def counted_in_order(step: Step, counts: Tensor | None) -> Tensor:
    """``counts`` of the rounds before, and what each rank has counted in this one, in the order of ranks."""
    mine = step.counted()
    counts = torch.zeros_like(mine) if counts is None else counts
    for theirs in step.ranks.gather(mine):
        counts += theirs
    return counts


def check_exact(recipe: Recipe, device: Device) -> None:
    """Refuse what cannot be added up in one order.

    Raises:
        RecipeError: for gradients that are used before they are summed.
        DeviceError: for a device without float64.
    """
    passes = recipe.optimizer.release_gradients
    if not recipe.exact_reduce:
        return
    if passes not in (None, "off"):
        raise RecipeError(
            f"exact_reduce does not go with optimizer.release_gradients='{passes}'.",
            "A gradient is used and freed in the backward pass, and there is none left to add up in order.",
            "Give optimizer.release_gradients='off', or leave exact_reduce out.",
        )
    if device.exact is not torch.float64:
        raise DeviceError(
            f"exact_reduce is not possible on {device.kind}.",
            "Its norms add up in float64, and the device has no such numbers.",
            "Leave exact_reduce out, or train with device='cpu'.",
        )
