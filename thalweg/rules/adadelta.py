"""Adadelta: steps in the units of the parameter, from the ratio of two running roots."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.registry import Slot, rule


@rule(
    slots=(Slot("v", signed=False), Slot("u", signed=False)),
    reads="element",
    decay="coupled",
    lr=1.0,
    paper="Zeiler 2012, arXiv:1212.5701",
    year=2012,
    reference="torch.optim.Adadelta",
    ships=("torch", "pytorch_optimizer", "optax", "keras"),
    use="Reproducing work that used it.",
    avoid="New work: it starts slowly, from steps of about sqrt(eps).",
    evidence="Not competitive since 2020; no recent independent evidence.",
    torch_names={"v": "square_avg", "u": "acc_delta"},
)
def adadelta(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    b2: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """v <- b2*v + (1-b2)*g^2;  d = g*sqrt(u + eps)/sqrt(v + eps);  u <- b2*u + (1-b2)*d^2;  p <- p - lr*d.

    Args:
        p, g, v, u: parameter, gradient, mean squares of gradients and of steps, of one shape.
        lr: learning rate, 0-dim; 1 is the paper's rule.
        t: number of this update, from 1; not used.
        b2: decay of both means, in [0, 1); the paper's rho.
        eps: under both roots, above 0: it is what starts the steps.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 3 tensors a step.
    Departures: b2 is the paper's 0.95, torch's and optax's default is 0.9. pytorch_optimizer's class of this name ends 3e-2
    away after 12 steps.
    """
    v = b2 * v + (1 - b2) * g * g
    step = g * ((u + eps) / (v + eps)).sqrt()
    return -lr * step, v, b2 * u + (1 - b2) * step * step
