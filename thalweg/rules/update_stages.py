"""What can be done to any rule's change of a parameter: masks, clips and trust ratios."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thalweg.rules.registry import stage

#: Keeps quotients finite where a norm is 0; what it divides is then 0 too.
_TINY = 1e-30


def ratio_of(weight: Tensor, step: Tensor) -> Tensor:
    """weight/step of two norms, or 1 where one of them is 0: the trust ratio of LAMB, LARS and the stage below."""
    return torch.where(weight > 0, torch.where(step > 0, weight / step, 1.0), 1.0)


@stage(kind="update", reads="tensor", paper="Liang et al. 2024, arXiv:2411.16085")
def cautious(p: Tensor, g: Tensor, d: Tensor, *, least: float = 1e-3) -> tuple[Tensor]:
    """k = [d*g < 0];  d <- d*k/max(mean(k), least): only what goes against this step's gradient moves.

    Args:
        d: the rule's change.
        least: least mean of the mask, above 0; so the rest is at most 1/least times longer.

    Cost: no slot; one more pass for the mean.
    Departures: the paper's algorithm divides by (count of k + 1)/n; we follow its authors' code, which takes the mean.
    """
    mask = (d.sign() * g < 0).to(d.dtype)  # d*g itself can underflow
    return (d * (mask / mask.mean().clamp(min=least)),)


@stage(kind="update", reads="tensor", paper="Shazeer and Stern 2018, section 6, arXiv:1804.04235")
def clip_update_rms(p: Tensor, g: Tensor, d: Tensor, *, lr: Tensor, most: float = 1.0) -> tuple[Tensor]:
    """d <- d*min(1, most*lr/RMS(d)): the update before the rate, d/lr, has an RMS of at most ``most``.

    Args:
        d: the rule's change, the rate in it.
        lr: learning rate, 0-dim.
        most: largest RMS of d/lr.

    Cost: no slot; one more pass for the RMS.
    Departures: StableAdamW (the rule stable_adamw) takes the RMS of g/sqrt(v) instead, before momentum smooths it.
    """
    rms = d.square().mean().sqrt()
    return (d * (most * lr / rms.clamp(min=_TINY)).clamp(max=1.0),)


@stage(kind="total", reads="tensor", paper="You et al. 2019, arXiv:1904.00962")
def trust_ratio(
    p: Tensor, g: Tensor, d: Tensor, *, lr: Tensor, coefficient: float = 1.0, most: float = math.inf
) -> tuple[Tensor]:
    """d <- d*min(most, coefficient*|p|/|d/lr|): every parameter moves by the same share of its norm, lr*coefficient.

    Args:
        d: the whole change, decay and rate in it.
        lr: learning rate, 0-dim.
        coefficient: the share of |p| that a rate of 1 moves.
        most: largest factor of d; 1 is LAMB's clipped form (LAMBC).

    Where p or d is 0 the ratio is 1 (and no coefficient acts).

    Cost: no slot; one more pass for the two norms.
    Departures: with AdamW this is LAMB with its decay, but for the place of eps; the rule lamb has its own option for decay.
    """
    return (d * ratio_of(coefficient * lr * p.norm(), d.norm()).clamp(max=most),)
