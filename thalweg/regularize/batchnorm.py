"""Batch normalization whose running statistics do not depend on the number of micro-batches.

Torch updates the running statistics at every forward pass: four micro-batches make a momentum of 0.1 act like 0.344. Here
each forward pass still normalises with its own batch, but the running statistics move once a step, with the pooled mean and
variance of all that the step has seen; and a skipped step does not move them at all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class PooledStatistics:
    """Takes over the running statistics of every batch-normalization layer of a model.

    Between ``begin`` and ``end`` the layers write the statistics of single batches into a scratch buffer; ``collect`` adds
    them up after each micro-batch. All layers lie in flat tensors of one number a channel, so the cost does not grow
    with the number of layers.

    Args:
        model: its layers' buffers become views of the flat tensors.
        exact: dtype of the sums; float64 where the device has it, because sums of squares cancel.
    """

    def __init__(self, model: nn.Module, exact: torch.dtype) -> None:
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        layers = [module for _, module in named]
        self.layers: list[Any] = layers
        self.names = [name for name, _ in named]
        self.momentum = [layer.momentum for layer in layers]
        if not layers:
            return
        bounds = [0]
        for layer in layers:
            bounds.append(bounds[-1] + layer.num_features)
        self.spans = [slice(a, b) for a, b in zip(bounds, bounds[1:])]
        self.device, self.exact, size = layers[0].running_mean.device, exact, bounds[-1]
        empty = lambda dtype, n=size: torch.zeros(n, dtype=dtype, device=self.device)
        dtype = layers[0].running_mean.dtype
        self.mean, self.var, self.tracked = empty(dtype), empty(dtype), empty(torch.int64, len(layers))
        self._batch_mean, self._batch_var = empty(dtype), empty(dtype)
        self._batch_tracked = empty(torch.int64, len(layers))
        self._sum, self._sum_squares = empty(exact), empty(exact)
        self._pending: list[int] = [0] * len(layers)  # values a channel of the batch that lies in scratch
        self._counts: list[int] = [0] * len(layers)  # values a channel seen in this step
        self._real: list[dict[str, Tensor]] = []
        self._scratch: list[dict[str, Tensor]] = []
        self._active: list[int] = []
        self._passes = 0
        for i, layer in enumerate(layers):
            span = self.spans[i]
            real = {"running_mean": self.mean[span], "running_var": self.var[span], "num_batches_tracked": self.tracked[i]}
            for name, view in real.items():
                view.copy_(layer._buffers[name])
            scratch = (self._batch_mean[span], self._batch_var[span], self._batch_tracked[i])
            self._real.append(real)
            self._scratch.append(dict(zip(real, scratch)))
            layer._buffers.update(real)
            layer.register_forward_pre_hook(self._before(i))
            layer.register_forward_hook(self._after(i))
        self.fill = lru_cache(maxsize=64)(self._fill)

    def buffers(self) -> list[Tensor]:
        """The float statistics, flat; a weight average averages these too."""
        return [self.mean, self.var] if self.layers else []

    def views(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Flat statistics by the names that the model's buffers have."""
        named = {}
        for name, span in zip(self.names, self.spans):
            prefix = f"{name}." if name else ""
            named |= {f"{prefix}running_mean": mean[span], f"{prefix}running_var": var[span]}
        return named

    def begin(self) -> None:
        """A step begins: layers in training mode write to scratch, at momentum 1."""
        self._active = [i for i, layer in enumerate(self.layers) if layer.training]
        for i in self._active:
            self.layers[i]._buffers.update(self._scratch[i])
            self.layers[i].momentum = 1.0
            self._counts[i] = 0
        self._passes = 0

    def collect(self, *, last: bool) -> None:
        """A micro-batch is done. One that is alone in its step needs no sums: its statistics are the pooled ones."""
        if not any(self._pending) or (last and not self._passes):
            return
        self._open_sums()
        self._add(slice(None), self.fill(tuple(self._pending)))
        self._settle(range(len(self.layers)))

    def end(self, ok: Tensor) -> None:
        """The step is over: running statistics move where ``ok`` (0-dim bool); the layers get them back."""
        if not self._active:
            return
        if self._passes:
            total = self.fill(tuple(self._counts))
            mean = self._sum / total.clamp(min=1)
            var = (self._sum_squares - total * mean * mean) / (total - 1).clamp(min=1)
        else:
            total, mean, var = self.fill(tuple(self._pending)), self._batch_mean, self._batch_var
            self._settle(range(len(self.layers)))
        share = self._shares() * (total > 0)
        for running, pooled in ((self.mean, mean), (self.var, var)):
            moved = torch.lerp(running.to(share.dtype), pooled.to(share.dtype), share)
            running.copy_(torch.where(ok & (share > 0), moved, running))
        for i in self._active:
            self._real[i]["num_batches_tracked"].add_(ok)
        self.restore()

    def restore(self) -> None:
        """Give the layers their running statistics back, as after a step that broke off."""
        for i in self._active:
            self.layers[i]._buffers.update(self._real[i])
            self.layers[i].momentum = self.momentum[i]
        self._settle(range(len(self.layers)), count=False)
        self._active = []

    def _shares(self) -> Tensor:
        """Momentum a channel; a layer without one keeps the plain mean over all steps."""
        shares = self.fill(tuple(m if m is not None else 0.0 for m in self.momentum))
        for i, momentum in enumerate(self.momentum):
            if momentum is None:
                shares = shares.clone()
                shares[self.spans[i]] = 1.0 / (self.tracked[i] + 1)
        return shares

    def _fill(self, values: tuple[float, ...]) -> Tensor:
        """One value a layer, as one value a channel. Cached: copying from the host would wait for the device."""
        widths = [span.stop - span.start for span in self.spans]
        return torch.repeat_interleave(
            torch.tensor(values, dtype=self.exact), torch.tensor(widths)
        ).to(self.device)

    def _open_sums(self) -> None:
        if not self._passes:
            self._sum.zero_()
            self._sum_squares.zero_()
        self._passes += 1

    def _add(self, span: slice, count: Tensor) -> None:
        mean, var = self._batch_mean[span].to(self.exact), self._batch_var[span].to(self.exact)
        seen = count > 0
        mean, var = torch.where(seen, mean, 0), torch.where(seen, var, 0)
        self._sum[span] += count * mean
        self._sum_squares[span] += (count - 1) * var + count * mean * mean

    def _settle(self, which: Any, *, count: bool = True) -> None:
        for i in which:
            if count:
                self._counts[i] += self._pending[i]
            self._pending[i] = 0

    def _before(self, i: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._pending[i]:  # a layer used twice in one forward pass: its first batch is still in scratch
                span = self.spans[i]
                self._open_sums()
                self._add(span, self.fill(tuple(self._pending))[span])
                self._settle((i,))

        return hook

    def _after(self, i: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training and self._active:
                self._pending[i] = inputs[0].numel() // inputs[0].shape[1]

        return hook
