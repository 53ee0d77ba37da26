"""Sharpness-aware minimization: the gradient of an update is taken where the loss nearby is about highest.

SAM and ASAM, whose formulas and sources are at ``thalweg.optim.weights.climb``. One ascent for a whole window, however many
micro-batches it has; the loss scale cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from thalweg.optim import Arena
from thalweg.optim.norm import global_norm
from thalweg.optim.weights import climb


class Sharpness:
    """Goes up to the neighbour and comes back, to the bit.

    Args:
        rho: distance of the neighbour, above 0.
        scaled: ASAM instead of SAM.

    Cost: a second forward and backward pass, and a copy of the parameters.
    """

    def __init__(self, arenas: Sequence[Arena], rho: float, scaled: bool) -> None:
        self.arenas, self.rho, self.scaled = arenas, rho, scaled
        self.norm_of: Callable[[Sequence[Tensor]], Tensor] = global_norm  # of a part of the gradients, over all of them
        self.kept = [torch.empty_like(arena.params) for arena in arenas]

    @contextmanager
    def nearby(self, norm: Tensor) -> Iterator[None]:
        """Inside, the parameters are their neighbour's; afterwards, also after an error, what they were.

        Args:
            norm: of the gradients that the arenas hold, as they are.
        """
        ps, gs = [arena.params for arena in self.arenas], [arena.grads for arena in self.arenas]
        for kept, p in zip(self.kept, ps):
            kept.copy_(p)
        try:
            climb(ps, gs, self.rho, scaled=self.scaled, norm=norm, norm_of=self.norm_of)
            yield
        finally:
            with torch.no_grad():
                for arena, kept in zip(self.arenas, self.kept):
                    arena.params.copy_(kept)
