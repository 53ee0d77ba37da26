"""How a model's convolutions lie in memory: channels last where the device's kernels want them so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
        kernel: Tensor = layer.weight.data  # type: ignore[assignment]
        layer.weight.data = kernel.to(memory_format=FORMATS[memory_format])


def _lies_last(layer: nn.Module) -> bool:
    kernel: Tensor = layer.weight  # type: ignore[assignment]
    return kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()


def lay_out(
    model: nn.Module,
    device: Device,
    take: Callable[[str, Any, str], Any],
    recipe: Recipe,
    *,
    measured: bool = True,
) -> Recipe:
    """Put kernels of two-dimensional convolutions as the recipe or the device wants them, in place.

    Names, shapes and values stay; checkpoints know nothing of it.

    Args:
        take: notes the decision.
        measured: whether it is measured on the host later (``levers.py``), where it is open; else it stays "contiguous".

    Returns:
        The recipe; its ``memory_format`` is still "auto" where it will be measured, or matters to nothing.
    """
    layers, wanted = convolutions(model), recipe.memory_format
    if not layers:
        if wanted == "channels_last":
            take("memory_format", wanted, "not used: the model has no two-dimensional convolution")
        return recipe
    if wanted == "auto" and device.capabilities.channels_last:
        told = f"{len(layers)} convolutions: the products of {device.kind} read channels side by side"
        wanted = take("memory_format", "channels_last", told)
    elif wanted == "auto" and not measured:
        wanted = "contiguous"
    elif wanted == "auto" and all(_lies_last(layer) for layer in layers):
        wanted = take("memory_format", "channels_last", "the model's kernels lie so already")
    elif wanted == "auto" and not device.is_host:
        wanted = take("memory_format", "contiguous", f"nothing is known of {device.kind} that would want another")
    if wanted != "auto":
        put(layers, wanted)
    return replace(recipe, memory_format=wanted)
