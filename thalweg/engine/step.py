"""The training step, on one screen: all micro-batches of a window in, one update out, nothing read back to Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import seed_for
from thalweg.data import batch_size
from thalweg.device import ran_out
from thalweg.engine.backward import backward
from thalweg.engine.inorder import InOrder
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.portions import Failure, go_through, in_update, num_portions
from thalweg.engine.recompute import Released
from thalweg.engine.sharpness import Sharpness
from thalweg.engine.spikes import JUDGED
from thalweg.engine.state import State
from thalweg.engine.together import Place
from thalweg.engine.undo import Undo
from thalweg.engine.unfreeze import waiting
from thalweg.optim.arena import update
from thalweg.optim.history import excess
from thalweg.optim.norm import global_norm
from thalweg.parallel import ALONE, Ranks
from thalweg.precision import Policy
from thalweg.regularize import Streams
from thalweg.regularize.ordered import ordered_norm

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
        sharpness, sharpness_scaled: as in ``thalweg.engine.sharpness``; 0: gradients are taken where the weights are.
        micro_batch: samples in one; asked for on several ranks.
        exact: sums are made in one order, whatever the ranks (``engine/inorder.py``).
    """

    seed: int
    clip: float
    loss_divisor: float
    sharpness: float = 0.0
    sharpness_scaled: bool = False
    micro_batch: int = 0
    exact: bool = False


