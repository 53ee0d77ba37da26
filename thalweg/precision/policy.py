"""Precision policies: which dtype autocast computes in, and whether the loss is scaled."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.core import DeviceError
from thalweg.device import Device


@dataclass(frozen=True)
class Policy:
    """How the forward pass computes. Parameters, gradients, slots and averages stay in the parameters' own dtype.

    Attributes:
        name: "fp32", "bf16" or "fp16".
        autocast: the dtype of matrix products and convolutions, or None.
        scaled: whether the loss is scaled, dynamically, because gradients would underflow.
    """

    name: str
    autocast: torch.dtype | None
    scaled: bool

    def context(self, device: Device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.kind, dtype=self.autocast)


POLICIES = {
    "fp32": Policy("fp32", None, False),
    "bf16": Policy("bf16", torch.bfloat16, False),
    "fp16": Policy("fp16", torch.float16, True),
}


def policy_for(name: str, device: Device) -> Policy:
    """The policy called ``name``, if ``device`` has it."""
    if name != "fp32" and name not in device.autocasts:
        raise DeviceError(
            f"precision={name!r} is not possible on {device.torch_device}.",
            f"It has {', '.join(('fp32', *device.autocasts))}.",
            "Use one of these, or precision='auto'.",
        )
    return POLICIES[name]


@dataclass
class LossScale:
    """Dynamic loss scaling on the device, after Micikevicius et al. 2017, arXiv:1710.03740.

    The scale is halved when a gradient is not finite and doubled after ``interval`` finite steps in a row; powers of two, so
    scaling itself never rounds. Both tensors belong to the saved state.
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

    def update(self, skipped: Tensor) -> None:
        """Move the scale after a step; ``skipped`` is 1.0 or 0.0, 0-dim."""
        torch._amp_update_scale_(self.scale, self.streak, skipped, 2.0, 0.5, self.interval)
