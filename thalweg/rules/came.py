"""CAME: Adafactor with momentum, steered by a factored confidence in it."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.adafactor import factored, rms
from thalweg.rules.registry import Slot, rule


@rule(
    slots=(
        "m",
        Slot("r", "row", signed=False),
        Slot("c", "column", signed=False),
        Slot("res_r", "row", signed=False),
        Slot("res_c", "column", signed=False),
    ),
    reads="matrix",
    decay="decoupled",
    lr=2e-4,
    paper="Luo et al. 2023, arXiv:2307.02047",
    year=2023,
    reference="pytorch_optimizer.CAME",
    ships=("pytorch_optimizer",),
    use="Training of large matrices with momentum at half of AdamW's memory.",
    avoid="Where AdamW fits: one library ships it, and it is not in the large comparisons.",
    evidence="BERT, GPT-2 and T5 runs of its authors; no independent evidence known to us.",
)
def came(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    r: Tensor,
    c: Tensor,
    res_r: Tensor,
    res_c: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    ndim: int,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps1: float = 1e-30,
    eps2: float = 1e-16,
    most_rms: float = 1.0,
) -> tuple[Tensor, ...]:
    """v from rows and columns of g^2 + eps1;  u = g/sqrt(v), u <- u/max(1, RMS(u)/most_rms);  m <- b1*m + (1-b1)*u;
    s from rows and columns of (u - m)^2 + eps2;  p <- p - lr*m/sqrt(s).

    Args:
        p, g, m: parameter, gradient and momentum of the updates, (..., R, C); a vector is (1, n).
        r, c: running means of g^2 + eps1 by row, (..., R, 1), and by column, (..., 1, C).
        res_r, res_c: the same of the residual (u - m)^2 + eps2; unused for vectors.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        ndim: dimensions of the parameter; below 2, v is not factored and p <- p - lr*m.
        b1, b2, b3: decay of m, v and s, in [0, 1).
        eps1, eps2: added to the squares, above 0.
        most_rms: the largest RMS of u; 0: any.

    Cost: 1 slot a parameter and 2*(R + C) numbers a matrix; 2 slots for a vector; reads 3 and writes 2 tensors a step.
    Departures: the paper gives matrices alone; vectors are as in its authors' code (Adafactor with momentum). Of a batch of
        matrices each is clipped by its own RMS. No moment is corrected for its start at 0, as in the paper.
    """
    square = g * g + eps1
    r = b2 * r + (1 - b2) * square.mean(dim=-1, keepdim=True)
    c = b2 * c + (1 - b2) * square.mean(dim=-2, keepdim=True)
    u = g * (c if ndim < 2 else factored(r, c)).rsqrt()
    u = u / (rms(u) / most_rms).clamp(min=1.0) if most_rms else u
    m = b1 * m + (1 - b1) * u
    if ndim < 2:
        return -lr * m, m, r, c, res_r, res_c
    residual = (u - m).square() + eps2
    res_r = b3 * res_r + (1 - b3) * residual.mean(dim=-1, keepdim=True)
    res_c = b3 * res_c + (1 - b3) * residual.mean(dim=-2, keepdim=True)
    return -lr * m * factored(res_r, res_c).rsqrt(), m, r, c, res_r, res_c
