"""The first step of a graph beside plain operators: the same loss and the same gradient, or the run ends.

A parameter that a model reaches by another way than as its own would get no gradient in a graph; a compiler may be wrong. Nobody
would be told. It costs the passes of one window, once in a process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.core import ModelError
from thalweg.device import ran_out
from thalweg.device.kept import restored
from thalweg.optim.norm import global_norm

if TYPE_CHECKING:
    from thalweg.engine.compiled import CompiledStep

#: How far they may be apart, relatively: the order of sums in float32, in half precision.
NEAR, NEAR_HALF = 1e-3, 5e-2
_WORDS = ("sum of losses", "weight", "norm of the gradient")


class FirstCheck:
    """Goes through a window by plain operators, and leaves no trace of it.

    Attributes:
        wanted: (sum of losses, weight, norm of the summed gradient) of this rank's window.
    """

    def __init__(self, step: CompiledStep) -> None:
        self.step = step
        self.wanted: list[float] = []

    def begin(self, parts: Sequence[Any]) -> FirstCheck | None:
        """Find what is wanted; None where it cannot be compared."""
        state, moved = self.step.state, list[str]()
        try:
            with restored(list(state.model.buffers())):
                before = [(name, b, b._version) for name, b in self._numbers()]
                self._go_through(parts)
                moved = [name for name, b, version in before if b._version != version]
        except Exception as err:
            if not ran_out(err):
                raise
            self.wanted = []
        for arena in state.arenas:
            arena.hold_gradients()
            arena.grads.zero_()
        if moved:
            raise ModelError(
                "The model counts in a buffer that a graph would not move.",
                f"'{moved[0]}' is one number, and torch's tracer forgets what is written to a single number on this device.",
                "Make it a vector of one, as torch.zeros(1); or use compile='off'.",
            )
        return self if self.wanted else None

    def _numbers(self) -> list[tuple[str, Tensor]]:
        """Buffers of the model that the tracer takes for numbers of Python's, where it does; batch statistics have others."""
        if not self.step.state.device.is_host:
            return []
        pooled = {id(layer.num_batches_tracked) for layer in self.step.state.statistics.layers}
        found = [(name, b) for name, b in self.step.state.model.named_buffers() if id(b) not in pooled]
        return [(name, b) for name, b in found if not b.ndim and b.dtype in (torch.int64, torch.float64)]

    def _go_through(self, parts: Sequence[Any]) -> None:
        step, first, drawn = self.step, 0, False
        sums = torch.zeros_like(step.sums)
        for arena in step.state.arenas:
            arena.hold_gradients()
            arena.grads.zero_()
        for index, batch in enumerate(parts):
            first += step._seed(index, first, batch)
            before = [generator.get_state() for generator in step.generators]
            total, weight = step.module(batch)
            torch.autograd.backward(total, step._backward_seed(total))
            drawn |= any(not torch.equal(g.get_state(), b) for g, b in zip(step.generators, before))
            sums[0] += total.detach().reshape(())
            sums[1] += weight
        norm = float(global_norm([arena.grads for arena in step.state.arenas]))
        wanted = [*sums.tolist(), norm]
        if parts and all(map(math.isfinite, wanted)) and (step.compiler.draws_alike or not drawn):
            self.wanted = wanted

    def compare(self, *found: Tensor) -> None:
        """
        Raises:
            ModelError: where the graph found something else. The state counts as half moved then.
        """
        policy = self.step.policy
        near = NEAR if policy.autocast is None and policy.stored is None and policy.products == "ieee" else NEAR_HALF
        for word, wanted, value in zip(_WORDS, self.wanted, map(float, found)):
            if not abs(value - wanted) <= near * max(abs(wanted), 1e-6):
                raise ModelError(
                    "The step as one graph computes something else than plain operators.",
                    f"The {word} of the first window is {value:.6g}, and {wanted:.6g} by plain operators.",
                    "Let the model use its parameters as its own attributes alone; or use compile='off'.",
                )
