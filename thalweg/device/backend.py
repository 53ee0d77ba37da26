"""The only room that names a backend. All else asks a ``Device`` what it can do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from thalweg.core import DeviceError
from thalweg.device.products import cpu_has_tf32

#: Compute capabilities of CUDA that the formats begin with.
TF32_FROM, FP8_FROM = (8, 0), (8, 9)

#: What each kind of device can do, as far as training here needs to know; "ranks": what sums between its processes, or "".
CAPABILITIES: dict[str, dict[str, Any]] = {
    "cpu": {"autocast": ("bf16", "fp16"), "float64": True, "ranks": "gloo"},
    "cuda": {"autocast": ("bf16", "fp16"), "float64": True, "ranks": "nccl"},
    "xpu": {"autocast": ("bf16", "fp16"), "float64": True, "ranks": "xccl"},
    "mps": {"autocast": ("bf16", "fp16"), "float64": False, "ranks": ""},
}
#: What processes of any kind of device tell one another by.
HOST_RANKS = "gloo"


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype for numbers that should not round: float64 where the device has it."""
    return torch.float64 if CAPABILITIES.get(device.type, {}).get("float64", True) else torch.float32


@dataclass(frozen=True)
class Device:
    """One device and what it can do."""

    torch_device: torch.device

    @property
    def kind(self) -> str:
        return self.torch_device.type

    @property
    def autocasts(self) -> tuple[str, ...]:
        """Half precisions that autocast has here."""
        listed: tuple[str, ...] = CAPABILITIES[self.kind]["autocast"]
        if self.kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return tuple(p for p in listed if p != "bf16")
        return listed

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability, such as (8, 0); None on other devices."""
        return torch.cuda.get_device_capability(self.torch_device) if self.kind == "cuda" else None

    @property
    def tf32(self) -> bool:
        """Whether float32 products can be computed in TF32: CUDA from compute capability 8.0 on, and few CPUs."""
        if self.kind == "cpu":
            return cpu_has_tf32()
        return self.capability is not None and self.capability >= TF32_FROM and torch.version.hip is None

    @property
    def fp8(self) -> bool:
        """Whether the chip multiplies 8-bit floats: CUDA from compute capability 8.9 on."""
        return self.capability is not None and self.capability >= FP8_FROM and torch.version.hip is None

    @property
    def precisions(self) -> tuple[str, ...]:
        """What ``precision`` of a recipe may be here; fp8 needs torchao besides."""
        halves = self.autocasts
        return (
            "fp32",
            *(("tf32",) if self.tf32 else ()),
            *halves,
            *(("bf16-pure",) if "bf16" in halves else ()),
            *(("fp8",) if self.fp8 else ()),
        )

    @property
    def exact(self) -> torch.dtype:
        """The dtype for sums that should not round: float64 where the device has it."""
        return exact_dtype(self.torch_device)

    def generators(self) -> list[torch.Generator]:
        """Torch's own generators that kernels on this device draw from; seeding them is all the seeding there is."""
        mine = [torch.default_generator]
        if self.kind == "cuda":
            torch.cuda.init()
            mine.append(torch.cuda.default_generators[self.torch_device.index or 0])
        elif self.kind == "xpu":
            torch.xpu.init()
            mine.append(torch.xpu.default_generators[self.torch_device.index or 0])
        elif self.kind == "mps":
            mine.append(torch.mps._get_default_mps_generator())
        return mine

    @property
    def ranks_backend(self) -> str:
        """The backend of torch.distributed for sums between processes on such devices.

        Raises:
            DeviceError: if there is none.
        """
        named: str = CAPABILITIES[self.kind]["ranks"]
        if not named:
            able = ", ".join(kind for kind, what in CAPABILITIES.items() if what["ranks"])
            raise DeviceError(
                f"Ranks cannot train on {self.kind}.",
                "Torch has no sums between processes there.",
                f"Use one of {able}.",
            )
        return named

    def of_rank(self, local: int) -> Device:
        """The device of this kind for process number ``local`` of this machine; made the current one.

        Raises:
            DeviceError: if there are not so many.
        """
        if self.kind == "cpu":
            return self
        count = torch.accelerator.device_count()
        if local >= count:
            raise DeviceError(
                f"Rank {local} of this machine has no device of its own.",
                f"There are {count} of {self.kind}, counted from 0.",
                f"Start {count} ranks here, or train with device='cpu'.",
            )
        torch.accelerator.set_device_index(local)
        return Device(torch.device(self.kind, local))

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.kind != "cpu":
            torch.accelerator.synchronize(self.torch_device)

    def memory_bytes(self) -> int:
        """All of the device's memory."""
        if self.kind == "cuda":
            return int(torch.cuda.get_device_properties(self.torch_device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def name(self) -> str:
        if self.kind == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        if self.kind == "cpu":
            return _cpu_name()
        return self.kind


def choose(asked: str) -> tuple[Device, str]:
    """The device for ``asked`` ("auto" or a torch device) and the reason.

    Raises:
        DeviceError: if this machine does not have it.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked == "auto":
        if accelerator is not None and accelerator.type in CAPABILITIES:
            index = torch.accelerator.current_device_index()
            return Device(torch.device(accelerator.type, index)), "torch finds this accelerator"
        return Device(torch.device("cpu")), "torch finds no accelerator here"
    try:
        wanted = torch.device(asked)
    except RuntimeError:
        raise _no_device(asked, accelerator) from None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    here = wanted.type == "cpu" or (
        accelerator is not None and wanted.type == accelerator.type and (wanted.index or 0) < count
    )
    if not here or wanted.type not in CAPABILITIES:
        raise _no_device(asked, accelerator)
    return Device(wanted), "asked for"


def _no_device(asked: str, accelerator: torch.device | None) -> DeviceError:
    have = "cpu" if accelerator is None else f"cpu and {torch.accelerator.device_count()} of {accelerator.type}"
    return DeviceError(
        f"device={asked!r} is not on this machine.", f"It has {have}.", "Use device='auto' or one it has."
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts(device: Device) -> dict[str, Any]:
    """What the machine is, as plain data for the plan and the report."""
    return {
        "device": str(device.torch_device),
        "name": device.name(),
        "memory_bytes": device.memory_bytes(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
