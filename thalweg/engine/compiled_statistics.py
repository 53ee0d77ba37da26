"""The running statistics of batch normalization in a graph: the same pooled moments, as tensors from beginning to end.

Eagerly the layers write into scratch memory that they are given, and how much each has seen is counted by the host. In a graph
they get fresh tensors for every pass, and what was seen is a tensor too: no number of the host's that moves is read while
tracing, so that nothing is traced twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from thalweg.regularize import PooledStatistics
from thalweg.regularize.moments import pooled
from thalweg.regularize.tracking import AnyBatchNorm


class Pass:
    """What the layers see in one forward pass, while it is traced.

    Attributes:
        moments: of each layer's last call: mean and unbiased variance, or None where it keeps its statistics.
        counts: values a channel of that call; 0: it has not been called.
        earlier: (count, sum, sum of squares) of its calls before that, or None.
    """

    def __init__(self, moments: Sequence[tuple[Tensor, Tensor] | None], exact: torch.dtype) -> None:
        self.moments, self.exact = list(moments), exact
        self.counts = [0] * len(self.moments)
        self.earlier: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(self.moments)

    def before(self, i: int, x: Tensor) -> None:
        """Layer ``i`` is about to normalise ``x``."""
        if self.moments[i] is None:
            return
        if self.counts[i]:
            self.earlier[i] = self.sums(i)
        self.counts[i] = x.numel() // x.shape[1]

    def sums(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """(count, sum, sum of squares) of all that layer ``i`` has seen, each (channels,)."""
        moments, count = self.moments[i], self.counts[i]
        assert moments is not None
        mean, var = moments[0].to(self.exact), moments[1].to(self.exact)
        if not count:  # it is not called: the zeros that it was given
            return mean, mean, mean
        found = (torch.full_like(mean, count), count * mean, (count - 1) * var + count * mean * mean)
        before = self.earlier[i]
        return found if before is None else (found[0] + before[0], found[1] + before[1], found[2] + before[2])


class GraphStatistics:
    """Stands for a run's ``PooledStatistics`` where its step is a graph.

    Args:
        real: whose flat tensors move.
        prefix: of the layers' names.
    """

    def __init__(self, real: PooledStatistics, prefix: str) -> None:
        self.real, self.prefix, self.layers = real, prefix, real.layers
        self.active: tuple[bool, ...] = ()
        if not real.layers:
            return
        self.width, device = real.width, real.device
        self.sums = torch.zeros(3 * real.width, dtype=real.exact, device=device)  # sums, of squares, counts
        widths = torch.tensor([span.stop - span.start for span in real.spans])
        self.layer_of = torch.repeat_interleave(torch.arange(len(widths)), widths).to(device)
        given = torch.tensor([1.0 if m is None else m for m in real.momentum], dtype=torch.float64)
        self.momentum = given.to(device, real.running.dtype)[self.layer_of]
        self.plain = torch.tensor([m is None for m in real.momentum], device=device)[self.layer_of]
        self.trains = torch.ones(len(widths), dtype=torch.bool, device=device)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """For the passes and the update of a step: layers in training mode give the moments of their batch alone."""
        active = tuple(layer.training for layer in self.layers)
        if active != self.active:
            self.active = active
            self.trains = torch.tensor(active, device=self.real.device)
        momenta = self.real.momentum
        for layer, trains in zip(self.layers, active):
            if trains:
                layer.__dict__["momentum"] = 1.0  # past nn.Module's slow setter
                if isinstance(layer, AnyBatchNorm):
                    layer.__dict__["own_moments"] = True
        try:
            yield
        finally:
            for layer, momentum in zip(self.layers, momenta):
                layer.__dict__["momentum"] = momentum
                layer.__dict__.pop("own_moments", None)

    # ------------------------------------------------------------------ while tracing

    def open(self) -> tuple[Pass, dict[str, Tensor]]:
        """A pass begins: (what it will have seen, the buffers that its layers write to by name)."""
        real, buffers = self.real, {}
        moments: list[tuple[Tensor, Tensor] | None] = []
        for i, span in enumerate(real.spans if self.layers else ()):
            name = f"{self.prefix}{real.names[i]}." if real.names[i] else self.prefix
            mean, var = real.running[: self.width][span], real.running[self.width :][span]
            if self.active[i]:
                mean, var = torch.zeros_like(mean), torch.zeros_like(var)
            moments.append((mean, var) if self.active[i] else None)
            buffers[f"{name}running_mean"], buffers[f"{name}running_var"] = mean, var
            buffers[f"{name}num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=real.device)
        seen = Pass(moments, real.exact if self.layers else torch.float64)
        real.seen = seen if self.layers else None
        return seen, buffers

    def close(self, seen: Pass) -> Tensor | None:
        """The pass is over: what it saw, as sums; None where the model has no such layers."""
        if not self.layers:
            return None
        self.real.seen = None
        parts = []
        for i, span in enumerate(self.real.spans):
            if seen.moments[i] is None:
                nothing = torch.zeros(span.stop - span.start, dtype=seen.exact, device=self.real.device)
                parts.append((nothing, nothing, nothing))
            else:
                parts.append(seen.sums(i))
        return torch.cat([p[1] for p in parts] + [p[2] for p in parts] + [p[0] for p in parts])

    def moved(self, sums: Tensor, ok: Tensor) -> None:
        """Running statistics move by what the step has seen, where ``ok`` (0-dim bool)."""
        real, width = self.real, self.width
        count = sums[2 * width :]
        now = torch.cat(pooled(count, sums[:width], sums[width : 2 * width])).to(real.running.dtype)
        turn = (real.tracked[self.layer_of] + 1).to(self.momentum.dtype)
        share = torch.where(self.plain, self.momentum / turn, self.momentum) * (count > 0)
        moved = torch.lerp(real.running, now, share.repeat(2))
        real.running.copy_(torch.where(ok, moved, real.running))
        real.tracked.add_(self.trains & ok)

    def averaged(self, averages: Sequence[Tensor], share: Tensor | None, ok: Tensor) -> None:
        """As ``State.average_statistics``."""
        if share is not None:
            live = (self.real.running[: self.width], self.real.running[self.width :])
            for average, now in zip(averages, live):
                average.lerp_(now.to(average.dtype), (share * ok).to(average.dtype))

    # ------------------------------------------------------------------ as ``Undo`` and ranks ask

    def clear(self) -> None:
        """Nothing has been seen in this step."""
        if self.layers:
            self.sums.zero_()

    begin = clear

    def restore(self) -> None:
        """Layers hold their own buffers all the time."""

    def undo(self) -> bool:
        """A pass that broke off has left nothing but, perhaps, in the sums; whoever was in a graph starts over."""
        return True

    def collected(self) -> Tensor | None:
        return self.sums.clone() if self.layers else None

    def put_back(self, collected: Tensor | None) -> None:
        if collected is not None:
            self.sums.copy_(collected)
