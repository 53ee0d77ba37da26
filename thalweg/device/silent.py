"""Operators that a backend runs without an error and without their effect: tried on the device before step 0, and replaced.

Found in torch-tpu 0.2.0: running statistics of batch and instance normalization never move, the result of ``avg_pool1d`` has no
gradient, and neither have those of LSTM and GRU in a compiled graph. A replacement works on tensors of that kind of device alone,
and is not made where the trial passes, so that a mended backend is used as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

#: Backends whose operators torch's own tests cover.
_TRUSTED = ("cpu", "cuda", "mps", "xpu", "meta")
_found: dict[tuple[str, str], bool] = {}  # (kind of device, operator): whether its trial failed


def mend(model: nn.Module, device: torch.device) -> list[tuple[str, str]]:
    """Replace operators that have no effect on the device, for the rest of this process, among those that the model may use.

    Returns:
        (operator, what is wrong with it and what stands in its place) of each that is replaced.
    """
    if device.type in _TRUSTED:
        return []
    tracked = [layer for layer in model.modules() if getattr(layer, "running_mean", None) is not None]
    wanted = {
        "batch_norm": any(isinstance(layer, _BatchNorm) for layer in tracked),
        "instance_norm": any(isinstance(layer, _InstanceNorm) for layer in tracked),
        "avg_pool1d": True,  # it is called as a function as well
    }
    told = []
    for name, (trial, stand_in, what) in _MENDED.items():
        if wanted[name] and _fails(name, device, trial):
            _replace(name, device.type, stand_in)
            told.append((name, what))
    return told


def untrainable_in_graphs(model: nn.Module, device: torch.device, backend: str | None) -> str:
    """Why the model cannot be trained in a compiled graph on the device, or "".

    Args:
        backend: of torch.compile.
    """
    if device.type in _TRUSTED or backend is None:
        return ""
    for kind in (nn.LSTM, nn.GRU):
        names = [name for name, layer in model.named_modules() if isinstance(layer, kind)]
        if names and _fails(kind.__name__, device, functools.partial(_recurrent, kind, backend)):
            return f"what {kind.__name__} gives in a compiled graph has no gradient on {device.type} ('{names[0]}')"
    return ""


def _fails(name: str, device: torch.device, trial: Callable[[torch.device], bool]) -> bool:
    key = device.type, name
    if key not in _found:
        with torch.enable_grad():
            _found[key] = not trial(device)
    return _found[key]


def _replace(name: str, kind: str, stand_in: Callable[..., Tensor]) -> None:
    """``torch.nn.functional.name`` is ``stand_in`` on one kind of device, and what it was on all others."""
    original = getattr(F, name)
    if kind in getattr(original, "replaced_on", ()):
        return

    @functools.wraps(original)
    def replaced(input: Tensor, *args: Any, **named: Any) -> Tensor:
        chosen = stand_in if input.device.type == kind else original
        result: Tensor = chosen(input, *args, **named)
        return result

    replaced.replaced_on = (kind, *getattr(original, "replaced_on", ()))  # type: ignore[attr-defined]
    setattr(F, name, replaced)


# ------------------------------------------------------------------ trials


def _some(device: torch.device) -> Tensor:
    return torch.arange(12, dtype=torch.float32).reshape(2, 2, 3).to(device)


def _moves(norm: Callable[..., Tensor], device: torch.device) -> bool:
    mean, var = torch.zeros(2, device=device), torch.ones(2, device=device)
    with torch.no_grad():
        norm(_some(device), mean, var, None, None, True, 0.5, 1e-5)
    return bool(mean.cpu().ne(0).all()) and bool(var.cpu().ne(1).all())


def _has_gradient(device: torch.device) -> bool:
    return F.avg_pool1d(_some(device).requires_grad_(), 3).requires_grad


def _recurrent(kind: Any, backend: str, device: torch.device) -> bool:
    layer = kind(2, 2).to(device)
    compiled: Any = torch.compile(layer, backend=backend, dynamic=False)
    found = compiled(torch.ones(2, 1, 2, device=device))[0]
    return bool(found.requires_grad)


# ------------------------------------------------------------------ what stands in their place


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` whose running statistics are moved by hand."""
    if not training or running_mean is None or running_var is None:
        return _originals["batch_norm"](input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        wide = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [0, *range(2, input.dim())], correction=1)
        _move(running_mean, mean, momentum)
        _move(running_var, var, momentum)
    return _originals["batch_norm"](input, None, None, weight, bias, True, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm`` whose running statistics are moved by hand: means over the samples of each one's moments."""
    if not use_input_stats or running_mean is None or running_var is None:
        return _originals["instance_norm"](
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    with torch.no_grad():
        wide = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [*range(2, input.dim())], correction=1)
        _move(running_mean, mean.mean(0), momentum)
        _move(running_var, var.mean(0), momentum)
    return _originals["instance_norm"](input, None, None, weight, bias, True, momentum, eps)


def _move(running: Tensor, now: Tensor, momentum: float) -> None:
    running.copy_(running * (1 - momentum) + now.to(running.dtype) * momentum)


def _avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """``F.avg_pool1d`` as a pooling of images one pixel high."""

    def one(value: Any) -> int:
        return int(value[0] if isinstance(value, (tuple, list)) else value)

    size = one(kernel_size)
    step = size if stride is None or stride == () else one(stride)
    pooled = F.avg_pool2d(input.unsqueeze(-2), (1, size), (1, step), (0, one(padding)), ceil_mode, count_include_pad)
    return pooled.squeeze(-2)


_originals: dict[str, Callable[..., Tensor]] = {
    name: getattr(F, name) for name in ("batch_norm", "instance_norm", "avg_pool1d")
}
_MENDED: dict[str, tuple[Callable[[torch.device], bool], Callable[..., Tensor], str]] = {
    "batch_norm": (
        functools.partial(_moves, _originals["batch_norm"]),
        _batch_norm,
        "its running statistics did not move when it was tried; they are moved by hand",
    ),
    "instance_norm": (
        functools.partial(_moves, _originals["instance_norm"]),
        _instance_norm,
        "its running statistics did not move when it was tried; they are moved by hand",
    ),
    "avg_pool1d": (
        _has_gradient,
        _avg_pool1d,
        "its result had no gradient when it was tried; avg_pool2d stands in its place",
    ),
}
