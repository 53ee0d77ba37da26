"""What this machine is, for people: device, memory, what half precision gains, threads, compiler."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator

import torch
from torch import nn

from thalweg.core import human_bytes
from thalweg.device.backend import FP8_FROM, TF32_FROM, Device, choose, facts
from thalweg.device.measure import half_precision_gain, matmul_rates

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def examine() -> Iterator[tuple[str, str]]:
    """(what, finding), measured where a measurement is the only answer; takes a few seconds."""
    device, why = choose("auto")
    known = facts(device)
    yield "device", f"{device.torch_device}: {known['name']} ({why})"
    yield "memory", human_bytes(known["memory_bytes"])
    yield "threads", f"{known['threads']} used by torch, {known['cores']} processors"
    yield "torch", f"{known['torch']}, Python {known['python']}, {known['system']}"
    for name, rate in matmul_rates(device).items():
        yield "matmul", f"{name}: {rate / 1e9:,.0f} GFLOP/s on 1024 x 1024"
    yield "tf32", "possible" if device.tf32 else f"not possible on this device{_needs(device, TF32_FROM)}"
    for half in ("bf16", "fp16"):
        yield half, _half(device, half)
    yield "fp8", _fp8(device)
    yield "compiler", _compiler()


def _half(device: Device, half: str) -> str:
    if half not in device.autocasts:
        return "not possible on this device"
    block = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    device.move(block)
    inputs = torch.ones(512, 256, device=device.torch_device)

    def plain() -> None:
        block(inputs).sum().backward()

    def autocast() -> None:
        with torch.autocast(device.kind, dtype=_DTYPES[half]):
            total = block(inputs).float().sum()
        total.backward()

    gain, pairs = half_precision_gain(plain, autocast, device, budget_s=1.5)
    verdict = "gains" if gain >= 1.1 else "does not gain"
    return f"possible; {verdict}: {gain:.2f} times the speed of fp32 on an MLP block ({pairs} pairs)"


def _fp8(device: Device) -> str:
    if not device.fp8:
        return f"not possible on this device{_needs(device, FP8_FROM)}"
    found = importlib.util.find_spec("torchao") is not None
    return "possible" if found else "possible with torchao, which is not installed: pip install 'thalweg[fp8]'"


def _needs(device: Device, first: tuple[int, int]) -> str:
    """What a CUDA device would need, and what it has."""
    mine = device.capability
    return "" if mine is None else f": compute capability {mine[0]}.{mine[1]}, and it begins with {first[0]}.{first[1]}"


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return f"{name}: {told.splitlines()[0] if told else path}"
    return "none found: torch.compile needs one on the CPU"
