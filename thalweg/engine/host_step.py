"""The training step on the CPU: passes and updates are torch's, and the numbers between them are reckoned in place by Python.

On a device every number of a step stays a tensor, for nothing may wait for it. Here nothing waits: the same numbers lie in the
same tensors, and what an operator of torch's does in 1 to 3 us, Python does in the tensor's own memory in 0.1, with the same
bits. Of the plain step's 45 small operators five are left.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.core import Recipe
from thalweg.data import batch_size
from thalweg.device import Device
from thalweg.engine.backward import backward
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.step import RING, Step
from thalweg.optim.bound import Bound
from thalweg.optim.memory import memory, over
from thalweg.optim.norm import global_norm
from thalweg.parallel import Ranks
from thalweg.precision import Policy


def suits(recipe: Recipe, policy: Policy, device: Device, ranks: Ranks) -> bool:
    """Whether a run's steps ask for nothing but what is done here."""
    train, regularize, guard = recipe.train, recipe.regularize, recipe.guard
    return (
        device.kind == "cpu"
        and ranks.world == 1
        and recipe.compile in ("off", "auto")
        and recipe.optimizer.release_gradients in (None, "off")
        and not recipe.optimizer.unfreeze
        and not (policy.scaled or policy.islands or guard.active or recipe.exact_reduce)
        and not (train.clip_history or regularize.sharpness)
    )


class HostStep(Step):
    """A step whose recipe ``suits``; arguments and contracts are those of ``Step``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        state, exact = self.state, self.sums.dtype
        self._arenas, self._statistics = state.arenas, state.statistics
        self._norm_of = self._one_norm if len(state.arenas) == 1 else self._norm_of_all
        # What torch hands over, what it is handed, and what both read; each with its memory.
        wide = torch.promote_types(state.arenas[0].grads.dtype, torch.float32)
        self.mean, self.total, self.weight = _number(torch.float32), _number(exact), _number(exact)
        self.norm = _number(wide if len(state.arenas) == 1 else exact)
        self.divisor, self.single, self.skipped = _number(exact), _number(torch.float32), _number(torch.float32)
        self.ok = _number(torch.bool)
        self._mean, self._total, self._weight, self._norm = map(memory, (self.mean, self.total, self.weight, self.norm))
        self._divisor, self._single, self._skipped = map(memory, (self.divisor, self.single, self.skipped))
        self._ok, self._sums, self._applied, self._t = map(memory, (self.ok, self.sums, state.applied, state.t))
        self._now = state.timetable.memory()
        names = list(state.timetable.now)
        self._lr, self._told = names.index("lr"), [names.index(name) for name in state.timetable.told]
        self._clip = memory(self.clip) if isinstance(self.clip, Tensor) else [self.clip]
        self._rows, self._row = memory(self.ring).cast("B"), struct.Struct(f"{len(self.fields)}d")
        numbers = {"lr": self.lr, "t": state.t, "divisor": self.divisor, "skipped": self.skipped}
        self._update = Bound(state.arenas, {**numbers, "share": self.share, "moved": state.timetable.now}, self.single)
        self._starts: dict[int, Tensor] = {}

    def _run(self, window: Sequence[Any]) -> Tensor:
        state = self.state
        self._begin()
        self._accumulate(state.limit.cut(window))
        norm, ok = self._judge()
        state.updating = True
        self._update(state.step)
        if self._statistics.layers:
            with torch.no_grad():
                self._statistics.end(self.ok)
                state.average_statistics(self.share, self.ok)
        row = self._note(norm)
        self._count_on(ok)
        state.updating = False
        return row

    def _begin(self) -> None:
        self._sums[0] = self._sums[1] = 0.0
        self.state.timetable.turn(self.state.applied, self.state.step)
        for arena in self._arenas:
            arena.clear_gradients()
        if self._statistics.layers:
            self._statistics.begin()

    def _passes(self, index: int, first: int, batch: Any, last: bool) -> int:
        """As for ``Step``; of a plain mean it is the mean that is differentiated, from as many times the seed: the same bits."""
        self.undo.touched = False
        num = self._seed(index, first, batch)
        weight: Any = 0
        with self.policy.forward(self.state.device):
            value = self.loss(self.state.model, batch)
            if plain := type(value) is Tensor and value.dtype is torch.float32 and not value.ndim:
                weight = batch_size(batch)
            else:
                value, weight = sum_and_weight(value, batch)
        if self._statistics.layers:
            self._statistics.forward_done()
        start = self._start_of(weight, value) if plain else self._backward_seed(value)
        self.undo.touched = True
        backward(value, start)
        for arena in self._arenas:
            arena.take_gradients()
        if plain:
            self.mean.copy_(value.detach())
            self._mean[0] *= weight
            self._sums[0] += self._mean[0]
        else:
            self.total.copy_(value.detach().reshape(()))
            self._sums[0] += self._total[0]
        if isinstance(weight, Tensor):
            self.weight.copy_(weight.detach())
            weight = self._weight[0]
        self._sums[1] += weight
        if self._statistics.layers:
            self._statistics.collect(last=last)
        return num

    def _start_of(self, num: int, mean: Tensor) -> Tensor:
        """The gradient of the sum of ``num`` losses by their mean."""
        if (start := self._starts.get(num)) is None or start._version:  # a user's backward pass may write to it
            start = self._starts[num] = torch.full_like(mean, self.unit * num, requires_grad=False)
        return start

    def _judge(self) -> tuple[float, bool]:
        """(global norm of the mean gradient, whether the step is applied); the update finds its numbers where it looks."""
        for arena in self._arenas:
            arena.hold_gradients()
        losses, weights = self._sums
        mass = weights * self.unit
        norm = over(self._norm_of(), mass)
        ok = math.isfinite(norm + losses)
        if self.options.clip and not (times := over(norm, self._clip[0])) < 1:  # a norm that is NaN goes on as it is
            self._divisor[0] = mass * times
        else:
            self._divisor[0] = mass
        self._single[0] = self._divisor[0]
        self._skipped[0], self._ok[0] = float(not ok), ok
        return norm, ok

    def _one_norm(self) -> float:
        torch.linalg.vector_norm(self._arenas[0].grads, dtype=self.norm.dtype, out=self.norm)
        return float(self._norm[0])

    def _norm_of_all(self) -> float:
        self.norm.copy_(global_norm([arena.grads for arena in self._arenas]))
        return float(self._norm[0])

    def _note(self, norm: float) -> Tensor:
        """The row of this step."""
        place, now, sums = self.state.step % RING, self._now, self._sums
        told = [now[k] for k in self._told]
        numbers = (sums[0], sums[1], norm, self._skipped[0], now[self._lr], 1.0, self._applied[0])
        self._row.pack_into(self._rows, place * self._row.size, *numbers, *told)
        return self.rows[place][0]

    def _count_on(self, ok: bool) -> None:
        state = self.state
        if state.timetable.feedback.pieces:
            mean = self.sum_of_losses / self.sum_of_weights
            state.timetable.feedback.hear("loss", mean, state.applied, self.ok)
        self._applied[0] += ok
        self._t[0] += ok
        state.step += 1
        if state.window is not None:
            state.window.keep(state.step, self.ok)


def _number(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)
