"""What the levers of a CPU are worth on this machine, for ``thalweg doctor``: formats, precisions, threads, the C library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F

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
    images, kernel = torch.ones(32, 32, 28, 28), torch.ones(64, 32, 3, 3)
    flops = 3 * 2 * 32 * 28 * 28 * kernel.numel()
    one, none = [1, 1], [0, 0]

    def run(way: tuple[str, str]) -> float:
        half, memory_format = way
        dtype = torch.bfloat16 if half == "bf16" else torch.float32
        x, w = (t.to(dtype, memory_format=_FORMATS[memory_format]) for t in (images, kernel))
        begun = time.perf_counter()
        made = F.conv2d(x, w, padding=1)
        # Not by autograd: its engine starts threads for every device there is, and a process that ends just then aborts.
        torch.ops.aten.convolution_backward(made, x, w, None, one, one, one, False, none, 1, [True, True, False])
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
