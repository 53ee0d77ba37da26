"""Stochastic gradient descent, with momentum and Nesterov's form."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.registry import rule


@rule(
    slots=lambda options: ("m",) if options["momentum"] else (),
    reads="element",
    decay="coupled",
    lr=0.1,
    paper="Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13.html",
    year=2013,
    reference="torch.optim.SGD",
    ships=("torch", "timm", "optax", "keras"),
    use="Convolutional networks from scratch, with momentum=0.9 and nesterov=true; anything with gradients of even scale.",
    avoid="Transformers and embeddings, whose gradients differ by orders of magnitude between layers.",
    evidence="None of the 16 self-tuning AlgoPerf entries of 2026, all adaptive, reached the ResNet-50 target that tuned "
    "momentum reaches.",
    torch_names={"m": "momentum_buffer"},
)
def sgd(
    p: Tensor,
    g: Tensor,
    m: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, ...]:
    """m <- momentum*m + g;  p <- p - lr*m, or with Nesterov p <- p - lr*(g + momentum*m).

    Args:
        p, g, m: parameter, gradient and momentum buffer, of one shape.
        lr: learning rate, 0-dim.
        t: number of this update, from 1; not used.
        momentum: in [0, 1); 0 keeps no slot.
        nesterov: look ahead along the buffer.

    Cost: no slot, or 1 slot a parameter; reads 2 and writes 1 tensors a step, or reads 3 and writes 2.
    Departures: the paper folds lr into m; we keep it out, as torch does, so that a schedule acts at once.
    """
    if m is None:
        return (-lr * g,)
    m = momentum * m + g
    return -lr * (g + momentum * m if nesterov else m), m
