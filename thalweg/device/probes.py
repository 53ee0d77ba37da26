"""Trying what a device can do, where nothing is known: each question is a few operators on a few numbers."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from thalweg.device import accelerator
from thalweg.device.capabilities import KNOWN, Capabilities, known

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def capabilities_of(device: torch.device | str) -> Capabilities:
    """What a device can do: what is known of its kind, and for the rest what it shows.

    Args:
        device: a device, or a kind of device. One that is not here is taken at what is known of its kind.
    """
    kind, index = (device, 0) if isinstance(device, str) else (device.type, device.index or 0)
    here = kind != "meta" and accelerator.count(kind)
    found = _probed(kind, index) if here else known(kind)
    if kind == "cuda" and not isinstance(device, str) and not torch.cuda.is_bf16_supported(including_emulation=False):
        return replace(found, autocasts=("fp16",), bf16=False)
    return found


@cache
def _probed(kind: str, index: int) -> Capabilities:
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, index)
    row = KNOWN.get(kind, {})
    asked = {f.name for f in fields(Capabilities)} & _PROBES.keys() - row.keys()
    found: dict[str, Any] = {name: _PROBES[name](device) for name in sorted(asked)}
    return replace(known(kind), **found)


def works(trial: Callable[[], Any]) -> bool:
    """Whether a trial comes to a true end, without error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(trial())
    except Exception:  # backends raise what they like
        return False


def _arithmetic(dtype: torch.dtype) -> Callable[[torch.device], bool]:
    def trial(device: torch.device) -> bool:
        x = torch.tensor([1.0, 2.0], dtype=dtype, device=device)
        return [float(v) for v in (x * x + 1).cpu()] == [2.0, 5.0]

    return lambda device: works(lambda: trial(device))


def _autocasts(device: torch.device) -> tuple[str, ...]:
    def trial(dtype: torch.dtype) -> bool:
        layer, x = nn.Linear(4, 4, bias=False), torch.ones(2, 4)
        layer.weight = nn.Parameter(torch.ones(4, 4).to(device))
        with torch.autocast(device.type, dtype=dtype):
            y = layer(x.to(device))
        y.float().sum().backward()
        grad = layer.weight.grad
        return y.dtype == dtype and grad is not None and float(grad.sum()) == 32.0

    return tuple(name for name, dtype in _HALVES.items() if works(partial(trial, dtype)))


def _scales(device: torch.device) -> bool:
    """The operator that moves the loss scale (``precision/scale.py``)."""

    def trial() -> bool:
        scale, streak = torch.full((), 8.0, device=device), torch.zeros((), dtype=torch.int32, device=device)
        torch._amp_update_scale_(scale, streak, torch.ones((), device=device), 2.0, 0.5, 2)
        return float(scale) == 4.0

    return works(trial)


def _pins(device: torch.device) -> bool:
    return works(
        lambda: torch.ones(2).pin_memory().is_pinned() and float(torch.ones(2).pin_memory().to(device)[1]) == 1
    )


def _streams(device: torch.device) -> bool:
    def trial() -> bool:
        beside = torch.Stream(device=device)
        beside.wait_event(torch.accelerator.current_stream(device).record_event())
        with beside:
            x = torch.ones(2).to(device)
        torch.accelerator.current_stream(device).wait_event(beside.record_event())
        return float(x[1]) == 1

    return works(trial)


def _measures(device: torch.device) -> bool:
    def trial() -> bool:
        before = torch.accelerator.memory_allocated(device)
        x = torch.zeros(1 << 18, device=device)
        return torch.accelerator.memory_allocated(device) - before >= x.nbytes

    return works(trial)


def _captures(device: torch.device) -> bool:
    return hasattr(torch.accelerator, "Graph") and hasattr(accelerator.module(device.type), "graph")


def _foreach(device: torch.device) -> bool:
    def trial() -> bool:
        xs = [torch.ones(2, device=device), torch.ones(3, device=device)]
        norms = torch._foreach_norm(xs, 2)
        torch._foreach_zero_(xs)
        return abs(float(norms[1]) - 3**0.5) < 1e-6 and float(xs[1].sum()) == 0

    return works(trial)


def _fused(device: torch.device) -> bool:
    """Torch's fused AdamW: it divides the gradient by 2, then the first step has the size of the rate."""

    def trial() -> bool:
        one = partial(torch.full, (3,), device=device)
        p, g, t = one(1.0), one(4.0), torch.ones((), device=device)
        stop, scale = torch.zeros((), device=device), torch.full((), 2.0, device=device)
        flags: dict[str, Any] = {"amsgrad": False, "maximize": False, "grad_scale": scale, "found_inf": stop}
        numbers: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
        m, v = one(0.0), one(0.0)
        torch._fused_adamw_([p], [g], [m], [v], [], [t], **numbers, **flags)
        return abs(float(p[0]) - 0.9) < 1e-5 and abs(float(m[0]) - 0.2) < 1e-5 and abs(float(v[0]) - 0.04) < 1e-5

    return works(trial)


def _views(device: torch.device) -> bool:
    """A parameter that is a view of a flat buffer, and so is the gradient that a backward pass adds to."""

    def trial() -> bool:
        flat, grads = torch.zeros(8, device=device), torch.zeros(8, device=device)
        p = nn.Parameter(torch.ones(2, 2, device=device))
        p.data = flat[2:6].as_strided((2, 2), (2, 1), 2)
        p.grad = grads[2:6].view(2, 2)
        flat.fill_(1.0)
        (p * p).sum().backward()
        (p + 1).sum().backward()
        return float(p.sum()) == 4.0 and float(grads.sum()) == 12.0

    return works(trial)


def _compiles(device: torch.device) -> str | None:
    """A backend of torch.compile that is registered under the device's own name."""
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    return device.type if any(entry.name == device.type for entry in entries) else None


def _ranks(device: torch.device) -> str:
    import torch.distributed as dist

    try:
        return str(dist.get_default_backend_for_device(device)) if dist.is_available() else ""
    except (ValueError, RuntimeError):
        return ""


_PROBES: dict[str, Callable[[torch.device], Any]] = {
    "autocasts": _autocasts,
    "scales_fp16": _scales,
    "float64": _arithmetic(torch.float64),
    "bf16": _arithmetic(torch.bfloat16),
    "pins": _pins,
    "streams": _streams,
    "measures_memory": _measures,
    "captures_graphs": _captures,
    "compile_backend": _compiles,
    "ranks_backend": _ranks,
    "foreach": _foreach,
    "fused": _fused,
    "views": _views,
}
