"""Adam, and AdamW: the same maths under two names that differ in the form of weight decay."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import rule


@rule(
    name="adamw",
    slots=("m", "v"),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper="Loshchilov and Hutter 2017, arXiv:1711.05101",
    scale_free=True,
)
@rule(
    slots=("m", "v"),
    reads="element",
    decay="coupled",
    lr=1e-3,
    paper="Kingma and Ba 2014, arXiv:1412.6980",
    scale_free=True,
)
def adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*g^2;  p <- p - lr*m^/(sqrt(v^) + eps), hats being x/(1 - b^t).

    Args:
        p, g, m, v: parameter, gradient, first and second moment, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction (the paper's algorithm 1).

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    """
    m = torch.lerp(g, m, b1)
    v = b2 * v + (1 - b2) * g * g
    root = v.sqrt() / (1 - b2**t).sqrt() + eps
    return p - lr / (1 - b1**t) * m / root, m, v
