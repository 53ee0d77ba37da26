"""Batch normalization whose running statistics do not depend on the number of micro-batches.

Torch updates the running statistics at every forward pass: four micro-batches make a momentum of 0.1 act like 0.344. Here
each forward pass still normalises with its own batch, but the running statistics move once a step, with the pooled mean and
variance of all that the step has seen, on all ranks; the forward passes that activation checkpointing runs again count once;
and a skipped step does not move them at all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import ModelError
from thalweg.regularize.moments import num_ranks, pooled, recomputing
from thalweg.regularize.tracking import AnyBatchNorm


class PooledStatistics:
    """Takes over the running statistics of every batch-normalization layer of a model.

    Between ``begin`` and ``end`` the layers write the statistics of single batches into a scratch buffer; ``collect`` adds
    them up after each micro-batch. All layers lie in flat tensors of one number a channel, so the cost does not grow
    with the number of layers.

    Args:
        model: its layers' buffers become views of the flat tensors.
        exact: dtype of the sums; float64 where the device has it, because sums of squares cancel.
        group: the process group whose ranks train together; None: torch.distributed's default one, where there is one.

    Cost: two additions of one number a channel each micro-batch; with more than one rank, one sum over ranks of three
    numbers a channel each step.
    """

    def __init__(self, model: nn.Module, exact: torch.dtype, group: Any = None) -> None:
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        layers: list[Any] = [module for _, module in named]
        self.layers = layers
        self.names = [name for name, _ in named]
        self.momentum = [layer.momentum for layer in layers]
        self._active: list[int] = []  # layers whose buffers are scratch just now
        self._pending: list[int] = [0] * len(layers)  # values a channel of the batch that lies in scratch
        self._counts: list[int] = [0] * len(layers)  # values a channel seen in this step
        self._passes = 0  # batches in the sums
        self._early = False  # whether this forward pass has put something into the sums already
        self._summed = False  # whether the sums are those of all ranks already
        self._paused = self._again = (
            False  # whether passes are not counted in the rest of this step, or until ``collect``
        )
        self.group = group
        self.seen: Any = None  # who is told of calls instead, while a whole step is traced
        self._aside: set[int] = set()  # layers that write there just now
        if not layers:
            return
        bounds = [0]
        for layer in layers:
            bounds.append(bounds[-1] + layer.num_features)
        self.spans = [slice(a, b) for a, b in zip(bounds, bounds[1:])]
        first = self.layers[0].running_mean
        self.device, dtype, self.exact, size = first.device, first.dtype, exact, bounds[-1]

        def empty(dtype: torch.dtype, num: int = size) -> Tensor:
            return torch.zeros(num, dtype=dtype, device=self.device)

        self.width = size
        self.running, self._batch = empty(dtype, 2 * size), empty(dtype, 2 * size)  # means, then variances
        self.mean, self.var = self.running[:size], self.running[size:]
        self._batch_mean, self._batch_var = self._batch[:size], self._batch[size:]
        self.tracked, self._batch_tracked = empty(torch.int64, len(layers)), empty(torch.int64, len(layers))
        self._sums = empty(exact, 3 * size + 1)  # what ranks add up: sums, of squares, counts, ranks that skip
        self._sum, self._sum_squares = self._sums[:size], self._sums[size : 2 * size]
        aside = empty(dtype, 2 * size), empty(torch.int64, len(layers))
        self._real: list[dict[str, Tensor]] = []
        self._scratch: list[dict[str, Tensor]] = []
        self._unread: list[dict[str, Tensor]] = []  # where passes write that are not counted
        self._masks: dict[tuple[int, ...], Tensor] = {}
        for i, layer in enumerate(layers):
            span = self.spans[i]
            real = {
                "running_mean": self.mean[span],
                "running_var": self.var[span],
                "num_batches_tracked": self.tracked[i],
            }
            for name, view in real.items():
                view.copy_(layer.get_buffer(name))
            scratch = (self._batch_mean[span], self._batch_var[span], self._batch_tracked[i])
            unread = (aside[0][:size][span], aside[0][size:][span], aside[1][i])
            self._real.append(real)
            self._scratch.append(dict(zip(real, scratch)))
            self._unread.append(dict(zip(real, unread)))
            layer._buffers.update(real)
            layer.register_forward_pre_hook(self._before(i), with_kwargs=True)
        self.fill = lru_cache(maxsize=64)(self._fill)
        self.shares = lru_cache(maxsize=64)(self._shares)

    def buffers(self) -> list[Tensor]:
        """The float statistics, flat; a weight average averages these too."""
        return [self.mean, self.var] if self.layers else []

    def views(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Flat statistics by the names that the model's buffers have."""
        found: dict[str, Tensor] = {}
        for name, span in zip(self.names, self.spans):
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}running_mean": mean[span], f"{prefix}running_var": var[span]}
        return found

    def begin(self) -> None:
        """A step begins: layers in training mode write to scratch, at momentum 1.

        Raises:
            ModelError: for torch's SyncBatchNorm on more than one rank, which would be pooled over ranks twice.
        """
        if not self.layers:
            return
        if num_ranks(self.group) > 1:
            self._refuse_torchs_sync()
        self._active = [i for i, layer in enumerate(self.layers) if layer.training]
        self._batch.zero_()  # torch keeps 0 times what stood there: a NaN would stay
        for i in self._active:
            self.layers[i]._buffers.update(self._scratch[i])
            self.layers[i].__dict__["momentum"] = 1.0  # past nn.Module's slow setter: this runs every step
            if isinstance(self.layers[i], AnyBatchNorm):
                self.layers[i].__dict__["own_moments"] = True
        self._counts = [0] * len(self.layers)
        self._passes = 0
        self._paused = self._again = self._early = self._summed = False

    def pause(self) -> None:
        """Further forward passes of this step are not counted: they go over the same samples again."""
        self._flush()
        self._paused = self._again = True

    def forward_done(self) -> None:
        """The forward pass of a micro-batch is over: until ``collect``, the same samples may come again, but no others.

        Recomputation is found without this in eager mode. Where torch.compile has traced the layers, only this tells it.
        """
        self._again = True

    def collect(self, *, last: bool) -> None:
        """A micro-batch is done. One that is alone in its step needs no sums: its statistics are the pooled ones."""
        self._again, self._early = self._paused, False
        if self._passes or not last:
            self._flush()

    def undo(self) -> bool:
        """Forget the forward pass that broke off or that is to be run again; what was collected before it stays.

        Returns:
            Whether that was possible: not where a layer was used twice in the pass, for its first batch is in the sums.
        """
        if self._active:
            self._pending = [0] * len(self.layers)
            self._batch.zero_()  # it may hold half of what an operator writes
        self._again, possible = self._paused, not self._early
        self._early = False
        return possible

    def collected(self) -> tuple[Tensor, list[int], int] | None:
        """A copy of what was collected so far in this step, for ``put_back``; None where nothing is."""
        return (self._sums.clone(), list(self._counts), self._passes) if self._active else None

    def put_back(self, collected: tuple[Tensor, list[int], int] | None) -> None:
        """What was collected is again what it was; the pass since then is forgotten."""
        if collected is not None:
            self._sums.copy_(collected[0])
            self._counts, self._passes = list(collected[1]), collected[2]
        self.undo()

    def gathered(self) -> Tensor:
        """All that this rank has seen in the step, as sums; empty where no layer trains.

        Who adds the ranks' up writes the sums of all of them back, and says so with ``summed``; ``end`` then asks no other rank.
        """
        if not self._active:
            return torch.empty(0)
        self._flush()
        if not self._passes:
            self._open_sums()  # this rank saw nothing
        self._sums[2 * self.width : -1] = self.fill(tuple(self._counts))
        self._sums[-1] = 0
        return self._sums

    def summed(self, sums: Tensor) -> None:
        """What ``gathered`` gave, added up over the ranks."""
        if self._active:
            self._sums.copy_(sums)
            self._summed = True

    def end(self, ok: Tensor) -> None:
        """The step is over: running statistics move where ``ok`` (0-dim bool); the layers get them back."""
        if not self._active:
            return
        if self._summed or num_ranks(self.group) > 1:
            now, share, ok = self._over_ranks(ok)
        elif self._passes:
            now = torch.cat(pooled(self.fill(tuple(self._counts)), self._sum, self._sum_squares))
            share = self.shares(tuple(count > 0 for count in self._counts))
        else:
            self._settle()
            now, share = self._batch, self.shares(tuple(count > 0 for count in self._counts))
        if None in self.momentum:
            share = self._plain_means(share)
        # Layers that saw nothing have share 0 and finite zeros in ``now``: lerp leaves them as they are, to the bit.
        now = now.to(self.running.dtype)
        torch.where(ok, torch.lerp(self.running, now, share), self.running, out=self.running)
        self.tracked.add_(ok if len(self._active) == len(self.layers) else self._active_layers() & ok)
        self.restore()

    def restore(self) -> None:
        """Give the layers their running statistics back, as after a step that broke off."""
        for i in self._active:
            self.layers[i]._buffers.update(self._real[i])
            self.layers[i].__dict__["momentum"] = self.momentum[i]
            self.layers[i].__dict__.pop("own_moments", None)
        self._pending = [0] * len(self.layers)
        self._active = []
        self._aside.clear()

    def _over_ranks(self, ok: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of all ranks, the share of each, and whether no rank skips: one sum over ranks."""
        if not self._summed:
            self.gathered()[-1] = ~ok
            dist.all_reduce(self._sums, group=self.group)
        count = self._sums[2 * self.width : -1]
        seen = (count > 0).repeat(2)
        share = self.shares((True,) * len(self.layers)) * seen
        return torch.cat(pooled(count, self._sum, self._sum_squares)), share, ok & (self._sums[-1] == 0)

    def _refuse_torchs_sync(self) -> None:
        if names := [n for n, layer in zip(self.names, self.layers) if isinstance(layer, nn.SyncBatchNorm)]:
            raise ModelError(
                "The running statistics of torch's SyncBatchNorm cannot be pooled over ranks.",
                f"{len(names)} layers, such as '{names[0]}', hold those of all ranks already.",
                'Call convert_batchnorm(model, to="synced").',
            )

    def _active_layers(self) -> Tensor:
        """Which layers train, as booleans on the device."""
        key = tuple(self._active)
        if key not in self._masks:
            mask = [i in key for i in range(len(self.layers))]
            self._masks[key] = torch.tensor(mask, device=self.device)
        return self._masks[key]

    def _shares(self, seen: tuple[bool, ...]) -> Tensor:
        """Momentum of each mean and variance; 0 for layers that saw nothing in this step."""
        shares = [(m if m is not None else 1.0) * s for m, s in zip(self.momentum, seen)]
        return self.fill(tuple(shares)).to(self.running.dtype).repeat(2)

    def _plain_means(self, share: Tensor) -> Tensor:
        """A layer without momentum keeps the plain mean over all steps."""
        share = share.clone()
        for i, momentum in enumerate(self.momentum):
            if momentum is None:
                for half in share.view(2, -1):
                    half[self.spans[i]] /= self.tracked[i] + 1
        return share

    def _fill(self, values: tuple[float, ...]) -> Tensor:
        """One value a layer, as one value a channel. Cached: copying from the host would wait for the device."""
        widths = [span.stop - span.start for span in self.spans]
        return torch.repeat_interleave(torch.tensor(values, dtype=self.exact), torch.tensor(widths)).to(self.device)

    def _flush(self) -> None:
        """What lies in scratch goes into the sums."""
        if any(self._pending):
            self._open_sums()
            self._add(slice(None), self.fill(tuple(self._pending)))
            self._settle()

    def _open_sums(self) -> None:
        if not self._passes:
            self._sums.zero_()
        self._passes += 1

    def _add(self, span: slice, count: Tensor) -> None:
        mean, var = self._batch_mean[span].to(self.exact), self._batch_var[span].to(self.exact)
        seen = count > 0
        mean, var = torch.where(seen, mean, 0), torch.where(seen, var, 0)
        self._sum[span] += count * mean
        self._sum_squares[span] += (count - 1) * var + count * mean * mean

    def _settle(self) -> None:
        self._counts = [count + more for count, more in zip(self._counts, self._pending)]
        self._pending = [0] * len(self.layers)

    def _before(self, i: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            if self.seen is not None:
                self.seen.before(i, inputs[0] if inputs else named["input"])
                return
            if not self._active or not module.training:
                return
            if self._again or recomputing():  # the same samples again
                if i not in self._aside:
                    self._aside.add(i)
                    module._buffers.update(self._unread[i])
                return
            if i in self._aside:
                self._aside.discard(i)
                module._buffers.update(self._scratch[i])
            if self._pending[i]:  # a layer used twice in one forward pass: its first batch is still in scratch
                span = self.spans[i]
                self._open_sums()
                self._early = True
                self._add(span, self.fill(tuple(self._pending))[span])
                self._counts[i] += self._pending[i]
            x = inputs[0] if inputs else named["input"]
            self._pending[i] = x.numel() // x.shape[1]

        return hook
