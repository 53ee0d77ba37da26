"""Moving a model to a device: its parameters stay the objects that they were, and what was tied stays tied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from thalweg.core import DeviceError
from thalweg.device.probes import capabilities_of


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """``model.to(device)``, on every device with the parameters that the model has now.

    Where torch cannot give a parameter other memory, ``.to`` makes new parameters: tied weights come apart, and optimizers
    made before hold the old ones. There parameters are exchanged in place.

    Returns:
        ``model``.

    Raises:
        DeviceError: for float64 where the device has none; if it cannot keep the parameters, and the model may then be moved in
            part.
    """
    before = list(_owned(model))
    check_float64(((f"{path}.{name}" if path else name, x) for _, path, name, x in before), device, "The model")
    kept = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(kept or not _takes_other_memory(model, device))
    try:
        model.to(device)
    except RuntimeError as err:
        if "swap" not in str(err):
            raise
        raise DeviceError(
            f"The model cannot be moved to {device} with the parameters that it has.",
            " ".join(str(err.__cause__ or err).split())[:300],
            "Move it before anything else holds its parameters: graphs of a forward pass, hooks, weak references.",
        ) from None
    finally:
        torch.__future__.set_swap_module_params_on_conversion(kept)
    _tie_buffers(before)
    _check(before, device)
    return model


def check_float64(named: Iterable[tuple[str, torch.Tensor]], device: torch.device, what: str) -> None:
    """Refuse float64 on a device that has none, before a kernel does.

    Raises:
        DeviceError: if there is some.
    """
    if device.type == "meta" or capabilities_of(device).float64:
        return
    wide = [name for name, x in named if x.dtype in (torch.float64, torch.complex128)]
    if wide:
        raise DeviceError(
            f"{what} has float64, and {device} has none.",
            f"{len(wide)} tensors, such as '{wide[0]}'.",
            "Make them float32: .float(); or use device='cpu'.",
        )


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """(module, its name in the model, a tensor's name in it, the tensor): parameters, then buffers."""
    for path, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    yield module, path, name, tensor


def _takes_other_memory(model: nn.Module, device: torch.device) -> bool:
    """Whether torch can put memory of ``device`` into the model's parameters."""
    there = torch.empty(0, device=device)
    return all(p.device == device or torch._has_compatible_shallow_copy_type(p, there) for p in model.parameters())


def _tie_buffers(before: list[tuple[nn.Module, str, str, Any]]) -> None:
    """A buffer that stands in several modules is moved once for each of them: all get the first."""
    first: dict[int, Any] = {}
    for module, _, name, tensor in before:
        if name in module._buffers:
            module._buffers[name] = first.setdefault(id(tensor), module._buffers[name])


def _check(before: list[tuple[nn.Module, str, str, Any]], device: torch.device) -> None:
    lost = []
    for module, path, name, tensor in before:
        now = module._parameters.get(name)
        if name in module._parameters and (now is not tensor or now.device.type != device.type):
            lost.append(f"{path}.{name}" if path else name)
    if lost:
        raise DeviceError(
            f"{device} does not keep the parameters of a model that is moved there.",
            f"{len(lost)} are others than before or are elsewhere, such as '{lost[0]}'; ties and optimizers would be lost.",
            "Make the model there: with torch.device(...); or train on another device.",
        )
