"""GPA-AdamW: AdamW on fast weights, with gradients taken at a blend of them and their running mean.

The averaging is a stage of its own, as in ``schedule_free``: it sees the whole change, decay in it.
"""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.adam import adam
from thalweg.rules.registry import Slot, rule, stage
from thalweg.rules.schedule_free import evaluation_weights

_PAPER = "Defazio et al. 2025, arXiv:2512.17131"


@stage(
    kind="total",
    slots=(Slot("z", start="param", compressible=False),),
    paper=_PAPER,
    evaluate=lambda p, z, *, mu_y, **_: evaluation_weights(p, z, mu_y) if mu_y else p,
)
def primal_averaging(
    p: Tensor, g: Tensor, d: Tensor, z: Tensor, *, lr: Tensor, mu_x: float = 0.9967, mu_y: float = 0.7
) -> tuple[Tensor, ...]:
    """z <- z + d;  x <- mu_x*x + (1-mu_x)*z;  p <- mu_y*x + (1-mu_y)*z.

    x is not kept: ``thalweg.rules.schedule_free.evaluation_weights(p, z, mu_y)`` gives it.

    Args:
        p, d, z: parameter (the paper's y), the rule's change of it with decay in it, fast weights, of one shape.
        lr: learning rate, 0-dim.
        mu_x: share of the old x in the new, in [0, 1]; 0.9967 is DiLoCo with 32 local steps, by its authors.
        mu_y: share of x in p, in (0, 1].

    Departures: lr = 0 leaves p and the average where they are; the reference goes on averaging.
    """
    share = (lr > 0).to(lr.dtype) * (1 - mu_x)
    return share * (z - p) + (1 - mu_y * (1 - share)) * d, z + d


@rule(
    slots=("m", Slot("v", signed=False)),
    reads="element",
    decay="decoupled",
    lr=1e-3,
    paper=_PAPER,
    year=2025,
    reference="facebookresearch/optimizers gpa.GPAAdamW",
    ships=("facebookresearch/optimizers",),
    use="Where one-worker DiLoCo or a weight average would be tried, at one slot more than AdamW and with any schedule.",
    avoid="Evaluating the live weights where mu_y is far from 1: take evaluation_weights.",
    evidence="No independent evidence. By its authors 8.7, 10.1 and 9.6 % fewer steps than AdamW at 160M, 1B and 8B.",
    then="primal_averaging",
)
def gpa_adamw(
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
) -> tuple[Tensor, ...]:
    """m, v as Adam's;  z <- z - lr*m^/(sqrt(v^) + eps);  x and p as in the stage ``primal_averaging``.

    Args:
        p, g: parameter (the paper's y) and gradient at it, of one shape.
        m, v: first and second moment.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction.

    Cost: 3 slots a parameter (12 B at fp32); reads 5 and writes 4 tensors a step.
    Departures: those of the stage.
    """
    moved: tuple[Tensor, ...] = adam(p, g, m, v, lr=lr, t=t, b1=b1, b2=b2, eps=eps)
    return moved
