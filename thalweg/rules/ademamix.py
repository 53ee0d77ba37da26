"""AdEMAMix: Adam with a second, very slow momentum beside the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", "slow", Slot("v", signed=False)),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper="Pagliardini, Ablin and Grangier 2024, arXiv:2409.03137",
    year=2024,
    reference="pytorch_optimizer.AdEMAMix(t_alpha_beta3=warmup)",
    ships=("pytorch_optimizer", "optax", "heavyball", "bitsandbytes"),
    use="The most from each token where 12 B of slots a parameter are there; warmup as long as the run, alpha=8, wd=0.1 for "
    "language models, b3=0.999 for short runs.",
    avoid="Short runs with the default b3: the slow mean needs about 1/(1-b3) updates.",
    evidence="Best of 11 at 720M: final loss after 16B and 48B tokens 2.900 and 2.797, AdamW 2.930 and 2.815 "
    "(arXiv:2509.01440). Score .507 in AlgoPerf's self-tuning runs of 2026: 2nd by time, 1st by steps.",
)
def ademamix(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    slow: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    warmup: int = 0,
    eps: float = 1e-8,
) -> tuple[Tensor, ...]:
    """m, v as Adam's;  slow <- b3*slow + (1-b3)*g;  p <- p - lr*(m^ + alpha*slow)/(sqrt(v^) + eps), hats being x/(1 - b^t).

    Args:
        p, g, m, v: parameter, gradient, first and second moment, of one shape.
        slow: the slow mean of gradients; its bias is not corrected.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2, b3: decay of the means, in [0, 1).
        alpha: weight of the slow mean, at 0 or above.
        warmup: updates over which alpha rises in a line from 0 and the half-life of the slow mean from b1's to b3's; 0: none.
        eps: added to the root, after the bias correction.

    Cost: 3 slots a parameter (12 B at fp32); reads 5 and writes 4 tensors a step.
    Departures: optax's ademamix has alpha and b3 constant unless given schedules of its own.
    """
    share: Tensor | float = alpha
    step: Tensor | float = 1 - b3
    if warmup:
        done = (t / warmup).clamp(max=1)
        share = alpha * done
        # 1/log(b) is the half-life but for a constant; b = 0 forgets at once
        first, last = (1 / math.log(b) if b else 0.0 for b in (b1, b3))
        step = -(1 / (first + (last - first) * done)).expm1()
    m = torch.lerp(m, g, 1 - b1)
    slow = slow + step * (g - slow)
    v = b2 * v + (1 - b2) * g * g
    root = v.sqrt() / (1 - b2**t).sqrt() + eps
    return -((lr / (1 - b1**t)) * m + (lr * share) * slow) / root, m, slow, v
