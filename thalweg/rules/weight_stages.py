"""What can be done to a parameter after any rule has changed it."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, stage


@stage(
    kind="weights",
    slots=(Slot("slow", start="param", compressible=False),),
    paper="Zhang et al. 2019, arXiv:1907.08610",
)
def lookahead(
    p: Tensor, q: Tensor, slow: Tensor, *, t: Tensor, k: int = 5, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Each k updates: slow <- slow + alpha*(q - slow);  q <- slow.

    Args:
        q: the new parameter.
        slow: the slow weights, at first the parameter.
        t: number of this update, from 1, 0-dim.
        k: updates between two looks, at least 1.
        alpha: the slow weights' part of the way; 1 leaves the rule as it is.

    Cost: 1 slot a parameter (4 B at fp32); reads 1 and writes 1 more tensor a step.
    Departures: none; the rule's slots go on, as in the paper's experiments. Evaluate at a multiple of k.
    """
    now = t % k == 0
    met = slow + alpha * (q - slow)
    return torch.where(now, met, q), torch.where(now, met, slow)


@stage(
    kind="weights",
    reads="tensor",
    slots=(Slot("radius", "tensor", signed=False, compressible=False),),
    paper="Wen et al. 2025, Hyperball (fixed-norm weights); projected descent on spheres is older",
)
def hyperball(p: Tensor, q: Tensor, radius: Tensor, *, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """q <- q*|p_0|/|q|: a matrix keeps the norm that it began with.

    Args:
        p, q: the parameter before and after the rule.
        radius: the norm at the first update, |p_0|; 0-dim.
        t: number of this update, from 1, 0-dim.
        ndim: dimensions of the parameter; vectors (biases, gains) are left alone.

    Cost: 1 number a parameter; one more pass for the norm.
    Departures: a matrix that begins at 0 is left free, it has no sphere. AdamH and MuonH fix the length of the update too:
        with the stage trust_ratio before it this is theirs (|d| = lr*|p|). Do not decay what this holds.
    """
    if ndim < 2:
        return q, radius.clone()
    radius = torch.where(t == 1, p.norm(), radius)
    held = radius / q.norm().clamp(min=1e-30)
    return q * torch.where(radius > 0, held, 1.0), radius
