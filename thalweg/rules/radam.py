"""RAdam: Adam that waits until its second moment can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", Slot("v", signed=False)),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper="Liu et al. 2019, arXiv:1908.03265",
    year=2019,
    reference="torch.optim.RAdam",
    ships=("torch", "timm", "pytorch_optimizer", "optax", "optimi"),
    use="Adam without a warm-up to choose.",
    avoid="Where a schedule warms up already: then it is Adam with a second warm-up.",
    evidence="It is Adam with an automatic warm-up; no independent evidence that it beats a plain one.",
    torch_names={"m": "exp_avg", "v": "exp_avg_sq"},
    unmoved=("least",),
)
def radam(
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
    least: float = 5.0,
) -> tuple[Tensor, ...]:
    """m, v as Adam's;  n = N - 2*t*b2^t/(1 - b2^t), N = 2/(1-b2) - 1;  p <- p - lr*m^*r/sqrt(v^) if n > least, else p - lr*m^.

    r = sqrt((n-4)*(n-2)*N/((N-4)*(N-2)*n)): the share of the rate that the variance of v allows.

    Args:
        p, g, m, v: parameter, gradient, first and second moment, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root of v, before the bias correction as in torch.
        least: n from which v is used, at 4 or above.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: the paper takes v from n > 4; its authors' code and torch take 5, and so do we. optax adds eps after the
    bias correction (1e-5 away after 12 steps); pytorch_optimizer moves nothing before v counts, but for an option (8e-2).
    torch's default decay is coupled, the authors' is decoupled.
    """
    m = torch.lerp(m, g, 1 - b1)
    v = b2 * v + (1 - b2) * g * g
    most = 2 / (1 - b2) - 1
    length = most - 2 * t * b2**t / (1 - b2**t)
    rate = lr / (1 - b1**t)
    share = ((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)).sqrt()  # NaN where not taken
    adapted = torch.where(length > least, rate * share * (1 - b2**t).sqrt(), 0.0)
    plain = torch.where(length > least, 0.0, rate)
    return -(adapted * (m / (v.sqrt() + eps)) + plain * m), m, v