class Step:
    """One update of a State from one window of micro-batches.

    Contracts: the gradient is sum(total) / sum(weight) over the window (C1); torch's generators are seeded by
    (seed, step, micro-batch), the micro-batch counted over all ranks (C2); unscale, finite check, clip, decay, update, average,
    in this order, and a skipped step moves none of them (C4); one read of the gradients for the norm, one pass for the update (C5).
    """

    def __init__(
        self,
        state: State,
        loss: Callable[[nn.Module, Any], Any],
        policy: Policy,
        options: StepOptions,
        streams: Streams | None = None,
        recomputation: Released | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.state, self.loss, self.policy, self.options, self.streams = state, loss, policy, options, streams
        self.recomputation, self.ranks = recomputation, ranks
        self.news: list[str] = []  # to be told of how it runs
        self.per_call, self.call_s = 1, 0.0  # steps of a call, and the seconds that one may take; 0: any
        self.compiled_s = 0.0  # seconds that went into compiling
        self.place = None if ranks.world == 1 else Place(ranks.rank, ranks.world, options.micro_batch)
        self.generators = state.device.generators()
        self.sharpness: Sharpness | None = None
        if options.sharpness:
            self.sharpness = Sharpness(state.arenas, options.sharpness, options.sharpness_scaled)
        device, exact = state.device.torch_device, state.device.exact
        self.sums = torch.zeros(2, dtype=exact, device=device)  # of losses and of weights
        self.sum_of_losses, self.sum_of_weights = self.sums[0], self.sums[1]
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.unit = 1.0 / options.loss_divisor  # a power of two: exact
        now = state.timetable.now
        self.lr, self.clip, self.share = now["lr"], now.get("clip", options.clip), now.get("share")
        self.told = [now[name] for name in state.timetable.told]
        self.fields = (*FIELDS, *state.timetable.told)
        num = len(self.fields)
        if state.watch is not None:
            self.told.append(state.watch.told)
            self.fields = (*self.fields, *JUDGED)
        self.ring = torch.zeros(RING, len(self.fields), dtype=exact, device=device)
        self.rows: list[tuple[Tensor, tuple[Tensor, ...]]] = [
            (row, (row[:2], *row[2:6].unbind(), row[6:7], *row[7:num].unbind(), row[num:])) for row in self.ring
        ]
        self._seeds: dict[torch.dtype, Tensor] = {}
        self.undo = Undo(state.model, state.arenas, self.sums, state.statistics)
        self.in_order = InOrder(self) if options.exact else None
        self.waiting = waiting(state.arenas)

    def run_several(self, windows: Sequence[Sequence[Any]]) -> None:
        """Steps in order; nothing is asked or told between them."""
        for window in windows:
            self.run(window)

    def run(self, window: Sequence[Any]) -> Tensor:
        """One step.

        Args:
            window: micro-batches, on the device, each given to the loss function as it is; on ranks, this rank's, or none.

        Returns:
            The row of ``FIELDS``, on the device; it is overwritten ``RING`` steps later.

        Raises:
            OutOfMemoryError: where smaller micro-batches do not help.
        """
        self.state.check_whole()
        try:
            return self._run(window)
        except Exception as err:
            self.state.statistics.restore()
            if not ran_out(err):
                raise
            failure = Failure.of(err, "a step, outside of its passes")
        except BaseException:  # Ctrl-C: the layers are the user's
            self.state.statistics.restore()
            raise
        raise in_update(failure, moved=self.state.moved())

    def _run(self, window: Sequence[Any]) -> Tensor:
        state = self.state
        self._begin()
        norm, ok, skipped = self._move(window)
        with torch.no_grad():
            scale = self._scale()
            if state.statistics.layers:
                state.statistics.end(ok)
                state.average_statistics(self.share, ok)
            row = self._record(norm, skipped, scale)
            self._finish(ok, skipped)
            state.updating = False
        return row

    def _move(self, window: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The update by the gradient of a window: (global norm of the mean gradient, whether it was applied, 1.0 where not)."""
        state = self.state
        parts = self._accumulate(state.limit.cut(window))
        if self.sharpness is not None:
            self._look_around(parts)
        with torch.no_grad():
            mass = self._mass()
            norm = self._gradient_norm() / mass
            ok = self._allowed(norm)
            state.updating = True
            numbers = self._numbers(mass, norm, ok)
            update(state.arenas, **numbers, due=state.step)
        return norm, ok, numbers["skipped"]

    def _allowed(self, norm: Tensor) -> Tensor:
        """Whether a step with this norm of its gradient may be applied, 0-dim bool."""
        finite, watch = torch.isfinite(norm + self.sum_of_losses), self.state.watch
        if watch is None:
            return finite
        return watch.judge(finite, norm, self.sum_of_losses, self.sum_of_weights, self._scale())

    def _accumulate(self, parts: Sequence[Any], *, counted: bool = True) -> Sequence[Any]:
        """The summed gradients of all micro-batches; ``counted``: their losses, weights and statistics too.

        Returns:
            The micro-batches as they went through: smaller ones where memory ran out (``engine/portions.py``).
        """
        one = self._passes if counted else self._passes_again
        with self.policy.around(self.state.device, passes=len(parts)):
            if self.in_order is not None:
                return self.in_order.accumulate(parts, one, counted=counted)
            done = go_through(parts, one, self.state.limit, self.undo, counted=counted)
        if self.place is not None:
            self._add_ranks(counted)
        return done

    @torch.no_grad()
    def _add_ranks(self, counted: bool) -> None:
        """Gradients become those of all ranks: one collective an arena, and one for all that was counted."""
        for arena in self.state.arenas:
            arena.hold_gradients()
        sums = [arena.grads for arena in self.state.arenas]
        if not counted:
            self.ranks.add(sums)
            return
        packed = self.counted()
        self.ranks.add([*sums, packed])
        self.take_counted(packed)

    def counted(self) -> Tensor:
        """Losses, weights and batch statistics of this rank, in one vector."""
        statistics = self.state.statistics
        seen = statistics.gathered() if statistics.layers else self.sums[:0]
        return torch.cat([self.sums, seen.to(self.sums)])

    def take_counted(self, packed: Tensor) -> None:
        """What ``counted`` gives, of all ranks."""
        self.sums.copy_(packed[:2])
        if self.state.statistics.layers:
            self.state.statistics.summed(packed[2:])

    def _passes(self, index: int, first: int, batch: Any, last: bool) -> int:
        """Forward and backward pass of a micro-batch; how many samples it has, where the streams ask."""
        num, total, weight = self._gradients(index, first, batch)
        self._collect(total, weight, last=last)
        return num

    def _passes_again(self, index: int, first: int, batch: Any, last: bool) -> int:
        """The same over samples that have been counted."""
        return self._gradients(index, first, batch)[0]

    def _gradients(self, index: int, first: int, batch: Any) -> tuple[int, Tensor, Any]:
        """(samples, sum of losses, weight) of a micro-batch, whose gradients join what is there."""
        self.undo.touched = False
        num = self._seed(index, first, batch)
        total, weight = self._forward(batch)
        start = self._backward_seed(total)
        self.undo.touched = True
        backward(total, start)
        return num, total, weight

    def _forward(self, batch: Any) -> tuple[Tensor, Any]:
        """(sum of losses, weight) of a micro-batch."""
        with self.policy.forward(self.state.device):
            total, weight = sum_and_weight(self.loss(self.state.model, batch), batch)
        if self.state.statistics.layers:
            self.state.statistics.forward_done()
        return total, weight

    def _mass(self) -> Tensor:
        """What the gradients are a sum over: the weight of the window, times loss scale over loss divisor; 0-dim."""
        return self.sum_of_weights * (self._scale() * self.unit)

    def _scale(self) -> Tensor:
        return self.one if self.state.scale is None else self.state.scale.scale

    def _numbers(self, mass: Tensor, norm: Tensor | None, ok: Tensor) -> dict[str, Any]:
        """What ``update`` is given; without a norm nothing is clipped."""
        divisor = mass * (self.one if norm is None else self._excess_of(norm, self.clip, ok))
        given = {"lr": self.lr, "t": self.state.t, "divisor": divisor, "skipped": (~ok).to(torch.float32)}
        return {**given, "share": self.share, "moved": self.state.timetable.now}

    def _look_around(self, parts: Sequence[Any]) -> None:
        """The gradients of the same window, dropout and all, at a neighbour; what was counted stays counted once."""
        assert self.sharpness is not None
        if self.state.statistics.layers:
            self.state.statistics.pause()
        with torch.no_grad(), self.sharpness.nearby(self._gradient_norm()):
            for arena in self.state.arenas:
                arena.grads.zero_()
            with torch.enable_grad():
                self._accumulate(parts, counted=False)

    def _begin(self) -> None:
        self.sums.zero_()
        self.state.timetable.turn(self.state.applied, self.state.step)
        if self.waiting is not None:
            self.waiting.turn(self.state.step)
        for arena in self.state.arenas:
            arena.clear_gradients()
        if self.state.statistics.layers:
            self.state.statistics.begin()

    def _seed(self, index: int, first: int, batch: Any) -> int:
        """Name the random streams of a micro-batch whose samples stand from ``first`` on in the window; how many they are."""
        if self.place is not None:
            micro, limit = self.options.micro_batch, self.state.limit
            portions = num_portions(micro, limit.most, limit.grain)
            which = index // portions if self.streams is None else first // micro  # who counts samples counts exactly
            index, first = self.place.of(index, first, which, portions)
        self._seed_generators(self.state.step, index)
        if self.streams is None:
            return 0
        num = batch_size(batch)
        self.streams.begin(self.state.step, index, first, num)
        return num

    def _seed_generators(self, step: int, index: int) -> None:
        name = seed_for(self.options.seed, "step", step, index)
        for generator in self.generators:
            generator.manual_seed(name)

    def _backward_seed(self, total: Tensor) -> Tensor:
        """The gradient that the backward pass starts from: loss scale over loss divisor, both powers of two."""
        if self.state.scale is not None:
            return (self.state.scale.scale * self.unit).to(total.dtype).reshape(total.shape)
        if (start := self._seeds.get(total.dtype)) is None or start._version:  # a user's backward pass may write to it
            start = self._seeds[total.dtype] = torch.full_like(total, self.unit)
        return start.reshape(total.shape)

    def _count(self, total: Tensor, weight: Any) -> None:
        self.sum_of_losses.add_(total.detach().reshape(()))
        self.sum_of_weights.add_(weight)

    def _collect(self, total: Tensor, weight: Any, *, last: bool) -> None:
        self._count(total, weight)
        if self.state.statistics.layers:
            self.state.statistics.collect(last=last)

    def _gradient_norm(self) -> Tensor:
        """Global norm of the summed gradients, over all arenas."""
        for arena in self.state.arenas:
            arena.hold_gradients()
        norm = global_norm if self.in_order is None else ordered_norm
        return norm([arena.grads for arena in self.state.arenas])

    def _excess_of(self, norm: Tensor, clip: float | Tensor, ok: Tensor) -> Tensor:
        """How many times too long the gradient is."""
        if self.state.history is not None:
            return excess(norm, clip, self.state.history, ok)
        return (norm / clip).clamp(min=1) if self.options.clip else self.one

    def _record(self, norm: Tensor, skipped: Tensor, scale: Tensor) -> Tensor:
        row, places = self.rows[self.state.step % RING]
        for place, value in zip(places, (self.sums, norm, skipped, self.lr, scale, self.state.applied, *self.told)):
            place.copy_(value)
        return row

    def _finish(self, ok: Tensor, skipped: Tensor) -> None:
        state = self.state
        if state.timetable.feedback.pieces:
            state.timetable.feedback.hear("loss", self.sum_of_losses / self.sum_of_weights, state.applied, ok)
        state.applied.add_(ok)
        state.t.add_(ok)
        state.step += 1
        if state.window is not None:
            state.window.keep(state.step, ok)
        if state.watch is not None:
            state.watch.end(ok, state.step)
        if state.scale is not None:
            state.scale.update(skipped, None if state.watch is None else state.watch.still)
