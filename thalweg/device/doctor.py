"""What this machine is, for people: device, memory, what half precision gains, what the device can do, threads, compiler."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator

import torch
from torch import nn

from thalweg.core import human_bytes
from thalweg.device.backend import FP8_FROM, TF32_FROM, Device, choose, facts
from thalweg.device.chips import Chip, chip_here
from thalweg.device.host import levers
from thalweg.device.measure import half_precision_gain, peak_rates

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WORK = {
    "cpu": "the host computes it",
    "eager": "operator by operator",
    "graph": "whole graphs, compiled before they run",
}


def examine(asked: str = "auto") -> Iterator[tuple[str, str]]:
    """(what, finding), measured where a measurement is the only answer; takes a few seconds.

    Args:
        asked: the device, as in a recipe.

    Raises:
        DeviceError: if this machine does not have it.
    """
    device, why = choose(asked)
    known = facts(device)
    yield "device", f"{device.torch_device}: {known['name']} ({why})"
    yield "memory", human_bytes(known["memory_bytes"]) if known["memory_bytes"] else "the device does not say"
    yield "threads", f"{known['threads']} used by torch, {known['cores']} processors"
    yield "torch", f"{known['torch']}, Python {known['python']}, {known['system']}"
    yield from _peaks(device, chip_here(known["name"], known["memory_bytes"]))
    yield "tf32", "possible" if device.tf32 else f"not possible on this device{_needs(device, TF32_FROM)}"
    for half in ("bf16", "fp16"):
        yield half, _half(device, half)
    yield "fp8", _fp8(device)
    if device.is_host:
        yield from levers(device)
    yield from _abilities(device)
    yield "compiler", _compiler()


def _peaks(device: Device, chip: Chip | None) -> Iterator[tuple[str, str]]:
    """Measured products, what of the data sheet they reach, and what a model's arithmetic is held against."""
    size, rates = peak_rates(device)
    for name, rate in rates.items():
        stated = None if chip is None else chip.rates.get(name)
        part = "" if stated is None else f", {rate / stated:.0%} of the {stated / 1e12:g} TFLOP/s stated"
        yield "matmul", f"{name}: {rate / 1e9:,.0f} GFLOP/s on {size} x {size}{part}"
    if chip is not None:
        listed = ", ".join(f"{name} {rate / 1e12:g}" for name, rate in chip.rates.items())
        yield "data sheet", f"{chip.name}: TFLOP/s {listed}; memory {chip.bandwidth / 1e12:g} TB/s ({chip.source})"
        yield "FLOPs use", "of a run: its model's FLOPs a second over those stated for its precision"
    else:
        yield (
            "FLOPs use",
            "of a run: not said, as no data sheet of this chip is known; take the measured products above",
        )


def _half(device: Device, half: str) -> str:
    if half not in device.autocasts:
        return f"not possible on this device. {device.why_not(half)}".strip()
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


def _abilities(device: Device) -> Iterator[tuple[str, str]]:
    """The capability table of the device, a line an item."""
    can = device.capabilities
    own = len(device.generators()) > 1
    yield "work", _WORK[can.graph_kind]
    yield "autocast", ", ".join(can.autocasts) or "no half precision"
    yield "loss scale", _word(can.scales_fp16, "possible", "not possible: fp16 is refused")
    yield "float64", _word(can.float64, "yes", "none: exact sums are float32")
    yield "bfloat16", _word(can.bf16, "yes", "none")
    yield "pinned", _word(can.pins, "copies from pinned memory run by themselves", "no pinned memory")
    yield "streams", _word(can.streams and can.pins, "copies run beside the work", "copies wait for the work")
    yield (
        "figures",
        _word(can.measures_memory, "it says what memory is in use", "it does not say what memory is in use"),
    )
    yield "generators", _word(own, "its own and the host's", "the host's")
    yield "capture", _word(can.captures_graphs, "a step can be replayed as one graph", "not possible")
    yield "shapes", _word(can.static_shapes, "each new one costs a compilation", "any")
    yield (
        "compile",
        f"torch.compile(backend={can.compile_backend!r})" if can.compile_backend else "nothing known for it",
    )
    yield "ranks", f"sums over {can.ranks_backend}" if can.ranks_backend else "no sums between processes"
    yield "lists", _word(can.foreach, "one call works on a list of tensors", "one call for each tensor")
    yield "fused", _word(can.fused, "torch's fused optimizers", "no fused optimizers")
    yield "views", _word(can.views, "parameters lie in flat buffers", "not possible: it cannot train here")
    for fault in can.faults:
        yield "operator", f"{fault.operator} is {fault.fault} ({fault.what}); way round: {fault.way}"


def _word(has: bool, yes: str, no: str) -> str:
    return yes if has else no


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return f"{name}: {told.splitlines()[0] if told else path}"
    return "none found: torch.compile needs one on the CPU"
