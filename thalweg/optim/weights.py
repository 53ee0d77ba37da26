"""Other weights for a while: the neighbour where the loss is higher, the average; afterwards what was there, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thalweg.optim.norm import global_norm

_ETA = 0.01


@torch.no_grad()
def climb(
    ps: Sequence[Tensor],
    gs: Sequence[Tensor],
    rho: float,
    *,
    scaled: bool = False,
    norm: Tensor | None = None,
    norm_of: Callable[[Sequence[Tensor]], Tensor] = global_norm,
) -> None:
    """Move weights, in place, to where the loss nearby is about highest by their gradients.

    SAM (Foret et al. 2021, arXiv:2010.01412): w' = w + rho*g/|g|, over all weights. ASAM (Kwon et al. 2021,
    arXiv:2102.11600): w' = w + rho*T^2 g/|T g| with T = |w| + 0.01, which no rescaling of layers changes.

    Args:
        ps, gs: weights and gradients of equal shapes; a common factor of the gradients cancels.
        rho: distance of the neighbour, above 0.
        scaled: ASAM instead of SAM.
        norm: of all of ``gs``, 0-dim, if it is known; used where not ``scaled``.
        norm_of: the norm over all there is, where ``gs`` are this process's part.

    >>> w = torch.zeros(2)
    >>> climb([w], [torch.tensor([3.0, 4.0])], 0.5)
    >>> [round(x, 6) for x in w.tolist()]
    [0.3, 0.4]
    """
    pushes = list(gs)
    if scaled:
        scales = [p.abs() + _ETA for p in ps]
        pushes = [g * scale for g, scale in zip(gs, scales)]
        norm = norm_of(pushes)
        pushes = [push * scale for push, scale in zip(pushes, scales)]
    elif norm is None:
        norm = norm_of(gs)
    factor = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    for p, push in zip(ps, pushes):
        p.add_(push * factor.to(push.dtype))


def average_share(decay: float | Tensor, t: Tensor) -> Tensor:
    """How far an average of the weights moves towards them at update ``t`` (from 1): 1 - min(decay, (1 + t)/(10 + t)).

    A young average forgets its beginning faster. Of any shape, in the dtype of ``t``; ``decay`` is one number or of that shape.
    """
    return 1 - torch.clamp((1 + t) / (10 + t), max=decay)
