"""Weight decay in its forms: one stage each, for any rule."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.rules.registry import Slot, stage


@stage(kind="gradient", paper="L2 penalty")
def coupled(p: Tensor, g: Tensor, *, wd: Tensor) -> tuple[Tensor]:
    """g <- g + wd*p: the gradient of wd/2*|p|^2. An adaptive rule divides it by its root, so that its strength hardly acts."""
    return (g + wd * p,)


@stage(kind="decay", paper="Loshchilov and Hutter 2017, arXiv:1711.05101")
def decoupled(p: Tensor, g: Tensor, d: Tensor, *, lr: Tensor, wd: Tensor) -> tuple[Tensor]:
    """p <- p - lr*wd*p: the rate scales it, so that a schedule acts on both."""
    return (d - lr * wd * p,)


@stage(kind="decay", paper="Loshchilov and Hutter 2017, algorithm 2, arXiv:1711.05101")
def independent(p: Tensor, g: Tensor, d: Tensor, *, lr: Tensor, peak: Tensor, wd: Tensor) -> tuple[Tensor]:
    """p <- p - (lr/peak)*wd*p: the schedule scales it, the peak rate does not; wd is about lr times smaller."""
    return (d - lr / peak * wd * p,)


@stage(kind="decay", paper="Defazio 2025, arXiv:2506.02285")
def corrected(p: Tensor, g: Tensor, d: Tensor, *, lr: Tensor, peak: Tensor, wd: Tensor) -> tuple[Tensor]:
    """p <- p - lr*(lr/peak)*wd*p: keeps the gradient norm of layers before a normalization from rising as the rate falls."""
    return (d - lr * lr / peak * wd * p,)


@stage(kind="decay", name="cautious_decay", paper="Chen et al. 2025, arXiv:2510.12402")
def cautious_decay(p: Tensor, g: Tensor, d: Tensor, *, lr: Tensor, wd: Tensor) -> tuple[Tensor]:
    """p <- p - lr*wd*p where the update too moves p towards zero."""
    return (d - torch.where(d * p < 0, lr * wd * p, 0.0),)


@stage(
    kind="decay",
    name="initial_decay",
    slots=(Slot("initial", start="param", compressible=False),),
    paper="Li et al. 2018 (L2-SP), arXiv:1802.01483, decoupled",
)
def initial_decay(p: Tensor, g: Tensor, d: Tensor, initial: Tensor, *, lr: Tensor, wd: Tensor) -> tuple[Tensor, Tensor]:
    """p <- p - lr*wd*(p - initial): towards where the weights began, as for fine-tuning."""
    return d - lr * wd * (p - initial), initial.clone()


#: What ``decay_form`` may be, and the stage that does it.
DECAYS = {
    "coupled": "coupled",
    "decoupled": "decoupled",
    "independent": "independent",
    "corrected": "corrected",
    "cautious": "cautious_decay",
    "initial": "initial_decay",
}
