"""AdaBelief: Adam that divides by how far the gradient is from what momentum foretold."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", Slot("s", signed=False)),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper="Zhuang et al. 2020, arXiv:2010.07468",
    year=2020,
    reference="timm.optim.AdaBelief(rectify=False)",
    ships=("timm", "pytorch_optimizer", "optax"),
    use="Reproducing work that used it.",
    avoid="Gradients that hardly change: the divisor then falls to eps, and steps grow without bound.",
    evidence="No independent win.",
)
def adabelief(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    s: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-16,
) -> tuple[Tensor, ...]:
    """m as Adam's;  s <- b2*s + (1-b2)*(g - m)^2 + eps;  p <- p - lr*m^/(sqrt(s^) + eps), hats being x/(1 - b^t).

    Args:
        p, g, m, s: parameter, gradient, first moment and mean square of the surprise g - m, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to s at every update, as in the paper, and to its root.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: RAdam's rectification, on by default in the authors' code and in timm, is off, as in the paper.
    """
    m = torch.lerp(m, g, 1 - b1)
    surprise = g - m
    s = b2 * s + (1 - b2) * surprise * surprise + eps
    root = s.sqrt() / (1 - b2**t).sqrt() + eps
    return -(lr / (1 - b1**t)) * m / root, m, s
