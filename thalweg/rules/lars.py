"""LARS: momentum on gradients that are rescaled to each parameter's norm."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import rule
from thalweg.rules.update_stages import ratio_of


@rule(
    slots=("m",),
    reads="tensor",
    decay="coupled",
    lr=1.0,
    paper="You, Gitman and Ginsburg 2017, arXiv:1708.03888",
    year=2017,
    reference="timm.optim.Lars",
    ships=("timm", "pytorch_optimizer", "optax", "bitsandbytes"),
    use="Convolutional networks at very large batches; self-supervised recipes that were tuned with it.",
    avoid="Biases and norms (leave them to sgd, as its recipes do); ordinary batches, where sgd with momentum is as good.",
    evidence="ResNet-50 at a batch of 32k (its authors). optax and timm 4e-4 apart after 12 steps, pytorch_optimizer 5e-1.",
)
def lars(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust: float = 1e-3,
    eps: float = 1e-8,
    inner_decay: float = 0.0,
) -> tuple[Tensor, ...]:
    """a = trust*|p|/(|g| + inner_decay*|p| + eps);  m <- momentum*m + a*(g + inner_decay*p);  p <- p - lr*m.

    Args:
        p, g, m: parameter, gradient and momentum buffer, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        momentum: in [0, 1).
        nesterov: p <- p - lr*(a*(g + inner_decay*p) + momentum*m).
        trust: the share of |p| that a rate of 1 moves.
        eps: added to the norms.
        inner_decay: weight decay as in the paper, the norms of its parts being added. With coupled decay of the engine the
            norm is of the sum |g + wd*p|, as in optax.

    Where p or g is 0, a is 1.

    Cost: 1 slot a parameter (4 B at fp32); reads 3 and writes 2 tensors a step, and one more pass for the norms.
    Departures: the paper folds lr into m; we keep it out as timm does (always_adapt=True), so that a schedule acts at once;
        optax folds it in.
    """
    weight, size = p.norm(), g.norm()
    a = ratio_of(trust * weight, torch.where(size > 0, size + inner_decay * weight + eps, 0.0))
    push = a * (g + inner_decay * p) if inner_decay else a * g
    m = momentum * m + push
    return -lr * (push + momentum * m if nesterov else m), m
