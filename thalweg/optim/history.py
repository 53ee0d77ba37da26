"""Clipping by history: a gradient norm far above those of late is an outlier, whatever its size."""

from __future__ import annotations

import torch
from torch import Tensor

_WARM = 25  # norms that are seen before any is clipped
_KEEP = 0.97  # decay of the running mean and variance


class NormHistory:
    """ZClip (Kumar et al. 2025, arXiv:2504.02507): running mean and variance of the norm, and a limit in deviations.

    With z = (norm - mean)/deviation, a norm with z above ``most`` becomes mean + (most^2/z)*deviation: the further out, the
    less is left of it. The history takes in what was left. The first 25 norms are only counted.

    Args:
        most: deviations above the mean that pass, above 0; the paper's is 2.5.

    >>> history = NormHistory(2.5, torch.device("cpu"))
    >>> for k in range(30):
    ...     _ = history.limited(torch.tensor(1.0 + 0.1 * (k % 2)), torch.tensor(True))
    >>> round(float(history.limited(torch.tensor(100.0), torch.tensor(True))), 2)
    1.05
    """

    def __init__(self, most: float, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self.most = most
        self.values = torch.zeros(3, dtype=dtype, device=device)  # norms seen, their mean, their variance

    def limited(self, norm: Tensor, ok: Tensor) -> Tensor:
        """The norm that is left of ``norm``, 0-dim; where ``ok`` (0-dim bool) the history takes it in."""
        count, mean, var = self.values
        seen = norm.to(self.values.dtype)
        deviation = var.sqrt().clamp(min=torch.finfo(var.dtype).tiny)
        z = (seen - mean) / deviation
        outlier = (count >= _WARM) & (z > self.most)
        left = torch.where(outlier, mean + self.most**2 / z.clamp(min=self.most) * deviation, seen)
        warm = count < _WARM
        share = torch.where(warm, 1 / (count + 1), 1 - _KEEP)
        new_mean = mean + share * (left - mean)
        spread = torch.where(warm, (left - mean) * (left - new_mean), (left - new_mean).square())
        new = torch.stack([count + 1, new_mean, var + share * (spread - var)])
        self.values.copy_(torch.where(ok, new, self.values))
        return left.to(norm.dtype)


def excess(norm: Tensor, clip: float | Tensor, history: NormHistory | None = None, ok: Tensor | None = None) -> Tensor:
    """How many times too long a gradient is, 0-dim: 1 where it is short enough, and where its norm is NaN.

    Args:
        norm: of the gradient, 0-dim.
        clip: the largest norm; 0: any.
        history: sets a limit of its own, and takes the norm in.
        ok: 0-dim bool, whether it may; None: where the norm is finite.
    """
    most = clip.to(norm.dtype) if isinstance(clip, Tensor) else torch.full_like(norm, clip or torch.inf)
    if history is not None:
        most = torch.minimum(most, history.limited(norm, torch.isfinite(norm) if ok is None else ok))
    return torch.where(most < norm, norm / most, 1.0)
