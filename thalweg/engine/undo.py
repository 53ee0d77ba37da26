"""What the passes over a window change before its update, and how it is taken back when one of them breaks off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from thalweg.device import ran_out
from thalweg.optim import Arena


@dataclass
class Kept:
    """What a window has gathered up to one of its micro-batches."""

    gradients: list[Tensor]
    sums: Tensor
    statistics: Any
    buffers: list[Tensor]


class Statistics(Protocol):
    """What passes gather of batch normalization."""

    layers: list[Any]

    def begin(self) -> None: ...

    def restore(self) -> None: ...

    def undo(self) -> bool: ...

    def collected(self) -> Any: ...

    def put_back(self, collected: Any) -> None: ...


class Undo:
    """Takes back what passes did to gradients, sums and buffers. Nothing is copied as long as nothing fails.

    The one exception are models with buffers of their own that a forward pass moves, such as the vectors of spectral
    normalization or the running statistics of instance normalization: they are found in the first window by their version, and
    from then on copied once a window. What a model keeps outside of its buffers is out of reach.

    Args:
        sums: of losses and of weights, added up over the window.

    Attributes:
        touched: whether the micro-batch under way may have added to the gradients or the sums.
    """

    def __init__(self, model: nn.Module, arenas: Sequence[Arena], sums: Tensor, statistics: Statistics) -> None:
        self.arenas, self.sums, self.statistics = arenas, sums, statistics
        self.touched = False
        layers = set(map(id, statistics.layers))
        self._moving = [
            (module, name)
            for module in model.modules()
            if id(module) not in layers
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._seen: list[tuple[int, int]] = []  # identity and version of these buffers before the first window
        self._first: list[Tensor] = []  # their values before the window

    def begin(self) -> None:
        """The passes over a window begin."""
        if not self._moving:
            return
        seen = [(id(b), b._version) for b in self._buffers()]
        if len(self._seen) == len(seen):  # the first window is over: those that stood still will stay so
            self._moving = [place for place, a, b in zip(self._moving, self._seen, seen) if a != b]
        self._seen = [] if self._first else seen
        self._first = [b.detach().clone() for b in self._buffers()]

    def forward(self) -> bool:
        """Forget a forward pass that broke off; False where the window must start over for that."""
        return self.statistics.undo() and not self._moving

    @torch.no_grad()
    def start_over(self, *, counted: bool) -> None:
        """Nothing of the window has been done.

        Args:
            counted: whether its losses and statistics are, or were before.
        """
        for arena in self.arenas:
            arena.hold_gradients()
            arena.grads.zero_()
        self._put_buffers(self._first)
        if counted:
            self.sums.zero_()
            if self.statistics.layers:
                self.statistics.restore()
                self.statistics.begin()
        else:
            self.statistics.undo()

    @torch.no_grad()
    def keep(self, before: Kept | None) -> Kept | None:
        """A copy of what has been gathered, in the CPU's memory where the device has its own; None where it does not fit.

        Args:
            before: an earlier one, which is written over.
        """
        try:
            gradients = before.gradients if before else [torch.empty_like(a.grads, device="cpu") for a in self.arenas]
            for copy, arena in zip(gradients, self.arenas):
                arena.hold_gradients()
                copy.copy_(arena.grads)
            buffers = [b.detach().clone() for b in self._buffers()]
            return Kept(gradients, self.sums.clone(), self.statistics.collected(), buffers)
        except Exception as err:
            if not ran_out(err):
                raise
            return None

    @torch.no_grad()
    def put_back(self, kept: Kept) -> None:
        """What has been gathered is again what it was when it was kept."""
        for copy, arena in zip(kept.gradients, self.arenas):
            arena.hold_gradients()
            arena.grads.copy_(copy)
        self.sums.copy_(kept.sums)
        self.statistics.put_back(kept.statistics)
        self._put_buffers(kept.buffers)

    def _buffers(self) -> list[Any]:
        return [module._buffers[name] for module, name in self._moving]

    def _put_buffers(self, values: Sequence[Tensor]) -> None:
        for buffer, value in zip(self._buffers(), values):
            if not torch.equal(buffer, value):  # a copy would count as a move
                buffer.copy_(value)
