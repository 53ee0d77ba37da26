"""The training step, on one screen: all micro-batches of a window in, one update out, nothing read back to Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import seed_for
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.sharpness import Sharpness
from thalweg.engine.state import State
from thalweg.optim.arena import update
from thalweg.precision import Policy

#: What a step writes into its row of the ring, in this order.
FIELDS = ("loss_sum", "weight", "grad_norm", "skipped", "lr", "scale", "applied")
RING = 64


@dataclass(frozen=True)
class StepOptions:
    """What a step is told once.

    Attributes:
        seed: names the random streams.
        clip: largest global gradient norm; 0: no clipping.
        loss_divisor: a power of two near the weight of a window, divided out of sums before the backward pass.
        lrs: the learning rate for each number of applied updates, (updates,), on the device.
        shares: how far the average moves towards the weights, likewise; None: no average.
        sharpness, sharpness_scaled: as in ``thalweg.engine.sharpness``; 0: gradients are taken where the weights are.
    """

    seed: int
    clip: float
    loss_divisor: float
    lrs: Tensor
    shares: Tensor | None
    sharpness: float = 0.0
    sharpness_scaled: bool = False


class Step:
    """One update of a State from one window of micro-batches.

    Contracts: the gradient is sum(total) / sum(weight) over the window (C1); torch's generators are seeded by
    (seed, step, micro-batch) (C2); unscale, finite check, clip, decay, update, average, in this order, and a skipped step
    moves none of them (C4); one read of the gradients for the norm, one pass for the update (C5).
    """

    def __init__(
        self, state: State, loss: Callable[[nn.Module, Any], Any], policy: Policy, options: StepOptions
    ) -> None:
        self.state, self.loss, self.policy, self.options = state, loss, policy, options
        self.generators = state.device.generators()
        self.sharpness: Sharpness | None = None
        if options.sharpness:
            self.sharpness = Sharpness(state.arenas, options.sharpness, options.sharpness_scaled)
        device, exact = state.device.torch_device, state.device.exact
        self.sums = torch.zeros(2, dtype=exact, device=device)  # of losses and of weights
        self.sum_of_losses, self.sum_of_weights = self.sums[0], self.sums[1]
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.unit = 1.0 / options.loss_divisor  # a power of two: exact
        self.ring = torch.zeros(RING, len(FIELDS), dtype=exact, device=device)
        self.rows: list[tuple[Tensor, tuple[Tensor, ...]]] = [
            (row, (row[:2], row[2], row[3], row[4], row[5], row[6:])) for row in self.ring
        ]
        self._seeds: dict[torch.dtype, Tensor] = {}

    def run(self, window: Sequence[Any]) -> Tensor:
        """One step.

        Args:
            window: micro-batches, on the device, each given to the loss function as it is.

        Returns:
            The row of ``FIELDS``, on the device; it is overwritten ``RING`` steps later.
        """
        state, options = self.state, self.options
        self._begin()
        self._accumulate(window)
        if self.sharpness is not None:
            self._look_around(window)
        with torch.no_grad():
            scale = self.one if state.scale is None else state.scale.scale
            mass = self.sum_of_weights * (scale * self.unit)  # what the gradients are a sum over
            norm = self._gradient_norm() / mass
            ok = torch.isfinite(norm + self.sum_of_losses)
            skipped = (~ok).to(torch.float32)
            divisor = mass * self._excess(norm, ok)
            lr = self._now(options.lrs)
            share = None if options.shares is None else self._now(options.shares)
            update(state.arenas, lr=lr, t=state.t, divisor=divisor, skipped=skipped, share=share, due=state.step)
            if state.statistics.layers:
                state.statistics.end(ok)
                state.average_statistics(share, ok)
            row = self._record(norm, skipped, lr, scale)
            self._finish(ok, skipped)
        return row

    def _accumulate(self, window: Sequence[Any], *, counted: bool = True) -> None:
        """The summed gradients of all micro-batches; ``counted``: their losses, weights and statistics too."""
        for index, batch in enumerate(window):
            self._seed(self.state.step, index)
            with self.policy.context(self.state.device):
                total, weight = sum_and_weight(self.loss(self.state.model, batch), batch)
            torch.autograd.backward(total, self._backward_seed(total))
            if counted:
                self._collect(total, weight, last=index == len(window) - 1)

    def _look_around(self, window: Sequence[Any]) -> None:
        """The gradients of the same window, dropout and all, at a neighbour; what was counted stays counted once."""
        assert self.sharpness is not None
        with torch.no_grad():
            self.sharpness.climb(self._gradient_norm())
            for arena in self.state.arenas:
                arena.grads.zero_()
        if self.state.statistics.layers:
            self.state.statistics.pause()
        self._accumulate(window, counted=False)
        with torch.no_grad():
            self.sharpness.come_back()

    def _begin(self) -> None:
        self.sums.zero_()
        for arena in self.state.arenas:
            arena.clear_gradients()
        if self.state.statistics.layers:
            self.state.statistics.begin()

    def _seed(self, step: int, index: int) -> None:
        name = seed_for(self.options.seed, "step", step, index)
        for generator in self.generators:
            generator.manual_seed(name)

    def _backward_seed(self, total: Tensor) -> Tensor:
        """The gradient that the backward pass starts from: loss scale over loss divisor, both powers of two."""
        if self.state.scale is not None:
            return (self.state.scale.scale * self.unit).to(total.dtype).reshape(total.shape)
        if total.dtype not in self._seeds:
            self._seeds[total.dtype] = torch.full_like(total, self.unit)
        return self._seeds[total.dtype].reshape(total.shape)

    def _collect(self, total: Tensor, weight: Any, *, last: bool) -> None:
        self.sum_of_losses.add_(total.detach().reshape(()))
        self.sum_of_weights.add_(weight)
        if self.state.statistics.layers:
            self.state.statistics.collect(last=last)

    def _gradient_norm(self) -> Tensor:
        """Global norm of the summed gradients, over all arenas."""
        norms = []
        for arena in self.state.arenas:
            arena.hold_gradients()
            wide = torch.promote_types(arena.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(arena.grads, dtype=wide))
        total: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        return total

    def _excess(self, norm: Tensor, ok: Tensor) -> Tensor:
        """How many times too long the gradient is."""
        clip, history = self.options.clip, self.state.history
        if history is None:
            return (norm / clip).clamp(min=1) if clip else self.one
        most = history.limited(norm, ok)
        if clip:
            most = most.clamp(max=clip)
        return torch.where(most < norm, norm / most, 1.0)

    def _now(self, table: Tensor) -> Tensor:
        """The scheduled value for the updates applied so far; looked up on the device, so that a skip needs no read."""
        place = self.state.applied
        if self.state.step >= table.shape[0]:
            place = place.clamp(max=table.shape[0] - 1)
        return table.take(place).view(())

    def _record(self, norm: Tensor, skipped: Tensor, lr: Tensor, scale: Tensor) -> Tensor:
        row, places = self.rows[self.state.step % RING]
        for place, value in zip(places, (self.sums, norm, skipped, lr, scale, self.state.applied)):
            place.copy_(value)
        return row

    def _finish(self, ok: Tensor, skipped: Tensor) -> None:
        state = self.state
        state.applied.add_(ok)
        state.t.add_(ok)
        state.step += 1
        if state.scale is not None:
            state.scale.update(skipped)
