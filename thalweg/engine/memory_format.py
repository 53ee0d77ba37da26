"""How a model's convolutions lie in memory: channels last where the device's kernels want them so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from thalweg.core import Recipe
from thalweg.device import Device

_FLAT = (nn.Conv2d, nn.ConvTranspose2d)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def convolutions(model: nn.Module) -> list[nn.Module]:
    """Layers whose kernels are laid out."""
    return [layer for layer in model.modules() if isinstance(layer, _FLAT)]


def put(layers: Sequence[nn.Module], memory_format: str) -> None:
    """Lay kernels out, in place; what a convolution gives lies as its kernel does.

    By ``to``: it sets the strides of kernels of one input channel too, which ``contiguous`` leaves ambiguous, and then
    activations would lie channel after channel.
    """
    for layer in layers:
        layer.weight.data = layer.weight.data.to(memory_format=FORMATS[memory_format])  # type: ignore[operator, union-attr]


def lay_out(model: nn.Module, device: Device, take: Callable[[str, Any, str], Any], recipe: Recipe) -> Recipe:
    """Put kernels of two-dimensional convolutions as the recipe or the device wants them, in place.

    Names, shapes and values stay; checkpoints know nothing of it.

    Args:
        take: notes the decision.

    Returns:
        The recipe; its ``memory_format`` is still "auto" on the host, where it is measured (``levers.py``).
    """
    layers, wanted = convolutions(model), recipe.memory_format
    if not layers:
        if wanted == "channels_last":
            take("memory_format", wanted, "not used: the model has no two-dimensional convolution")
        return recipe
    if wanted == "auto" and device.capabilities.channels_last:
        told = f"{len(layers)} convolutions: the products of {device.kind} read channels side by side"
        wanted = take("memory_format", "channels_last", told)
    elif wanted == "auto" and not device.is_host:
        wanted = take("memory_format", "contiguous", f"nothing is known of {device.kind} that would want another")
    if wanted != "auto":
        put(layers, wanted)
    return replace(recipe, memory_format=wanted)
