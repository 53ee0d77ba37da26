"""Adam, and AdamW: the same maths under two names that differ in the form of weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule

_SLOTS = ("m", Slot("v", signed=False))
_ABOUT: dict[str, Any] = {
    "reads": "element",
    "slots": lambda options: _SLOTS + ((Slot("v_max", signed=False),) if options["amsgrad"] else ()),
    "lr": 1e-3,
    "scale_free": True,
    "ships": ("torch", "timm", "optax", "keras", "optimi", "heavyball"),
    "torch_names": {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"},
}


@rule(
    name="adamw",
    decay="decoupled",
    paper="Loshchilov and Hutter 2017, arXiv:1711.05101",
    year=2017,
    reference="torch.optim.AdamW",
    use="The first thing to try on anything; the reference that every newer rule is measured against.",
    avoid="ResNet-type CNNs from scratch, where SGD with momentum is ahead; memory-bound jobs (Adafactor, 8-bit slots).",
    evidence="Tuning its peak rate alone is worth up to 2x in steps (arXiv:2509.02046). Final loss of a 720M Llama after "
    "48B tokens 2.815, within 0.02 of the best (arXiv:2509.01440).",
    **_ABOUT,
)
@rule(
    decay="coupled",
    paper="Kingma and Ba 2014, arXiv:1412.6980",
    year=2014,
    reference="torch.optim.Adam",
    use="Reproducing work that used it, or no weight decay at all (then it equals AdamW).",
    avoid="Weight decay: coupled decay is divided by the root of v, so its strength does not act (use AdamW).",
    evidence="Superseded by AdamW wherever weights decay (arXiv:1711.05101).",
    **_ABOUT,
)
def adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    amsgrad: bool = False,
) -> tuple[Tensor, ...]:
    """m <- b1*m + (1-b1)*g;  v <- b2*v + (1-b2)*g^2;  p <- p - lr*m^/(sqrt(v^) + eps), hats being x/(1 - b^t).

    Args:
        p, g, m, v: parameter, gradient, first and second moment, of one shape.
        v_max: largest v so far; there with ``amsgrad`` alone.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root, after the bias correction (the paper's algorithm 1).
        amsgrad: divide by the largest v so far (Reddi et al. 2018, arXiv:1904.09237), taken before the bias correction as
            in torch and Keras; optax takes it after.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    """
    m = torch.lerp(m, g, 1 - b1)
    v = b2 * v + (1 - b2) * g * g
    second = v
    if v_max is not None:
        second = v_max = torch.maximum(v_max, v)
    root = second.sqrt() * (1 / (1 - b2**t).sqrt()) + eps
    change = -(lr / (1 - b1**t)) * m / root
    return (change, m, v) if v_max is None else (change, m, v, v_max)
