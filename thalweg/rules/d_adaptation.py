"""D-Adaptation: Adam and SGD that estimate the distance to a solution, and from it their rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule

_PAPER = "Defazio and Mishchenko 2023, arXiv:2301.07733"
_EVIDENCE = "Matched hand-tuned rates on more than a dozen problems (its authors, who followed it up with Prodigy)."


def _rate(d: Tensor, lr: Tensor, t: Tensor, b1: float, b2: float, bias_correction: bool) -> Tensor:
    return d * lr * (1 - b2**t).sqrt() / (1 - b1**t) if bias_correction else d * lr


def _grown(d: Tensor, found: Tensor, growth_rate: float) -> Tensor:
    return torch.maximum(d, torch.minimum(found, d * growth_rate))


def _measure_adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    d: Tensor,
    b1: float,
    b2: float,
    eps: float,
    bias_correction: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """(k*<g, s/(sqrt(v) + eps)> with v and s of the last step, |s|_1 of this one)."""
    rate, b3 = _rate(d, lr, t, b1, b2, bias_correction), b2**0.5
    way = rate * (g * s / (v.sqrt() + eps)).sum()
    return way, (b3 * s + (rate * (1 - b3)) * g).abs().sum()


def _settle_adam(
    way: Tensor,
    size: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    d: Tensor,
    way_sum: Tensor,
    b1: float,
    b2: float,
    growth_rate: float,
    bias_correction: bool,
    **_: Any,
) -> dict[str, Tensor]:
    b3 = b2**0.5
    total = torch.where(size > 0, b3 * way_sum + (1 - b3) * way, way_sum)
    found = torch.where(size > 0, total / ((1 - b3) * size), 0.0)
    rate = _rate(d, lr, t, b1, b2, bias_correction)
    return {"d": _grown(d, found, growth_rate), "rate": rate, "way_sum": total}


@rule(
    slots=("m", Slot("v", signed=False), Slot("s", compressible=False)),
    reads="element",
    decay="decoupled",
    rate="d",
    lr=1.0,
    paper=_PAPER,
    year=2023,
    reference="pytorch_optimizer.DAdaptAdam",
    ships=("pytorch_optimizer", "optax"),
    use="Reproducing work that used it; for a new run without a rate take prodigy.",
    avoid="Where a tuned AdamW exists; it raises its rate and never lowers it, so a schedule must.",
    evidence=_EVIDENCE,
    shared={"d": "d0", "rate": 0.0, "way_sum": 0.0},
    measure=_measure_adam,
    settle=_settle_adam,
)
def d_adapt_adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    rate: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    d0: float = 1e-6,
    growth_rate: float = math.inf,
    bias_correction: bool = False,
    inner_decay: float = 0.0,
) -> tuple[Tensor, ...]:
    """b = sqrt(b2), k = d*lr;  w <- b*w + (1-b)*k*<g, s/(sqrt(v) + eps)>;  m <- b1*m + (1-b1)*k*g;  v <- b2*v + (1-b2)*g^2;
    s <- b*s + (1-b)*k*g;  d <- max(d, w/((1-b)*|s|_1)) for the next step;  p <- p - m/(sqrt(v) + eps).

    Args:
        p, g, m, v, s: parameter, gradient, first and second moment, weighted sum of gradients, of one shape.
        lr: multiple of the estimated rate, 0-dim: 1, and a schedule that ends at 0.
        t: number of this update, from 1, 0-dim.
        rate: k, from the estimate before this step.
        b1, b2: decay of the moments, in [0, 1).
        eps: added to the root.
        d0: first estimate of the distance, above 0.
        growth_rate: most that d can grow by in a step; above 1.
        bias_correction: k = d*lr*sqrt(1 - b2^t)/(1 - b1^t), as in Adam.
        inner_decay: p <- p - k*inner_decay*p: decoupled decay at the estimated rate.

    Cost: 3 slots a parameter (12 B at fp32); reads 5 and writes 4 tensors a step, and a pass to measure that reads 3.
    Departures: its third version (the authors' code), as in pytorch_optimizer; the paper's algorithm 4 is an earlier one.
        Decay by the engine has the estimated rate too, lr*d, which is ``inner_decay`` but for a step's delay and the bias
        correction. The rate is inside m, so a rate that falls to 0 late still moves by what m holds.
    """
    b3 = b2**0.5
    m = b1 * m + (rate * (1 - b1)) * g
    v = b2 * v + (1 - b2) * g * g
    s = b3 * s + (rate * (1 - b3)) * g
    change = -m / (v.sqrt() + eps)
    return (change - (rate * inner_decay) * p if inner_decay else change), m, v, s


def _measure_sgd(
    p: Tensor, g: Tensor, s: Tensor, start: Tensor, *, inner_decay: float, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(|g|^2 without decay, |g|^2, <g, s>, |s|^2)."""
    plain = g.square().sum()
    if inner_decay:
        g = g + inner_decay * p
    return plain, g.square().sum(), (g * s).sum(), s.square().sum()


def _settle_sgd(
    plain: Tensor,
    square: Tensor,
    along: Tensor,
    before: Tensor,
    *,
    lr: Tensor,
    d: Tensor,
    first_norm: Tensor,
    way_sum: Tensor,
    growth_rate: float,
    **_: Any,
) -> dict[str, Tensor]:
    first_norm = torch.where(first_norm > 0, first_norm, plain.sqrt())
    rate = torch.where(first_norm > 0, d * lr / first_norm, 0.0)
    total = way_sum + rate * along
    after = before + 2 * rate * along + rate * rate * square  # |s + rate*g|^2
    found = torch.where(after > 0, 2 * total / after.clamp(min=0.0).sqrt(), 0.0)
    return {"d": _grown(d, found, growth_rate), "rate": rate, "first_norm": first_norm, "way_sum": total}


@rule(
    slots=(Slot("s", compressible=False), Slot("start", start="param", compressible=False)),
    reads="element",
    decay="coupled",
    lr=1.0,
    paper=_PAPER,
    year=2023,
    reference="pytorch_optimizer.DAdaptSGD",
    ships=("pytorch_optimizer",),
    use="Convex and convolutional problems without a search for the rate.",
    avoid="Transformers, as sgd; noisy first gradients, whose norm sets the scale for good.",
    evidence=_EVIDENCE,
    shared={"d": "d0", "rate": 0.0, "first_norm": 0.0, "way_sum": 0.0},
    measure=_measure_sgd,
    settle=_settle_sgd,
    anchored=True,
)
def d_adapt_sgd(
    p: Tensor,
    g: Tensor,
    s: Tensor,
    start: Tensor,
    *,
    lr: Tensor,
    t: Tensor,
    rate: Tensor,
    momentum: float = 0.9,
    d0: float = 1e-6,
    growth_rate: float = math.inf,
    inner_decay: float = 0.0,
) -> tuple[Tensor, ...]:
    """k = d*lr/|g_1|;  w <- w + k*<g, s>;  s <- s + k*g;  d <- max(d, 2*w/|s|) for the next step;
    p <- momentum*p + (1-momentum)*(start - s).

    Args:
        p, g, s: parameter, gradient, sum of the gradients times their rates, of one shape.
        start: the parameter as it began.
        lr: multiple of the estimated rate, 0-dim: 1, and a schedule that ends at 0.
        t: number of this update, from 1; not used.
        rate: k, from the estimate before this step.
        momentum: by averaging of the iterates, in [0, 1).
        d0: first estimate of the distance, above 0.
        growth_rate: most that d can grow by in a step; above 1.
        inner_decay: added to the gradient, times p.

    Cost: 2 slots a parameter (8 B at fp32); reads 4 and writes 2 tensors a step, and a pass to measure that reads 2.
    Departures: the first gradient that is not 0 sets the scale. start - s is not kept: the authors' code has a slot for it.
        The weights follow an average, so they move on after the rate has fallen to 0.
    """
    if inner_decay:
        g = g + inner_decay * p
    s = s + rate * g
    return (1 - momentum) * (start - s - p), s, start.clone()
