"""StableAdamW: AdamW that takes shorter steps where the second moment lags behind the gradient."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=("m", Slot("v", signed=False)),
    reads="tensor",
    decay="decoupled",
    lr=1e-3,
    paper="Wortsman et al. 2023, arXiv:2304.13013",
    year=2023,
    reference="optimi.StableAdamW",
    scale_free=True,
    ships=("optimi", "pytorch_optimizer"),
    use="Instead of gradient clipping where the loss spikes: large vision and language models.",
    avoid="Runs that do not spike, where it is AdamW with one more pass.",
    evidence="Removed the loss spikes of CLIP ViT-Huge runs (its authors); no independent comparison known to us.",
)
def stable_adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """w_b = (1-b)/(1-b^t);  m <- m + w_b1*(g - m);  v <- v + w_b2*(g^2 - v);  R = RMS(g/max(sqrt(v), eps));
    p <- p - lr/max(1, R)*m/(sqrt(v) + eps).

    Args:
        p, g, m, v: parameter, gradient, first and second moment (both corrected for their start), of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, and its least value in R; above 0.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step, and one more pass for R.
    Departures: decay is the engine's lr*wd*p; in the paper and in optimi the rate shortened by R scales it too. The moments
        are kept corrected, so they are torch's divided by 1 - b^t.
    """
    m = m + ((1 - b1) / (1 - b1**t)) * (g - m)
    square = g * g
    v = v + ((1 - b2) / (1 - b2**t)) * (square - v)
    size = (square / v.clamp(min=eps * eps)).mean().sqrt()
    return -(lr / size.clamp(min=1.0)) * m / (v.sqrt() + eps), m, v
