"""NAdam, and NAdamW: Adam with Nesterov's look ahead, in the three published forms of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule

_SLOTS = (Slot("m"), Slot("v", signed=False))
_PRODUCT = Slot("mu_product", shape="uniform", start=1.0)
_ABOUT: dict[str, Any] = {
    "reads": "element",
    "slots": lambda options: (*_SLOTS, _PRODUCT) if options["variant"] == "torch" else _SLOTS,
    "lr": 2e-3,
    "paper": "Dozat 2016, openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ",
    "year": 2016,
    "ships": ("torch", "timm", "pytorch_optimizer", "optax", "keras", "heavyball"),
    "choices": {"variant": ("torch", "dozat", "algoperf")},
    "torch_names": {"m": "exp_avg", "v": "exp_avg_sq", "mu_product": "mu_product"},
}


@rule(
    name="nadamw",
    decay="decoupled",
    reference="torch.optim.NAdam(decoupled_weight_decay=True); variant='dozat' optax.nadamw; 'algoperf' timm.optim.NAdamW",
    use="Where AdamW is used, with a little more look ahead; variant='algoperf' is AlgoPerf's baseline.",
    avoid="Comparing numbers across libraries without naming the variant.",
    evidence="As AlgoPerf's baseline (variant='algoperf'): score .571 in the external ruleset of 2024, .436 in the self-tuning "
    "runs of 2026, 4th of 16. The cautious form of it: .295, no gain.",
    **_ABOUT,
)
@rule(
    decay="coupled",
    reference="torch.optim.NAdam; variant='dozat' optax.nadam",
    use="Reproducing work that used it, or no weight decay at all (then it equals NAdamW).",
    avoid="Weight decay: coupled decay is divided by the root of v, so its strength does not act (use NAdamW).",
    evidence="See NAdamW; with coupled decay no independent evidence.",
    **_ABOUT,
)
def nadam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    mu_product: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum_decay: float = 0.004,
    variant: str = "torch",
) -> tuple[Tensor, ...]:
    """m, v as Adam's;  p <- p - lr*(a*m + c*g)/(sqrt(v/(1 - b2^t)) + eps), a and c by the variant.

    Args:
        p, g, m, v: parameter, gradient, first and second moment, of one shape.
        mu_product: product of the momenta mu so far, one number; there with variant "torch" alone.
        lr: learning rate, 0-dim.
        t: number of this update, from 1, 0-dim.
        b1, b2: decay of the moments, in [0, 1).
        eps: beside the root, after the bias correction.
        momentum_decay: how fast mu nears b1, at 0 or above; of variant "torch" alone.
        variant: "torch": mu_t = b1*(1 - 0.96^(t*momentum_decay)/2), P_t = mu_1*...*mu_t, a = mu_(t+1)/(1 - P_(t+1)),
            c = (1 - mu_t)/(1 - P_t). "dozat": mu is b1 throughout, so a = b1/(1 - b1^(t+1)), c = (1 - b1)/(1 - b1^t); as
            optax. "algoperf": a = b1/(1 - b1^t), c = (1 - b1)/(1 - b1^t); as timm's NAdamW and AlgoPerf's baseline.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: the paper's algorithm multiplies v by b2 once more; no library does, nor do we. Keras has a fourth form.
    """
    m = torch.lerp(m, g, 1 - b1)
    v = b2 * v + (1 - b2) * g * g
    root = v.sqrt() / (1 - b2**t).sqrt() + eps
    if mu_product is None:
        ahead, now = b1 / (1 - b1 ** (t + 1 if variant == "dozat" else t)), (1 - b1) / (1 - b1**t)
        return -((lr * ahead) * m + (lr * now) * g) / root, m, v
    mu = b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    following = b1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    mu_product = mu_product * mu
    ahead, now = following / (1 - mu_product * following), (1 - mu) / (1 - mu_product)
    return -((lr * ahead) * m + (lr * now) * g) / root, m, v, mu_product
