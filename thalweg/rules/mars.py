"""MARS: Adam or Lion on gradients that are corrected by their change since the last step."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=lambda options: ("last", "m") + ((Slot("v", signed=False),) if options["variant"] == "adamw" else ()),
    reads="tensor",
    decay="decoupled",
    lr=3e-3,
    paper="Yuan et al. 2024, arXiv:2411.10438",
    year=2024,
    reference="timm.optim.Mars",
    choices={"variant": ("adamw", "lion")},
    ships=("timm", "pytorch_optimizer", "heavyball"),
    use="Pretraining of language models where 12 bytes of state a parameter fit.",
    avoid="Vectors and norms (its authors give them to adamw); memory-bound jobs.",
    evidence="Final loss of a 720M Llama 2.902 after 16B and 2.798 after 48B tokens, AdamW 2.930 and 2.815 "
    "(arXiv:2509.01440): second best of eleven.",
)
def mars(
    p: Tensor,
    g: Tensor,
    last: Tensor,
    m: Tensor,
    v: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.95,
    b2: float = 0.99,
    eps: float = 1e-8,
    gamma: float = 0.025,
    variant: str = "adamw",
) -> tuple[Tensor, ...]:
    """c = g + gamma*b1/(1-b1)*(g - last), c <- c/max(1, |c|);  m, v as in Adam, of c;  p <- p - lr*m^/(sqrt(v^) + eps), or
    with "lion" p <- p - lr*sign(m).

    Args:
        p, g, last, m, v: parameter, gradient, last step's gradient, first and second moment, of one shape.
        lr: learning rate, 0-dim; with "lion" some 10 times smaller.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction.
        gamma: how much of the correction is taken; 0: none.
        variant: "adamw" or "lion" (no v).

    Cost: 3 slots a parameter (12 B at fp32), 2 with "lion"; reads 5 and writes 4 tensors a step, and a pass for the norm.
    Departures: the paper's approximate form, in which ``last`` is the gradient of the last batch, not of this batch at the
        last weights. The first step has no last gradient and is not corrected, as in timm; the authors' code takes 0 for
        it. There the vectors go to AdamW, here to the recipe's groups.
    """
    later = (t - 1).clamp(max=1.0)  # 0 at the first update, then 1
    c = g + (gamma * b1 / (1 - b1) * later) * (g - last)
    c = c / c.norm().clamp(min=1.0)
    m = b1 * m + (1 - b1) * c
    if v is None:
        return -lr * m.sign(), g.clone(), m
    v = b2 * v + (1 - b2) * c * c
    root = v.sqrt() * (1 / (1 - b2**t).sqrt()) + eps
    return -(lr / (1 - b1**t)) * m / root, g.clone(), m, v
