"""Torch's calls to the accelerator, behind one shim: each gives an answer on every device, and on a machine without one.

``torch.accelerator`` raises where there is no accelerator, and a backend that registers itself need not have all of it.
"""

from __future__ import annotations

from typing import Any

import torch

#: The name of the slot for backends that register themselves, before one has.
_NOBODY = "privateuseone"
#: What torch raises where there is no accelerator, or where a backend lacks a call (NotImplementedError is a RuntimeError).
_LACKS = (RuntimeError, AttributeError, AssertionError, ValueError)


def module(kind: str) -> Any:
    """Torch's module of a kind of device, such as ``torch.cuda``; None where it has none."""
    try:
        return torch.get_device_module(kind)
    except _LACKS:
        return None


def registered() -> str | None:
    """The name that a backend has registered itself under, or None."""
    name = str(torch._C._get_privateuse1_backend_name())
    return None if name == _NOBODY and module(name) is None else name


def current() -> str | None:
    """The kind of the accelerator of this machine, or None."""
    try:
        found = torch.accelerator.current_accelerator(check_available=True)
    except _LACKS:
        found = None
    if found is not None:
        return found.type
    name = registered()  # one without the hooks that torch.accelerator asks
    return name if name is not None and count(name) else None


def count(kind: str) -> int:
    """How many devices of a kind there are."""
    if kind == "cpu":
        return 1
    try:
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is not None and found.type == kind:
            return int(torch.accelerator.device_count())
    except _LACKS:
        pass
    one = module(kind)
    if kind != registered() or one is None:
        return 0
    available = getattr(one, "is_available", None)
    return int(one.device_count()) if available is not None and available() and hasattr(one, "device_count") else 0


def index() -> int:
    """The number of the device in use."""
    try:
        return max(0, int(torch.accelerator.current_device_index()))
    except _LACKS:
        return 0


def use(device: torch.device) -> None:
    """Make it the one in use."""
    try:
        torch.accelerator.set_device_index(device.index or 0)
    except _LACKS:
        if device.index:  # there is no other way to the second one
            raise


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cpu":
        return
    try:
        torch.accelerator.synchronize(device)
    except _LACKS:
        wait = getattr(module(device.type), "synchronize", None)
        if wait is not None:
            wait()
        else:  # nothing to wait by but a value that comes home
            torch.zeros((), device=device).item()


def name(device: torch.device) -> str:
    """What the device calls itself, or its kind."""
    told = getattr(module(device.type), "get_device_name", None)
    if told is None:
        return device.type
    try:
        return str(told(device))
    except _LACKS:
        return device.type


def memory_of(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes of its memory; zeros where it does not say."""
    try:
        free, whole = torch.accelerator.get_memory_info(device)
    except _LACKS:
        told = getattr(module(device.type), "mem_get_info", None)
        try:
            free, whole = told(device) if told is not None else (0, 0)
        except _LACKS:
            free, whole = 0, 0
    return int(free), int(whole)


class _Seeded:
    """What a backend without generators of its own seeds by, in the words of ``torch.Generator``."""

    def __init__(self, backend: Any, device: torch.device) -> None:
        self.backend, self.at = backend, device.index or 0

    def manual_seed(self, seed: int) -> None:
        self.backend.manual_seed(seed)

    def get_state(self) -> torch.Tensor:
        state: torch.Tensor = self.backend.get_rng_state(self.at)
        return state

    def set_state(self, state: torch.Tensor) -> None:
        self.backend.set_rng_state(state, self.at)


def generators(device: torch.device) -> list[Any]:
    """What kernels on the device draw from, besides the host's generator; each has ``torch.Generator``'s words."""
    backend = module(device.type)
    if device.type == "cpu" or backend is None:
        return []
    if device.type == "mps":
        return [backend._get_default_mps_generator()]
    if hasattr(backend, "init"):
        backend.init()
    mine = getattr(backend, "default_generators", None)
    if mine:
        return [mine[device.index or 0]]
    words = ("manual_seed", "get_rng_state", "set_rng_state")
    return [_Seeded(backend, device)] if all(hasattr(backend, word) for word in words) else []
