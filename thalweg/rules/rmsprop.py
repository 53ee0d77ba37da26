"""RMSprop: the gradient over the root of its running mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


def _slots(options: Mapping[str, Any]) -> tuple[Slot, ...]:
    v = Slot("v", start=1.0 if options["variant"] == "tf" else 0.0, signed=False)
    return (v, *([Slot("mean")] if options["centered"] else []), *([Slot("m")] if options["momentum"] else []))


@rule(
    slots=_slots,
    reads="element",
    decay="coupled",
    lr=1e-2,
    paper="Tieleman and Hinton 2012, Coursera lecture 6.5",
    year=2012,
    reference="torch.optim.RMSprop; variant='tf' timm.optim.RMSpropTF",
    ships=("torch", "timm", "pytorch_optimizer", "optax", "keras", "heavyball"),
    use="Reproducing old recipes: convolutional networks in the TensorFlow form, agents that learn by reinforcement.",
    avoid="New work: AdamW does the same with bias correction and decoupled decay.",
    evidence="Legacy; no recent independent evidence. Flavours differ by up to 0.3 in the parameters after 12 steps.",
    choices={"variant": ("torch", "tf")},
    torch_names={"v": "square_avg", "mean": "grad_avg", "m": "momentum_buffer"},
)
def rmsprop(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    *kept: Tensor,
    lr: Tensor,
    t: Tensor,
    b2: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    variant: str = "torch",
) -> tuple[Tensor, ...]:
    """v <- b2*v + (1-b2)*g^2;  p <- p - lr*g/(sqrt(v) + eps), or with momentum m <- momentum*m + that ratio;  p <- p - lr*m.

    Args:
        p, g, v: parameter, gradient and mean square, of one shape.
        kept: mean gradient with ``centered``, then momentum buffer m with ``momentum``.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        b2: decay of v, in [0, 1); torch's alpha.
        eps: at 0 or above.
        momentum: in [0, 1); 0 keeps no buffer.
        centered: take the square of the mean gradient off v (Graves 2013, arXiv:1308.0850).
        variant: "torch": eps beside the root, v begins at 0. "tf": eps under the root, v begins at 1 (with b2=0.9 and
            eps=1e-10, timm's RMSpropTF).

    Cost: 1 to 3 slots a parameter (4 to 12 B at fp32); reads 3 to 5 and writes 2 to 4 tensors a step.
    Departures: the variance is held at 0 or above, where rounding gives torch the root of a negative number. lr stays out
    of m, so that a schedule acts at once; TensorFlow puts it in, which is the same at a constant rate. Keras and optax put
    eps under the root but begin at 0; heavyball corrects the bias of v.
    """
    v = b2 * v + (1 - b2) * g * g
    spread, made = v, [v]
    if centered:
        mean = torch.lerp(g, kept[0], b2)
        spread = (v - mean * mean).clamp(min=0)
        made.append(mean)
    root = spread.sqrt() + eps if variant == "torch" else (spread + eps).sqrt()
    push = g / root
    if momentum:
        push = momentum * kept[-1] + push
        made.append(push)
    return (-lr * push, *made)
