"""ADOPT: the gradient over the root of the squares before it, then momentum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", Slot("v", signed=False)),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper="Taniguchi et al. 2024, arXiv:2411.02853v2",
    year=2024,
    reference="optax.contrib.adopt; power=0.333 timm.optim.Adopt; variant='late' pytorch_optimizer.ADOPT",
    ships=("timm", "pytorch_optimizer", "optax", "heavyball"),
    use="Where Adam's convergence hangs on b2; it converges with any.",
    avoid="variant='plain' on anything: one element whose first gradient was tiny explodes.",
    evidence="Final loss of a 720M Llama after 48B tokens 2.817, AdamW 2.815 (arXiv:2509.01440). Four libraries have four "
    "trajectories.",
    choices={"variant": ("paper", "late", "plain")},
)
def adopt(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1e-6,
    power: float = 0.25,
    variant: str = "paper",
) -> tuple[Tensor, ...]:
    """n = g/max(sqrt(v), eps) within +-(t-1)^power;  m <- b1*m + (1-b1)*n;  p <- p - lr*m;  then v <- b2*v + (1-b2)*g^2.

    The first gradient makes v = g^2 and moves nothing.

    Args:
        p, g, m, v: parameter, gradient, momentum of adapted gradients and second moment, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: least divisor.
        power: how fast the bound widens, at 0 or above.
        variant: "paper": the paper's second version, its authors' code and optax. "late": bound t^power, one update ahead, as
            pytorch_optimizer. "plain": no bound, the first version; as heavyball.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: the decay stage acts at the first update too. timm's power is 0.333.
    """
    bound = (t - 1) ** power if variant == "paper" else t**power if variant == "late" else t * math.inf
    bound = torch.where(t > 1, bound, 0.0)
    ratio = torch.minimum(torch.maximum(g / v.sqrt().clamp(min=eps), -bound), bound)
    m = torch.lerp(ratio, m, b1)
    keep = (t > 1).to(t.dtype) * b2
    return -lr * m, m, keep * v + (1 - keep) * g * g
