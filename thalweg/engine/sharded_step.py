"""The training step where parameters lie on ranks in parts (``engine/fully.py``).

Every pass gathers parameters from all ranks, so that all go through as many passes: a rank without a micro-batch in a round goes
through another one, and what it finds is thrown away. Gradients are summed once a step, in the last round; with ``exact_reduce``
in each, in the order of micro-batches. The squares of each rank's part of them go with the packed numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import OutOfMemoryError, ThalwegError
from thalweg.data import batch_size, to_device, tree_map
from thalweg.data.share import Window
from thalweg.device import ran_out
from thalweg.engine.fully import FullySharded, read_in_parts
from thalweg.engine.inorder import count_anew, counted_in_order
from thalweg.engine.portions import Failure
from thalweg.engine.recompute import Recomputation
from thalweg.engine.state import State
from thalweg.engine.step import Step, StepOptions
from thalweg.optim.arena import aligned
from thalweg.optim.norm import global_norm, norm_dtype
from thalweg.parallel import Ranks
from thalweg.precision import Policy
from thalweg.regularize import Streams
from thalweg.regularize.ordered import ordered_norm


class ShardedStep(Step):
    """A step over a model in parts; arguments as for ``Step``.

    Contracts: as those of ``Step``. Memory that runs out in a pass ends the run: passes in smaller portions would be more of
    them on one rank than on the others.
    """

    def __init__(
        self,
        state: State,
        loss: Callable[[nn.Module, Any], Any],
        policy: Policy,
        options: StepOptions,
        streams: Streams | None,
        recomputation: Recomputation | None,
        ranks: Ranks,
        *,
        fully: FullySharded,
    ) -> None:
        super().__init__(state, loss, policy, replace(options, exact=False), streams, recomputation, ranks)
        self.fully, self.exact = fully, options.exact
        self.norm = self.one  # of the gradients, over all ranks
        self.num_elements = sum(aligned(fully.shards.pieces[name].numel) for a in state.arenas for name in a.places)
        self.borrowed: Any = None  # the first rank's micro-batch, on a rank that has none
        if self.sharpness is not None:
            self.sharpness.norm_of = self._norm_of_parts

    def _accumulate(self, parts: Sequence[Any], *, counted: bool = True) -> Sequence[Any]:
        """As ``Step``'s, in as many rounds as the rank with most micro-batches needs."""
        whole = parts.whole if isinstance(parts, Window) else self.ranks.world * self.ranks.largest(len(parts))
        rounds = -(-whole // self.ranks.world)
        if whole < self.ranks.world and counted:
            self._lend(parts)
        try:
            with self.policy.around(self.state.device):
                if self.exact:
                    self._in_order(parts, rounds, counted)
                else:
                    self._once(parts, rounds, counted)
        except Exception as err:
            if ran_out(err):
                failure = Failure.of(err, "a pass")
            elif isinstance(err, RuntimeError) and "gloo" in str(err):  # a sum between copies, which FSDP2 makes itself
                with self.ranks.in_touch("the sum of gradients"):
                    raise
            elif "DTensor" in str(err) and not isinstance(err, ThalwegError):
                raise read_in_parts(f"{type(err).__name__}: {' '.join(str(err).split())[:200]}") from err
            else:
                raise
        else:
            return parts
        raise OutOfMemoryError(
            f"Memory ran out in {failure.where} of {batch_size(parts[0]) if len(parts) else 0} samples.",
            f"Parameters lie in parts on {self.ranks.world} ranks, which all gather them as often: none can cut its "
            f"micro-batch by itself. The allocator: {failure.words}",
            "Give a smaller train.micro_batch or recompute='blocks', and go on with --resume.",
        )

    def _once(self, parts: Sequence[Any], rounds: int, counted: bool) -> None:
        """All rounds, and one sum over ranks in the last."""
        if len(parts) < rounds:  # first, so that the last is one to sum after
            self._idle(parts, summing=rounds == 1)
        one, first = self._passes if counted else self._passes_again, 0
        for index, batch in enumerate(parts):
            last = index == len(parts) - 1
            self.fully.synchronize(last)
            first += one(index, first, batch, last)
        self._add_numbers(counted)

    @torch.no_grad()
    def _add_numbers(self, counted: bool) -> None:
        """What was counted, and the squares of the gradients: one vector, one sum over ranks."""
        squares = self._squares([arena.grads for arena in self.state.arenas])
        packed = torch.cat([squares.reshape(1), self.counted() if counted else self.sums])
        self.ranks.add([packed])
        self.norm = packed[0].sqrt().to(self._norm_dtype())
        if counted:
            self.take_counted(packed[1:])

    def _squares(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of the squares of this rank's part; of parts that several ranks hold, one counts."""
        if self.fully.shards.replica:
            return self.sums.new_zeros(())
        return global_norm(parts).to(self.sums.dtype).square()

    def _norm_of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The norm over all ranks, by a sum of its own."""
        packed = self._squares(parts).reshape(1)
        self.ranks.add([packed])
        return packed[0].sqrt().to(self._norm_dtype())

    def _norm_dtype(self) -> torch.dtype:
        return norm_dtype([arena.grads for arena in self.state.arenas])

    def _gradient_norm(self) -> Tensor:
        return self.norm

    # ------------------------------------------------------------------ a rank that has no micro-batch in a round

    def _lend(self, parts: Sequence[Any]) -> None:
        """A window has fewer micro-batches than there are ranks: those without one get the first rank's."""
        lent = tree_map(lambda t: t.cpu(), parts[0]) if self.ranks.is_first else None
        lent = self.ranks.from_first(lent)
        self.borrowed = None if len(parts) else to_device(lent, self.state.device.torch_device)

    def _idle(self, parts: Sequence[Any], *, summing: bool) -> None:
        """A pass for what it gathers alone: nothing that it finds is counted."""
        batch = parts[0] if len(parts) else self.borrowed
        statistics = self.state.statistics
        kept = statistics.collected() if statistics.layers else None
        self.fully.idle = True
        self.fully.synchronize(summing)
        try:
            self._gradients(0, 0, batch)
            if not summing:
                self.fully.drop()
        finally:
            self.fully.idle = False
        if statistics.layers:
            statistics.put_back(kept)

    # ------------------------------------------------------------------ exact_reduce

    def _in_order(self, parts: Sequence[Any], rounds: int, counted: bool) -> None:
        """Each round summed by itself, rank after rank."""
        one, first = self._passes if counted else self._passes_again, 0
        counts: Tensor | None = None
        self.fully.synchronize(True)
        for turn in range(rounds):
            if turn and counted:
                count_anew(self)
            if turn < len(parts):
                first += one(turn, first, parts[turn], False)
            else:
                self._idle(parts, summing=True)
            if counted:
                counts = counted_in_order(self, counts)
        with torch.no_grad():
            gs = [arena.grads for arena in self.state.arenas]
            self.norm = ordered_norm(gs, self.num_elements, self.fully.shards.largest, self.fully.shards.total)
            if counts is not None:
                self.take_counted(counts)
