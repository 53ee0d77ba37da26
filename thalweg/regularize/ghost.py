"""Ghost batches: batch normalization in groups of a fixed number of samples, whatever the micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thalweg.core import DataError, ModelError
from thalweg.regularize.tracking import AnyBatchNorm


class GhostBatchNorm(AnyBatchNorm):
    """Batch normalization that normalises each ``size`` samples by themselves.

    Splits of a step into micro-batches that are multiples of ``size`` give the same outputs and gradients. The running
    statistics are those of the whole micro-batch: the groups' means and variances, pooled.

    Args:
        num_features: channels.
        size: samples that are normalised together, at least 1. The last group of a micro-batch holds the rest; a rest of
            one value a channel joins the group before.
        options: as for torch's BatchNorm2d: eps, momentum, affine, track_running_stats, device, dtype.

    Raises:
        ModelError: for a size that is not a whole number above 0.
        DataError: from the forward pass, when a group would hold one value a channel.

    Cost: one kernel call a group; where a micro-batch is one group, that of torch's layer.

    References: Hoffer et al. 2017, "Train longer, generalize better", arXiv:1705.08741. The paper moves the running
    statistics once a ghost batch; here the pooled ones move once.

    >>> layer = GhostBatchNorm(3, size=4)
    >>> x = torch.randn(8, 3)
    >>> torch.equal(layer(x)[:4], layer(x[:4]))
    True
    """

    size: int

    def __init__(self, num_features: int, size: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.size = check_size(size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        sizes = self._sizes(x)
        parts = [self._normalise(part) for part in x.split(sizes)]
        if len(parts) == 1:
            y, mean, var = parts[0]
        else:
            y = torch.cat([part[0] for part in parts])
            mean = var = None
            if self._tracks():
                values = x[0].numel() // x.shape[1]
                mean, var = _pool([part[1:] for part in parts], sizes[0] * values, sizes[-1] * values)
        self._track(mean, var)
        return y

    def _sizes(self, x: Tensor) -> list[int]:
        """Samples of each group; all but the last are equal."""
        full, rest = divmod(x.shape[0], self.size)
        sizes = [self.size] * full + [rest] * (rest > 0)
        values = x[0].numel() // x.shape[1] if len(x) else 0
        if len(sizes) > 1 and sizes[-1] * values == 1:
            sizes[-2:] = [sizes[-2] + 1]
        if sizes and sizes[0] * values < 2:
            raise DataError(
                "Batch normalization was given one value a channel to normalise.",
                f"Shape {tuple(x.shape)}, in ghost batches of {self.size}.",
                "Use ghost batches and micro-batches of 2 or more samples.",
            )
        return sizes or [0]

    def extra_repr(self) -> str:
        told: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{told}, size={self.size}"


def check_size(size: Any) -> int:
    """``size``, if it can be that of a ghost batch."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ModelError(
            f"size={size!r} is no size of a ghost batch.",
            "It counts the samples that are normalised together.",
            "Give a whole number from 1 on, such as 32.",
        )
    return size


def _pool(groups: list[Any], num: int, num_last: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all groups together, of ``num`` values each and ``num_last`` in the last."""
    means, variances = torch.stack([mean for mean, _ in groups]), torch.stack([var for _, var in groups])
    whole = num * (len(groups) - 1) + num_last
    mean = (num * means[:-1].sum(0) + num_last * means[-1]) / whole
    off = (means - mean).square()
    inside = (num - 1) * variances[:-1].sum(0) + (num_last - 1) * variances[-1]
    between = num * off[:-1].sum(0) + num_last * off[-1]
    return mean, (inside + between) / (whole - 1)
