"""The training step where several ranks compute each micro-batch together (``engine/tensor.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from thalweg.core import OutOfMemoryError
from thalweg.data import batch_size
from thalweg.device import ran_out
from thalweg.engine.portions import Failure
from thalweg.engine.step import Step
from thalweg.engine.tensor import TensorParallel
from thalweg.optim import Arena
from thalweg.optim.norm import global_norm, norm_dtype


class TensorStep(Step):
    """A step over a model with cut layers; arguments as for ``Step``, whose ``ranks`` are feeds.

    Contracts: as those of ``Step``. Memory that runs out in a pass ends the run: the other ranks of the layer are in it.
    """

    tensor: TensorParallel

    def _accumulate(self, parts: Sequence[Any], *, counted: bool = True) -> Sequence[Any]:
        one, first = self._passes if counted else self._passes_again, 0
        try:
            with self.policy.around(self.state.device, passes=len(parts)):
                for index, batch in enumerate(parts):
                    first += one(index, first, batch, index == len(parts) - 1)
        except Exception as err:
            if _is_lost(err):
                with self.ranks.in_touch("a layer that ranks compute together"):
                    raise
            if not ran_out(err):
                raise
            failure = Failure.of(err, "a pass")
        else:
            if self.place is not None:
                self._add_ranks(counted)
            return parts
        raise OutOfMemoryError(
            f"Memory ran out in {failure.where} of {batch_size(parts[0]) if len(parts) else 0} samples.",
            f"Several ranks compute its layers together: none can cut its micro-batch by itself. The allocator: {failure.words}",
            "Give a smaller train.micro_batch, and go on with --resume.",
        )

    def _gradient_norm(self) -> Tensor:
        """Each element once: of what is cut, over the ranks that have parts; what is whole is the same on all of them."""
        for arena in self.state.arenas:
            arena.hold_gradients()
        whole = [arena.grads for arena in self.state.arenas if not self._is_cut(arena)]
        parts = [arena.grads for arena in self.state.arenas if self._is_cut(arena)]
        exact = self.sums.dtype
        squares = self.tensor.shards.total(global_norm(parts).to(exact).square())
        if whole:
            squares = squares + global_norm(whole).to(exact).square()
        return squares.sqrt().to(norm_dtype([*whole, *parts]))

    def _is_cut(self, arena: Arena) -> bool:
        return next(iter(arena.places)) in self.tensor.shards.pieces


def _is_lost(err: Exception) -> bool:
    """Whether it is that another rank is gone, or does not answer."""
    return isinstance(err, dist.DistError) or (isinstance(err, RuntimeError) and "gloo" in str(err))
