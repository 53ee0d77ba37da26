"""Signum, the sign of momentum; without momentum, sign-SGD."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import rule


@rule(
    slots=lambda options: ("m",) if options["momentum"] else (),
    reads="element",
    decay="decoupled",
    lr=1e-4,
    paper="Bernstein et al. 2018, arXiv:1802.04434",
    year=2018,
    reference="optax.signum",
    ships=("pytorch_optimizer", "optax", "bitsandbytes"),
    use="A baseline with one slot or none; what Adam and Lion are with everything else taken away.",
    avoid="Language models: worse than AdamW at every length measured.",
    evidence="Final loss of a 720M Llama after 16B and 48B tokens 2.945 and 2.837, AdamW 2.930 and 2.815 (arXiv:2509.01440).",
    scale_free=True,
)
def signum(
    p: Tensor,
    g: Tensor,
    m: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    momentum: float = 0.9,
) -> tuple[Tensor, ...]:
    """m <- momentum*m + (1-momentum)*g;  p <- p - lr*sign(m).

    Args:
        p, g, m: parameter, gradient and momentum, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        momentum: in [0, 1); 0 keeps no slot and is sign-SGD.

    Cost: 1 slot a parameter (4 B at fp32), or none; reads 3 and writes 2 tensors a step, or reads 2 and writes 1.
    """
    if m is None:
        return (-lr * g.sign(),)
    m = torch.lerp(g, m, momentum)
    return -lr * m.sign(), m
