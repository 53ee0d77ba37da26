"""Weight averages that are not one pass of the update: the mean of the last few weights. And the shares of those that are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WindowAverage:
    """The plain mean of the last ``num`` weights, taken every ``every`` steps from step ``start`` on.

    LAWA: Kaddour 2022, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging",
    arXiv:2209.14981. When it is time goes by steps attempted, which the host knows; a skipped step puts nothing into the window.

    Args:
        tensors: what is averaged, such as flat parameters; each keeps its shape.
        num: weights in the window, 1 or more.
        start, every: the first step after which weights are kept, and the steps between two of them; 1 or more.

    Attributes:
        count: weights kept so far, (1,), on the device; the window holds the last ``num`` of them.
        rings: for each tensor (num, *shape), in its dtype.

    Cost: ``num`` copies of the weights.
    """

    def __init__(self, tensors: Sequence[Tensor], num: int, start: int, every: int) -> None:
        self.tensors, self.num, self.start, self.every = list(tensors), num, start, every
        self.count = torch.zeros(1, dtype=torch.int64, device=self.tensors[0].device)
        self.rings = [torch.zeros((num, *t.shape), dtype=t.dtype, device=t.device) for t in self.tensors]

    def keep(self, step: int, ok: Tensor) -> None:
        """Take the weights as they are after step ``step`` (from 1), if it is time and the step was applied (``ok``, 0-dim)."""
        if step >= self.start and (step - self.start) % self.every == 0:
            with torch.no_grad():
                place = self.count % self.num
                for ring, tensor in zip(self.rings, self.tensors):
                    ring.index_copy_(0, place, torch.where(ok, tensor, ring.index_select(0, place)[0]).unsqueeze(0))
                self.count.add_(ok)

    def means(self) -> list[Tensor]:
        """The average of each tensor, in at least float32; empty before the first."""
        num = min(self.num, int(self.count))
        if not num:
            return []
        return [ring[:num].mean(0, dtype=torch.promote_types(ring.dtype, torch.float32)) for ring in self.rings]


def swa_shares(steps: int, start: int, every: int) -> list[float]:
    """How far the average moves towards the weights at each update, so that it is the plain mean of those that count.

    Stochastic weight averaging: Izmailov et al. 2018, arXiv:1803.05407. Until the first of them it is the weights themselves.

    Args:
        steps: updates of the run.
        start, every: the first update (from 1) whose weights count, and the updates between two of them; 1 or more.

    >>> swa_shares(6, 3, 2)
    [1.0, 1.0, 1.0, 0.0, 0.5, 0.0]
    """
    shares = []
    for update in range(1, steps + 1):
        number, rest = divmod(update - start, every)
        shares.append(1.0 if update < start else 0.0 if rest else 1.0 / (number + 1))
    return shares
