"""Adafactor: second moments kept as one row and one column of each matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


def factored(row: Tensor, column: Tensor, least: float = 0.0) -> Tensor:
    """The matrix (..., R, C) of rank 1 with these row means (..., R, 1) and column means (..., 1, C).

    The row is divided first: row * column alone underflows in float32 for gradients below 1e-10.
    """
    return column * (row / row.mean(dim=-2, keepdim=True).clamp(min=least))


def rms(x: Tensor) -> Tensor:
    """Root mean square of each matrix, (..., 1, 1)."""
    return x.square().mean(dim=(-2, -1), keepdim=True).sqrt()


@rule(
    slots=(Slot("r", "row", signed=False), Slot("c", "column", signed=False)),
    reads="matrix",
    decay="decoupled",
    lr=1e-2,
    paper="Shazeer and Stern 2018, arXiv:1804.04235",
    year=2018,
    reference="torch.optim.Adafactor",
    choices={"variant": ("torch", "shazeer")},
    ships=("torch", "timm", "optax", "keras", "pytorch_optimizer"),
    use="Large matrices where even one slot a parameter is too much: it keeps R + C numbers for R*C weights.",
    avoid="Anything whose AdamW state fits: there is no momentum, and the update costs several passes.",
    evidence="The memory default of the T5 and PaLM era. torch = optax = Keras to 2e-6; pytorch_optimizer is 5e-2 away, "
    "and timm's is the BigVision rule.",
    torch_names={"r": "row_var", "c": "col_var"},
)
def adafactor(
    p: Tensor,
    g: Tensor,
    r: Tensor,
    c: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    ndim: int,
    beta2_decay: float = -0.8,
    eps1: float | None = None,
    eps2: float = 1e-3,
    most_rms: float = 1.0,
    relative_step: bool = True,
    scale_parameter: bool = True,
    variant: str = "torch",
) -> tuple[Tensor, ...]:
    """r, c <- means of g^2 over columns and rows, averaged with weight t^beta2_decay;  v = r*c/mean(r);  u = g/sqrt(v);
    p <- p - max(eps2, RMS(p)) * min(lr, 1/sqrt(t)) * u/max(1, RMS(u)/most_rms).

    Args:
        p, g: parameter and gradient, (..., R, C); a vector is (1, n).
        r, c: running means of g^2 by row, (..., R, 1), and by column, (..., 1, C).
        lr: learning rate, 0-dim; with ``relative_step`` the most that the rate can be.
        t: number of this update, from 1, 0-dim.
        ndim: dimensions of the parameter; below 2 the estimate is not factored.
        beta2_decay: the new g^2 weighs t^beta2_decay, at most 0; -1 is the plain mean of all steps.
        eps1: least root of v ("torch"; None: the dtype's machine epsilon), or added to g^2 ("shazeer"; None: 1e-30).
        eps2: least size of a parameter.
        most_rms: the update's largest RMS; 0: any.
        relative_step: use min(lr, 1/sqrt(t)), not lr.
        scale_parameter: multiply by max(eps2, RMS(p)).
        variant: "torch": v is kept above eps1^2 and mean(r) above eps1; "shazeer": eps1 is added to g^2, as in the paper.

    Cost: R + C numbers for each matrix, 1 slot for a vector; reads 2 tensors and writes 1 a step, in some 5 passes.
    Departures: torch raises on a 0-dim parameter (here it is a vector of 1). Of a batch of matrices (3 dimensions) each is
        clipped and scaled by its own RMS, torch takes the RMS of all; kernels of 4 dimensions are factored as
        (out, in*height*width), torch factors height by width. The paper's option of a first moment is not here.
    """
    new = t**beta2_decay
    if eps1 is None:
        eps1 = torch.finfo(p.dtype).eps if variant == "torch" else 1e-30
    square = g * g if variant == "torch" else g * g + eps1
    r = r + new * (square.mean(dim=-1, keepdim=True) - r)
    c = c + new * (square.mean(dim=-2, keepdim=True) - c)
    if variant == "torch":
        v = (c if ndim < 2 else factored(r, c, eps1)).clamp(min=eps1 * eps1)
    else:
        v = c if ndim < 2 else factored(r, c)
    u = g * v.rsqrt()
    rate = torch.minimum(lr, t**-0.5) if relative_step else lr
    length = (g * g / v).mean(dim=(-2, -1), keepdim=True).sqrt()  # the RMS of u, without its square roots
    size = rate / (length / most_rms).clamp(min=1.0) if most_rms else rate
    if scale_parameter:
        size = size * rms(p).clamp(min=eps2)
    return -size * u, r, c
