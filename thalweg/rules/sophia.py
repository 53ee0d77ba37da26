"""Sophia-G: momentum over a running estimate of the curvature, held within one rate."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", Slot("h", signed=False)),
    reads="element",
    decay="decoupled",
    lr=1e-4,
    paper="Liu et al. 2023, arXiv:2305.14342",
    year=2023,
    reference="the paper's algorithm 3; the same update as pytorch_optimizer.SophiaH",
    ships=("pytorch_optimizer", "optax"),
    use="Language models, for study: it needs a second gradient each tenth update.",
    avoid="Long runs and anything untuned: gamma must keep most elements unclipped.",
    evidence="Final loss of a 720M Llama after 16B and 48B tokens 2.932 and 2.826, AdamW 2.930 and 2.815 (arXiv:2509.01440).",
    clock="frequency",
)
def sophia(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    h: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    due: bool,
    curvature: Tensor,
    b1: float = 0.96,
    b2: float = 0.99,
    gamma: float = 0.05,
    eps: float = 1e-12,
    frequency: int = 10,
) -> tuple[Tensor, ...]:
    """m <- b1*m + (1-b1)*g;  when due h <- b2*h + (1-b2)*curvature;  p <- p - lr*clip(m/max(gamma*h, eps), 1).

    Args:
        p, g, m, h: parameter, gradient, momentum and mean curvature, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        due: whether ``curvature`` is new: at the first update and each ``frequency`` after.
        curvature: the Gauss-Newton-Bartlett estimate B*s*s, shaped like g: s is the gradient of the mean loss over B
            samples with labels drawn from the model's own predictions. Not read where not due.
        b1, b2: decay of m and of h, in [0, 1).
        gamma: scale of h, above 0; 0.05 for this estimate, 0.01 for Hutchinson's.
        eps: least divisor.
        frequency: updates between estimates, at 1 or above.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step (5 and 3 when due), and a second gradient
    each ``frequency`` updates.
    Departures: the authors' code has rho=0.04 for gamma and adds 1e-15 where the paper takes the larger; optax corrects the
    bias of m, and takes h from before the estimate; pytorch_optimizer, with Hutchinson's estimate, clips m/h at 0.01, which
    is gamma=0.01 at a rate 100 times larger.
    """
    m = torch.lerp(m, g, 1 - b1)
    if due:
        h = torch.lerp(h, curvature, 1 - b2)
    return -lr * (m / (gamma * h).clamp(min=eps)).clamp(-1.0, 1.0), m, h
