"""What was launched on a device once, recorded and played again: one call of the host's in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from thalweg.device import accelerator
from thalweg.device.backend import Device

Result = TypeVar("Result")


def record(device: Device, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """(something that plays again what ``work`` launched, what ``work`` gave).

    Recording runs nothing on the device. ``work`` must have run before, read and write the same memory at each call, and take none
    that is freed in between; what it gave is written anew whenever it is played. Random numbers of torch's generators are those of
    where the generators stand at that time.

    Args:
        device: one that ``captures_graphs``.
    """
    torch_module = accelerator.module(device.kind)
    graph = torch_module.CUDAGraph()
    with torch_module.graph(graph):
        result = work()
    return graph.replay, result
