"""Adan: Nesterov's momentum through a running mean of how the gradient changes."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", "u", Slot("v", signed=False), "last"),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper="Xie et al. 2022, arXiv:2208.06677",
    year=2022,
    reference="timm.optim.Adan(no_prox=True)",
    ships=("timm", "pytorch_optimizer", "optax", "optimi"),
    use="Vision transformers in its authors' recipes, at rates 5 to 10 times AdamW's.",
    avoid="Tight memory: it keeps four slots.",
    evidence="Ahead in its authors' vision recipes; no independent win on language models.",
    scale_free=True,
)
def adan(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    u: Tensor,
    v: Tensor,
    last: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
) -> tuple[Tensor, ...]:
    """m, u, v: means (b1, b2, b3) of g, of c = g - last, of (g + b2*c)^2;  p <- p - lr*(m^ + b2*u^)/(sqrt(v^) + eps).

    Hats are x/(1 - b^t).

    Args:
        p, g: parameter and gradient, of one shape.
        m, u, v: means of gradients, of their changes and of squares.
        last: the gradient before; the first change counts as 0.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2, b3: decay of the means, in [0, 1); the paper writes 1 - b for b.
        eps: added to the root, after the bias correction.

    Cost: 4 slots a parameter (16 B at fp32); reads 6 and writes 5 tensors a step.
    Departures: the paper divides by 1 + lr*wd after the update (a proximal step); our stage is decoupled decay, the authors'
    no_prox form. optax weighs the change by 1 - b2 where the authors' code has b2, and ends 3e-2 away after 12 steps.
    """
    change = torch.where(t > 1, g - last, 0.0)
    ahead = g + b2 * change
    m = torch.lerp(m, g, 1 - b1)
    u = torch.lerp(u, change, 1 - b2)
    v = b3 * v + (1 - b3) * ahead * ahead
    root = v.sqrt() / (1 - b3**t).sqrt() + eps
    return -((lr / (1 - b1**t)) * m + (lr * b2 / (1 - b2**t)) * u) / root, m, u, v, g.clone()
