"""What the levers of a CPU are worth on this machine, for ``thalweg doctor``: formats, precisions, threads, the C library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product

import torch
from torch import nn

from thalweg.device import allocator, threads
from thalweg.device.backend import Device
from thalweg.device.race import race

_BUDGET_S = 0.5
_FORMATS = {"": torch.contiguous_format, " channels last": torch.channels_last}


def levers(device: Device) -> Iterator[tuple[str, str]]:
    """(what, finding); takes about a second."""
    yield "convolution", _convolution(device)
    with threads.kept():
        yield "threads tried", _threads()
    yield "allocator", _allocator()


def _convolution(device: Device) -> str:
    """Forward and backward pass of one convolution, in all combinations."""
    halves = ["fp32", *(["bf16"] if "bf16" in device.autocasts else [])]
    images = torch.ones(32, 32, 28, 28, requires_grad=True)
    layer = nn.Conv2d(32, 64, 3, padding=1)
    flops = 3 * 2 * 32 * 28 * 28 * layer.weight.numel()

    def run(way: tuple[str, str]) -> float:
        half, memory_format = way
        layer.weight.data = layer.weight.data.to(memory_format=_FORMATS[memory_format])
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "bf16"):
            made = layer(images)
        torch.autograd.grad(made, [images, layer.weight], torch.ones_like(made))
        return time.perf_counter() - begun

    found = race([*product(halves, _FORMATS)], run, _BUDGET_S)
    told = [f"{half}{lies} {flops / seconds / 1e9:,.0f}" for (half, lies), seconds in found.items()]
    return f"GFLOP/s: {', '.join(told)}; a run measures its own model"


def _threads() -> str:
    """A small and a large product, by numbers of threads."""
    if reason := threads.given():
        return f"none: {reason}"
    told = []
    for name, rows in (("64 x 256", 64), ("2048 x 256", 2048)):
        left, right = torch.ones(rows, 256), torch.ones(256, 256)

        def run(number: int, left: torch.Tensor = left, right: torch.Tensor = right) -> float:
            torch.set_num_threads(number)
            begun = time.perf_counter()
            for _ in range(10):
                left @ right
            return time.perf_counter() - begun

        found = race(threads.numbers(), run, _BUDGET_S / 5)
        told.append(f"{name}: " + ", ".join(f"{number} {1e5 * s:.3g}" for number, s in found.items()))
    return f"us of a product with 256 x 256, by threads: {'; '.join(told)}"


def _allocator() -> str:
    if reason := allocator.against():
        return f"as it is: {reason}"
    return (
        f"glibc: a run keeps what is freed where its passes would take fresh pages ({allocator.VARIABLE}=keep: never)"
    )
