"""The scale of the loss: what keeps gradients in float16's range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.device import Device

#: The scale stays within these: far beyond what training needs, and no power of two between them is inexact.
LEAST, MOST = 2.0**-24, 2.0**60


@dataclass
class LossScale:
    """Dynamic loss scaling on the device, after Micikevicius et al. 2017, arXiv:1710.03740.

    The scale is halved when a gradient is not finite and doubled after ``interval`` finite steps in a row; powers of two, so
    scaling itself never rounds. Both tensors belong to the saved state.

    It never falls below 2**-24, nor grows beyond 2**60: a gradient that is not finite at the least scale is not finite by
    itself, and every such step says so in its record (``skipped``).
    """

    scale: Tensor
    streak: Tensor
    interval: int = 2000

    @classmethod
    def start(cls, device: Device, *, scale: float = 2.0**16) -> LossScale:
        return cls(
            torch.full((), scale, device=device.torch_device),
            torch.zeros((), dtype=torch.int32, device=device.torch_device),
        )

    def update(self, skipped: Tensor, still: Tensor | None = None) -> None:
        """Move the scale after a step.

        Args:
            skipped: 1.0 or 0.0, 0-dim.
            still: 0-dim bool: where true the step says nothing about the scale, which stays.
        """
        before = None if still is None else (self.scale.clone(), self.streak.clone())
        torch._amp_update_scale_(self.scale, self.streak, skipped, 2.0, 0.5, self.interval)
        self.scale.clamp_(LEAST, MOST)
        if still is not None and before is not None:
            torch.where(still, before[0], self.scale, out=self.scale)
            torch.where(still, before[1], self.streak, out=self.streak)
