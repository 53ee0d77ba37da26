"""Lion: the sign of momentum that has looked ahead to the newest gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import rule


@rule(
    slots=("m",),
    reads="element",
    decay="decoupled",
    lr=1e-4,
    paper="Chen et al. 2023, arXiv:2302.06675",
    year=2023,
    reference="timm.optim.Lion",
    ships=("timm", "pytorch_optimizer", "optax", "keras", "optimi", "bitsandbytes"),
    use="Half of Adam's slots, at a rate 3 to 10 times smaller and a decay as much larger.",
    avoid="Small batches, whose signs are noise, and long runs, where AdamW is ahead.",
    evidence="Final loss of a 720M Llama after 48B tokens 2.831, AdamW 2.815 (arXiv:2509.01440). Score .263 in AlgoPerf's "
    "self-tuning runs of 2026, 12th of 16: of use for memory only.",
    scale_free=True,
)
def lion(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.99,
) -> tuple[Tensor, ...]:
    """p <- p - lr*sign(b1*m + (1-b1)*g);  then m <- b2*m + (1-b2)*g.

    Args:
        p, g, m: parameter, gradient and momentum, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        b1: share of m in the direction, in [0, 1).
        b2: decay of m, in [0, 1).

    Cost: 1 slot a parameter (4 B at fp32); reads 3 and writes 2 tensors a step.
    """
    return -lr * torch.lerp(g, m, b1).sign(), torch.lerp(g, m, b2)
