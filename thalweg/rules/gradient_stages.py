"""What can be done to a gradient before any rule sees it."""

from __future__ import annotations

from torch import Tensor

from thalweg.rules.registry import stage

#: Keeps quotients finite where a norm is 0; what it divides is then 0 too.
_TINY = 1e-30


@stage(kind="gradient", reads="row", paper="Yong et al. 2020, arXiv:2004.01461")
def centralize(p: Tensor, g: Tensor, *, ndim: int) -> tuple[Tensor]:
    """g <- g - mean(g) of each row: no step changes the mean weight of an output unit.

    Args:
        g: gradient, (..., R, C).
        ndim: dimensions of the parameter; below 2 nothing is done.

    Cost: no slot; one more pass for the means.
    """
    return (g if ndim < 2 else g - g.mean(dim=-1, keepdim=True),)


@stage(kind="gradient", paper="Goodfellow, Bengio and Courville 2016, section 10.11.1")
def clip_value(p: Tensor, g: Tensor, *, most: float = 1.0) -> tuple[Tensor]:
    """g <- min(max(g, -most), most), element by element: this turns the gradient.

    Args:
        most: largest size of an element.

    Cost: no slot.
    """
    return (g.clamp(min=-most, max=most),)


@stage(kind="gradient", reads="tensor", paper="Pascanu, Mikolov and Bengio 2012, arXiv:1211.5063")
def clip_tensor(p: Tensor, g: Tensor, *, most: float = 1.0) -> tuple[Tensor]:
    """g <- g*min(1, most/|g|), each parameter by its own norm: one bad layer does not shorten the others' steps.

    Args:
        most: largest norm of a parameter's gradient.

    Cost: no slot; one more pass for the norm.
    Departures: the paper takes the norm of all parameters together: that is the step's own clipping, not this stage. torch
        adds 1e-6 to the norm; here a gradient within the limit is left as it is.
    """
    return (g * (most / g.norm().clamp(min=_TINY)).clamp(max=1.0),)


@stage(kind="gradient", reads="row", paper="Brock et al. 2021, arXiv:2102.06171")
def agc(p: Tensor, g: Tensor, *, most: float = 0.01, eps: float = 1e-3) -> tuple[Tensor]:
    """g <- g*min(1, most*max(|p|, eps)/|g|), each row (the weights of an output unit) by its own norms.

    Args:
        p, g: parameter and gradient, (..., R, C); a vector is one unit.
        most: largest ratio of the norms; 0.01 at a batch of 4096, more at smaller ones.
        eps: least norm of a unit, so that units that start at 0 can move.

    Cost: no slot; one more pass for the norms.
    Departures: none; leave the last layer out, as the paper does, by a group without this stage.
    """
    weight, size = p.norm(dim=-1, keepdim=True), g.norm(dim=-1, keepdim=True)
    return (g * (most * weight.clamp(min=eps) / size.clamp(min=_TINY)).clamp(max=1.0),)


@stage(kind="gradient", still=False, paper="Neelakantan et al. 2015, arXiv:1511.06807")
def gradient_noise(
    p: Tensor, g: Tensor, *, t: Tensor, noise: Tensor, eta: float = 0.01, gamma: float = 0.55
) -> tuple[Tensor]:
    """g <- g + N(0, eta/(1 + s)^gamma), s = t - 1 being the updates done: noise that fades.

    Args:
        t: number of this update, from 1, 0-dim.
        noise: standard normal numbers, shaped like g.
        eta: variance at the first update; the paper tries 0.01, 0.3 and 1.
        gamma: how fast the variance falls.

    Cost: no slot; a draw for each element.
    Departures: none; as optax.add_noise. A gradient of zero moves too: that is what it is for.
    """
    return (g + (eta**0.5 * t ** (-gamma / 2)) * noise,)
