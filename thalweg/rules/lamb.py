"""LAMB: Adam whose step is rescaled to each parameter's norm."""

from __future__ import annotations

import math

from torch import Tensor

from thalweg.rules.registry import Slot, rule
from thalweg.rules.update_stages import ratio_of


@rule(
    slots=("m", Slot("v", signed=False)),
    reads="tensor",
    decay="decoupled",
    lr=1e-3,
    paper="You et al. 2019 (version 5), arXiv:1904.00962",
    year=2019,
    reference="optax.lamb",
    ships=("timm", "pytorch_optimizer", "optax", "keras", "bitsandbytes"),
    use="Very large batches (BERT at 32k and more), where the layers' useful rates lie far apart.",
    avoid="Ordinary batches, where AdamW with a tuned rate is as good and cheaper.",
    evidence="BERT in 76 minutes (its authors). Never entered in AlgoPerf. optax = timm; Keras 5e-2 and pytorch_optimizer "
    "3.5e-1 away after 12 steps (pre-normalised gradients, clamped norms).",
)
def lamb(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    inner_decay: float = 0.0,
    most: float = math.inf,
) -> tuple[Tensor, ...]:
    """m, v as in Adam;  u = m^/(sqrt(v^) + eps) + inner_decay*p;  p <- p - lr*min(most, |p|/|u|)*u; hats: x/(1 - b^t).

    Args:
        p, g, m, v: parameter, gradient, first and second moment, of one shape.
        lr: learning rate, 0-dim: the share of its norm by which a parameter moves in a step.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction.
        inner_decay: weight decay inside the trust ratio, as in the paper. Decay given to the engine is outside of it.
        most: largest trust ratio |p|/|u|; 1 is LAMBC (timm's trust_clip).

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step, and one more pass for the norms.
    Departures: version 5 of the paper, so no division by the norm of all gradients (timm: max_grad_norm=None); the norm of p
        is not clamped (the paper's phi is the identity); parameters that are not decayed have a trust ratio too (timm:
        always_adapt=True). The ratio is 1 where p or u is 0.
    """
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    u = (1 / (1 - b1**t)) * m / (v.sqrt() * (1 / (1 - b2**t).sqrt()) + eps)
    if inner_decay:
        u = u + inner_decay * p
    return -lr * ratio_of(p.norm(), u.norm()).clamp(max=most) * u, m, v
