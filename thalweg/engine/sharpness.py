"""Sharpness-aware minimization: the gradient of an update is taken where the loss nearby is about highest.

SAM (Foret et al. 2021, arXiv:2010.01412): w' = w + rho*g/|g|, over all weights. ASAM (Kwon et al. 2021, arXiv:2102.11600):
w' = w + rho*T^2 g/|T g| with T = |w| + 0.01, which no rescaling of layers changes. One ascent for a whole window, however many
micro-batches it has; the loss scale cancels in g/|g|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thalweg.optim import Arena

_ETA = 0.01


class Sharpness:
    """Goes up to the neighbour and comes back, to the bit.

    Args:
        rho: distance of the neighbour, above 0.
        scaled: ASAM instead of SAM.

    Cost: a second forward and backward pass, and a copy of the parameters.
    """

    def __init__(self, arenas: Sequence[Arena], rho: float, scaled: bool) -> None:
        self.arenas, self.rho, self.scaled = arenas, rho, scaled
        self.kept = [torch.empty_like(arena.params) for arena in arenas]

    def climb(self, norm: Tensor) -> None:
        """Move the parameters to their neighbour.

        Args:
            norm: of the gradients that the arenas hold, as they are.
        """
        pushes = [arena.grads for arena in self.arenas]
        if self.scaled:
            scales = [arena.params.abs() + _ETA for arena in self.arenas]
            pushes = [push * scale for push, scale in zip(pushes, scales)]
            norm = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(push).to(norm.dtype) for push in pushes])
            )
            pushes = [push * scale for push, scale in zip(pushes, scales)]
        factor = self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        for arena, push, kept in zip(self.arenas, pushes, self.kept):
            kept.copy_(arena.params)
            arena.params.add_(push * factor.to(push.dtype))

    def come_back(self) -> None:
        """The parameters are what they were."""
        for arena, kept in zip(self.arenas, self.kept):
            arena.params.copy_(kept)
