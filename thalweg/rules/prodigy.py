"""Prodigy: Adam that estimates its own rate, from how far the parameters have come along the gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, rule


def _slots(options: Any) -> tuple[str | Slot, ...]:
    # s grows by parts in a thousand: few bits would swallow them
    mine = (Slot("v", signed=False), Slot("s", compressible=False), Slot("start", start="param", compressible=False))
    return mine + (("m",) if options["b1"] else ())


def _rate(d: Tensor, lr: Tensor, t: Tensor, b1: float, b2: float, bias_correction: bool) -> Tensor:
    return d * lr * (1 - b2**t).sqrt() / (1 - b1**t) if bias_correction else d * lr


def _sum(s: Tensor, g: Tensor, d: Tensor, rate: Tensor, d0: float, b3: float, safeguard_warmup: bool) -> Tensor:
    """The running sum of gradients; d/d0 instead of d keeps it from being too small for its dtype."""
    return b3 * s + (d / d0 * (d if safeguard_warmup else rate)) * g


def _measure(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    s: Tensor,
    start: Tensor,
    m: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    d: Tensor,
    b1: float,
    b2: float,
    b3: float | None,
    d0: float,
    bias_correction: bool,
    safeguard_warmup: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """(d/d0*rate*<g, start - p>, |s|_1): what the gradients say of the way from the start."""
    rate = _rate(d, lr, t, b1, b2, bias_correction)
    s = _sum(s, g, d, rate, d0, b2**0.5 if b3 is None else b3, safeguard_warmup)
    return d / d0 * rate * (g * (start - p)).sum(), s.abs().sum()


def _settle(
    way: Tensor,
    size: Tensor,
    *,
    d: Tensor,
    d_max: Tensor,
    way_sum: Tensor,
    b2: float,
    b3: float | None,
    d0: float,
    d_coef: float,
    growth_rate: float,
    **_: Any,
) -> dict[str, Tensor]:
    total = (b2**0.5 if b3 is None else b3) * way_sum + way
    found = d_coef * torch.where(size > 0, total / size, 0.0)
    jump = torch.where(d == d0, torch.maximum(d, found), d)
    most = torch.maximum(d_max, found)
    return {"d": torch.minimum(most, jump * growth_rate), "d_max": most, "d_last": d, "way_sum": total}


@rule(
    slots=_slots,
    reads="element",
    decay="decoupled",
    rate="d_last",
    lr=1.0,
    paper="Mishchenko and Defazio 2023, arXiv:2306.06101",
    year=2023,
    reference="prodigyopt.Prodigy",
    ships=("prodigyopt", "pytorch_optimizer", "optax"),
    use="A first run on something new, without a search for the rate (diffusion fine-tuning is where it is used most).",
    avoid="Where a tuned AdamW exists; a warm-up without safeguard_warmup, in which d can stay near d0.",
    evidence="Final loss of a 720M Llama 2.941 after 16B and 2.825 after 48B tokens, AdamW 2.930 and 2.815 "
    "(arXiv:2509.01440); a schedule-free form reached no target in AlgoPerf v0.5.",
    shared={"d": "d0", "d_max": "d0", "d_last": "d0", "way_sum": 0.0},
    measure=_measure,
    settle=_settle,
)
def prodigy(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    s: Tensor,
    start: Tensor,
    m: Tensor | None = None,
    *,
    lr: Tensor,
    t: Tensor,
    d: Tensor,
    d_last: Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float | None = None,
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = math.inf,
    bias_correction: bool = False,
    safeguard_warmup: bool = False,
    inner_decay: float = 0.0,
) -> tuple[Tensor, ...]:
    """m <- b1*m + (1-b1)*d*g;  v <- b2*v + (1-b2)*(d*g)^2;  s <- b3*s + d*k*g;  w <- b3*w + d*k*<g, start - p>;
    d' = max(d, d_coef*w/|s|_1);  p <- p - k*m/(sqrt(v) + d'*eps);  k = d*lr, w and d one for all parameters.

    Args:
        p, g, v, s, m: parameter, gradient, second moment, sum of gradients, first moment (none if b1 is 0), of one shape.
        start: the parameter as it began.
        lr: multiple of the estimated rate, 0-dim: 1, and a schedule that ends at 0.
        t: number of this update, from 1, 0-dim.
        d, d_last: estimates of the distance to a solution, with and without this step's gradients.
        b1, b2, b3: decay of m, v, and of s and w, in [0, 1); b3=None is sqrt(b2).
        eps: times d, added to the root.
        d0: first d, above 0.
        d_coef: multiple of the estimate; 0.5 or 2 to change the rate.
        growth_rate: most that d can grow by in a step; above 1.
        bias_correction: k = d*lr*sqrt(1 - b2^t)/(1 - b1^t), as in Adam.
        safeguard_warmup: leave lr out of s, so that a warm-up does not hold d down.
        inner_decay: p <- p - k*inner_decay*p: decoupled decay at the estimated rate, as in prodigyopt.

    Cost: 4 slots a parameter (16 B at fp32; 12 if b1 is 0); reads 6 and writes 4 tensors a step, and a pass to measure that
        reads 4.
    Departures: decay by the engine has the estimated rate too, so without bias_correction it is ``inner_decay``. Stages of
        gradients (coupled decay, clips) act after the measuring, which sees gradients as they come. No slice_p. At lr=0 the
        moments go on, prodigyopt skips the step; gradients of zero at the start count as updates, there they do not. If b1
        is 0, m is d*g with the d before this step, as for any other b1; prodigyopt takes the d after it.
    """
    rate = _rate(d_last, lr, t, b1, b2, bias_correction)
    v = b2 * v + (d_last * d_last * (1 - b2)) * g * g
    s = _sum(s, g, d_last, rate, d0, b2**0.5 if b3 is None else b3, safeguard_warmup)
    if m is not None:
        m = b1 * m + (d_last * (1 - b1)) * g
    change = -rate * (d_last * g if m is None else m) / (v.sqrt() + d * eps)
    if inner_decay:
        change = change - (rate * inner_decay) * p
    return (change, v, s, start.clone()) if m is None else (change, v, s, start.clone(), m)
