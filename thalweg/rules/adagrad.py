"""Adagrad: the gradient over the root of the sum of all its squares."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=lambda options: (Slot("v", start=float(options["start"]), signed=False),),
    reads="element",
    decay="coupled",
    lr=1e-2,
    paper="Duchi, Hazan and Singer 2011, jmlr.org/papers/v12/duchi11a.html",
    year=2011,
    reference="torch.optim.Adagrad",
    ships=("torch", "pytorch_optimizer", "optax", "keras", "bitsandbytes"),
    use="Sparse features: embeddings of recommenders and of click models, whose rare rows keep a large rate.",
    avoid="Long runs of deep networks: the rate falls as 1/sqrt(t) whatever the schedule says.",
    evidence="Kept for sparse models and recommenders; no recent independent evidence elsewhere.",
    scale_free=True,
    unmoved=("start",),
    torch_names={"v": "sum"},
)
def adagrad(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    eps: float = 1e-10,
    start: float = 0.0,
) -> tuple[Tensor, ...]:
    """v <- v + g^2;  p <- p - lr*g/(sqrt(v) + eps).

    Args:
        p, g, v: parameter, gradient and sum of squares, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        eps: beside the root.
        start: first value of v, at 0 or above.

    Cost: 1 slot a parameter (4 B at fp32); reads 3 and writes 2 tensors a step.
    Departures: no decay of the rate of its own (torch's lr_decay): that is a schedule. optax and Keras begin v at 0.1 and
    put eps under the root.
    """
    v = v + g * g
    return -lr * (g / (v.sqrt() + eps)), v
