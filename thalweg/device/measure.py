"""What a device gains by half precision, measured: the answer differs by chip, by shape and by model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from thalweg.device.backend import Device
from thalweg.device.products import float32_products


def clock(work: Callable[[], object], device: Device, *, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` runs, the device waited for."""
    seconds = []
    for _ in range(repeats):
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


_CLEAR, _DECIDED = 5, 9  # pairs that agree by chance once in 16 times; the most that a choice is worth


def half_precision_gain(
    plain: Callable[[], object],
    half: Callable[[], object],
    device: Device,
    *,
    budget_s: float = 2.0,
    worth: float | None = None,
) -> tuple[float, int]:
    """How many times faster ``half`` is than ``plain``: median of pairs taken in turn, after one warm-up each.

    Args:
        budget_s: seconds that the measuring may take, warm-ups included; at least 3 pairs are taken.
        worth: the ratio that a choice hangs on: where the first 5 pairs all lie on one side of it, no more are
            taken, and else no more than 9.

    Returns:
        The ratio, and the number of pairs that it rests on.
    """
    start = time.perf_counter()
    first = clock(plain, device, repeats=1)[0] + clock(half, device, repeats=1)[0]
    pairs = max(3, min(25, int((budget_s - (time.perf_counter() - start)) / max(first, 1e-6))))
    pairs = pairs if worth is None else min(pairs, _DECIDED)
    ratios: list[float] = []
    while len(ratios) < pairs:
        ratios.append(clock(plain, device, repeats=1)[0] / max(clock(half, device, repeats=1)[0], 1e-9))
        if worth is not None and len(ratios) == _CLEAR and len({ratio < worth for ratio in ratios}) == 1:
            break
    return statistics.median(ratios), len(ratios)


RATES = ("float32", "tf32", "bfloat16", "float16")


def matmul_rates(
    device: Device, *, size: int = 1024, repeats: int = 5, names: Sequence[str] = RATES
) -> dict[str, float]:
    """Floating-point operations a second of a square matrix product, by dtype; the best of ``repeats``.

    A product that takes more than half a second is not repeated: it gains nothing by being warm.

    Args:
        names: of ``RATES``; those that the device does not have are left out of the answer.
    """
    rates = {}
    for name in names:
        if name == "tf32" and not device.tf32:
            continue
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        try:
            with float32_products("tf32" if name == "tf32" else "ieee", device.kind), torch.no_grad():
                a = torch.ones(size, size, dtype=dtype, device=device.torch_device)
                work = lambda a=a: a @ a
                first = clock(work, device, repeats=1)
                rates[name] = 2 * size**3 / min(first if first[0] > 0.5 else clock(work, device, repeats=repeats))
        except RuntimeError:  # the device has no such product
            continue
    return rates


#: A product of matrices should take so many seconds before its rate is the chip's and not that of starting it; and the largest.
_LONG, _LARGEST = 2e-3, 8192


def peak_rates(device: Device) -> tuple[int, dict[str, float]]:
    """(size, floating-point operations a second by precision) of square products that are large enough to fill the device."""
    short = {"float32": "fp32", "tf32": "tf32", "bfloat16": "bf16", "float16": "fp16"}
    names = [name for name in RATES if short[name] in ("fp32", "tf32", *device.autocasts)]
    size = 1024
    while size < _LARGEST and 2 * size**3 / matmul_rates(device, size=size, names=("float32",))["float32"] < _LONG:
        size *= 2
    return size, {short[name]: rate for name, rate in matmul_rates(device, size=size, names=names).items()}
