"""Batch normalization over all ranks, on any backend of torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from thalweg.device import Device
from thalweg.regularize.moments import moments_of, num_ranks
from thalweg.regularize.tracking import AnyBatchNorm


class SyncedBatchNorm(AnyBatchNorm):
    """Batch normalization by the mean and variance of the values of all ranks, each rank counted by how many it has.

    Outputs are those of one process with the whole batch. Gradients are those of the *sum* of the ranks' losses: each rank
    has the gradient of its own inputs, and its share of the gain's and bias's gradients, for the training loop to add up.
    Ranks may have batches of different sizes, or none. On one rank, and in evaluation, it is torch's layer.

    Args:
        num_features: channels.
        group: process group; None: the default one.
        options: as for torch's BatchNorm2d: eps, momentum, affine, track_running_stats, device, dtype.

    Cost: one gathering of 2*channels + 1 numbers forward, one sum of 2*channels numbers backward. All ranks must run the
    same layers in the same order.

    Departures: torch's SyncBatchNorm trains on accelerators alone. No second derivatives, as there.
    """

    group: Any = None

    def __init__(self, num_features: int, *, group: Any = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if num_ranks(self.group) == 1:
            y, mean, var = self._normalise(x)
        else:
            run: Any = _Synced.apply
            y, mean, var = run(x, self.weight, self.bias, self.eps, self.group, self.own_moments)
        if self._tracks():
            self._track(mean, var)
        return y


class _Synced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any, own: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised batch; the mean and unbiased variance of all ranks' values, or of this rank's (``own``)."""
        num, own_mean, own_var = moments_of(x, Device(x.device).exact)
        count, mean, var = _of_all_ranks(num, own_mean, own_var, group)
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = (var + eps).rsqrt().to(wide)
        y = (x.to(wide) - _wide(mean.to(wide), x)) * _wide(scale, x)
        if weight is not None:
            y = y * _wide(weight.to(wide), x)
        if bias is not None:
            y = y + _wide(bias.to(wide), x)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.group, ctx.bias_dtype = group, None if bias is None else bias.dtype
        unbiased = own_var * (num / max(num - 1, 1)) if own else var * (count / (count - 1).clamp(min=1))
        told = (own_mean if own else mean), unbiased
        ctx.mark_non_differentiable(*told)
        return y.to(x.dtype), *told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        wide, over = scale.dtype, [0, *range(2, x.dim())]
        dy = dy.to(wide)
        normal = (x.to(wide) - _wide(mean.to(wide), x)) * _wide(scale, x)
        own = torch.stack([dy.sum(over), (dy * normal).sum(over)])
        dx = None
        if ctx.needs_input_grad[0]:
            sums = own.to(count.dtype, copy=True)
            dist.all_reduce(sums, group=ctx.group)
            shift, slope = (sums / count.clamp(min=1)).to(wide)
            gain = scale if weight is None else scale * weight.to(wide)
            dx = (_wide(gain, x) * (dy - _wide(shift, x) - normal * _wide(slope, x))).to(x.dtype)
        dweight = own[1].to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = own[0].to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None


def _of_all_ranks(num: int, mean: Tensor, var: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values a channel on all ranks, (1,), their mean and their variance divided by that number, (channels,)."""
    channels = mean.shape[0]
    mine = torch.cat([mean, var, mean.new_full((1,), num)])
    told = [torch.empty_like(mine) for _ in range(num_ranks(group))]
    dist.all_gather(told, mine, group=group)
    means, variances, counts = torch.stack(told).split([channels, channels, 1], dim=1)
    count = counts.sum(0)
    parts = counts / count.clamp(min=1)
    pooled = (parts * means).sum(0)
    return count, pooled, (parts * (variances + (means - pooled).square())).sum(0)


def _wide(vector: Tensor, like: Tensor) -> Tensor:
    """One number a channel, to be broadcast over a batch."""
    return vector.view(1, -1, *[1] * (like.dim() - 2))
