"""LaProp: momentum of the adapted gradient, where Adam adapts the momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", Slot("v", signed=False)),
    reads="element",
    decay="decoupled",
    lr=4e-4,
    paper="Ziyin, Wang and Ueda 2020, arXiv:2002.04839",
    year=2020,
    reference="timm.optim.LaProp",
    ships=("timm", "pytorch_optimizer", "heavyball"),
    use="High momentum with a low b2, where Adam's m and v come from gradients of different scale.",
    avoid="Expecting a gain over AdamW at its usual b1 and b2: they then nearly agree.",
    evidence="No independent evidence.",
    scale_free=True,
)
def laprop(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-15,
) -> tuple[Tensor, ...]:
    """v <- b2*v + (1-b2)*g^2;  m <- b1*m + (1-b1)*g/(sqrt(v^) + eps);  p <- p - lr*m^, hats being x/(1 - b^t).

    Args:
        p, g, m, v: parameter, gradient, momentum of adapted gradients and second moment, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: lr stays out of m, so that a schedule acts at once; timm and pytorch_optimizer put it in and correct for it,
    which is the same at a constant rate.
    """
    v = b2 * v + (1 - b2) * g * g
    m = torch.lerp(g / (v.sqrt() / (1 - b2**t).sqrt() + eps), m, b1)
    return -(lr / (1 - b1**t)) * m, m, v
