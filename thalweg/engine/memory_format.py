"""How a model's convolutions lie in memory: channels last where the device's kernels want them so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from thalweg.device import Device

_FLAT = (nn.Conv2d, nn.ConvTranspose2d)


def lay_out(model: nn.Module, device: Device, take: Callable[[str, Any, str], Any]) -> None:
    """Put kernels of two-dimensional convolutions channels last, in place; what they give lies so too.

    Names, shapes and values stay; checkpoints know nothing of it.

    Args:
        take: notes the decision.
    """
    if not device.capabilities.channels_last:
        return
    layers = [layer for layer in model.modules() if isinstance(layer, _FLAT)]
    for layer in layers:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    if layers:
        told = f"{len(layers)} convolutions: the products of {device.kind} read channels side by side"
        take("memory format", "channels last", told)
