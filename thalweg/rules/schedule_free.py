"""Schedule-free SGD and AdamW: gradients are taken at a blend of the fast weights and their average, and no rate decays.

The averaging is a stage of its own that sees the whole change, decay in it, and moves the fast weights by it: it combines with
every rule and form of decay. The two named rules are plain gradients, and Adam's without momentum, with this stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule, stage

_Z = Slot("z", start="param", compressible=False)
_SHARED = (Slot("weight_sum", shape="uniform", signed=False), Slot("lr_max", shape="uniform", signed=False))
_PAPER = "Defazio et al. 2024, arXiv:2405.15682"


def evaluation_weights(y: Tensor, z: Tensor, b1: float) -> Tensor:
    """The average x = (y - (1-b1)*z)/b1, which is what to evaluate and to ship; y, the live parameter, is what to train.

    Args:
        y, z: live parameter and slot z, of one shape.
        b1: as given to the rule, above 0 (mu_y of gpa_adamw).

    >>> x, z = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    >>> evaluation_weights(0.5 * x + 0.5 * z, z, 0.5)
    tensor([1., 2.])
    """
    return torch.lerp(y, z, 1 - 1 / b1)


@stage(
    kind="total",
    slots=(_Z, *_SHARED),
    paper=_PAPER,
    evaluate=lambda p, z, *_, b1, **__: evaluation_weights(p, z, b1) if b1 else p,
)
def schedule_free(
    p: Tensor,
    g: Tensor,
    d: Tensor,
    z: Tensor,
    weight_sum: Tensor,
    lr_max: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b1: float = 0.9,
    warmup: int = 0,
    weight_lr_power: float = 2.0,
    r: float = 0.0,
) -> tuple[Tensor, ...]:
    """z <- z + d;  x <- (1-c)*x + c*z;  p <- b1*x + (1-b1)*z, where c = w_t/(w_1 + ... + w_t), w_t = t^r*max(lr)^2.

    x is not kept: ``evaluation_weights(p, z, b1)`` gives it.

    Args:
        p, d, z: parameter (the paper's y), the rule's change of it with decay in it, fast weights, of one shape.
        weight_sum, lr_max: sum of w and largest lr so far, one number each.
        lr: learning rate, 0-dim; constant.
        t: number of this update, from 1, 0-dim.
        b1: share of x in p, in (0, 1).
        warmup: updates over which the change rises in a line; 0: none.
        weight_lr_power: power of max(lr) in w, at 0 or above.
        r: power of t in w, at 0 or above.

    Departures: lr = 0 leaves p and the average where they are; the reference goes on averaging.
    """
    if warmup:
        ramp = (t / warmup).clamp(max=1)
        lr, d = lr * ramp, d * ramp
    lr_max = torch.maximum(lr_max, lr)
    weight = torch.where(lr > 0, t**r * lr_max**weight_lr_power, 0.0)  # a rate of 0 leaves the average alone too
    weight_sum = weight_sum + weight
    share = weight / torch.where(weight_sum > 0, weight_sum, 1.0)
    return share * (z - p) + (1 - b1 * (1 - share)) * d, z + d, weight_sum, lr_max


@rule(
    reads="element",
    decay="decoupled",
    lr=1.0,
    paper=_PAPER,
    year=2024,
    reference="schedulefree.SGDScheduleFree",
    ships=("schedulefree", "pytorch_optimizer", "optax", "heavyball"),
    use="Where SGD is used and the length of the run is not known.",
    avoid="Evaluating the live weights: take evaluation_weights, and fresh statistics for batch normalization.",
    evidence="No independent evidence for the SGD form; the AdamW form has it.",
    then="schedule_free",
)
def schedule_free_sgd(p: Tensor, g: Tensor, *, lr: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """z <- z - lr*g;  x <- (1-c)*x + c*z;  p <- b1*x + (1-b1)*z, with the weights c of the stage ``schedule_free``.

    Args:
        p, g: parameter (the paper's y) and gradient at it, of one shape.
        lr: learning rate, 0-dim; constant.
        t: number of this update, from 1, 0-dim.

    Cost: 1 slot a parameter (4 B at fp32); reads 3 and writes 2 tensors a step.
    Departures: those of the stage.
    """
    return (-lr * g,)


@rule(
    slots=(Slot("v", signed=False),),
    reads="element",
    decay="decoupled",
    lr=2.5e-3,
    paper=_PAPER,
    year=2024,
    reference="schedulefree.AdamWScheduleFree",
    ships=("schedulefree", "pytorch_optimizer", "optax", "keras", "heavyball"),
    use="No known length, no schedule to tune: b2=0.9955 and a warm-up of 2 % (AlgoPerf), b1=0.95 to 0.98 and b2=0.9999 for "
    "language models.",
    avoid="Long language-model runs, where it was last; evaluating the live weights (take evaluation_weights, and fresh "
    "statistics for batch normalization).",
    evidence="Won AlgoPerf's self-tuning ruleset of 2024 (.854, baseline .819) and leads its runs of 2026 by time (.568). Final "
    "loss of a 720M Llama after 48B tokens 2.85, the worst of 11; AdamW 2.815 (arXiv:2509.01440).",
    scale_free=True,
    then="schedule_free",
)
def schedule_free_adamw(
    p: Tensor, g: Tensor, v: Tensor, *, lr: Tensor, t: Tensor, b2: float = 0.999, eps: float = 1e-8
) -> tuple[Tensor, ...]:
    """v <- b2*v + (1-b2)*g^2;  z <- z - lr*g/(sqrt(v^) + eps);  x and p as in the stage ``schedule_free``.

    Args:
        p, g, v: parameter (the paper's y), gradient at it, second moment, of one shape.
        lr: learning rate, 0-dim; constant.
        t: number of this update, from 1, 0-dim.
        b2: decay of v, in [0, 1).
        eps: added to the root, after the bias correction.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: those of the stage.
    """
    v = b2 * v + (1 - b2) * g * g
    return -lr * g / (v.sqrt() * (1 / (1 - b2**t).sqrt()) + eps), v
