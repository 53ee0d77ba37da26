"""The only room that names a backend. All else asks a ``Device`` what it can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thalweg.core import DeviceError, did_you_mean
from thalweg.device import accelerator
from thalweg.device.capabilities import KNOWN, PACKAGES, Capabilities
from thalweg.device.chips import chip_here
from thalweg.device.move import move
from thalweg.device.probes import capabilities_of
from thalweg.device.products import TOLD, cpu_has_tf32
from thalweg.device.silent import mend, untrainable_in_graphs

#: Compute capabilities of CUDA that the formats begin with.
TF32_FROM, FP8_FROM = (8, 0), (8, 9)
#: What a GPU must be for a precision.
_NEEDS = {
    "tf32": "TF32 needs an NVIDIA GPU of compute capability 8.0 or more (Ampere)",
    "bf16": "bfloat16 products need an NVIDIA GPU of compute capability 8.0 or more (Ampere)",
    "bf16-pure": "bfloat16 products need an NVIDIA GPU of compute capability 8.0 or more (Ampere)",
    "fp8": "8-bit products need an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper)",
}

#: What a backend of ``torch.compile`` is to be told. torch-tpu 0.2.0 would otherwise keep what it compiled under a key that does
#: not have the precision of float32 products in it, and give it out where another was asked for (seen in its StableHLO).
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"serializable": False}}

#: What processes of any kind of device tell one another by.
HOST_RANKS = "gloo"


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype for numbers that should not round: float64 where the device has it."""
    return torch.float64 if device.type == "meta" or capabilities_of(device).float64 else torch.float32


@dataclass(frozen=True)
class Device:
    """One device and what it can do."""

    torch_device: torch.device

    @property
    def kind(self) -> str:
        return self.torch_device.type

    @property
    def capabilities(self) -> Capabilities:
        """What it can do: known of its kind, and else tried."""
        return capabilities_of(self.torch_device)

    @property
    def is_host(self) -> bool:
        """Whether it is the CPU, whose memory holds all that is nowhere else."""
        return self.kind == "cpu"

    @property
    def autocasts(self) -> tuple[str, ...]:
        """Half precisions that autocast has here, and that training can use."""
        can = self.capabilities
        return tuple(half for half in can.autocasts if half != "fp16" or can.scales_fp16)

    @property
    def graph_kind(self) -> str:
        """How work gets there: "cpu", "eager" (operator by operator) or "graph" (compiled before it runs)."""
        return self.capabilities.graph_kind

    @property
    def static_shapes(self) -> bool:
        """Whether each new shape costs a compilation."""
        return self.capabilities.static_shapes

    @property
    def compile_backend(self) -> str | None:
        """What ``torch.compile`` is to be told; None where nothing is known to compile for it."""
        return self.capabilities.compile_backend

    @property
    def compile_options(self) -> dict[str, Any]:
        """What the backend of ``torch.compile`` is to be told besides."""
        return dict(COMPILE_OPTIONS.get(self.kind, {}))

    def against_graphs(self, model: nn.Module) -> str:
        """Why ``model`` cannot be trained in a compiled graph here, tried on the device; "" where it can."""
        return untrainable_in_graphs(model, self.torch_device, self.compile_backend)

    @property
    def pins(self) -> bool:
        """Whether copies from pinned memory of the host run by themselves."""
        return self.capabilities.pins

    @property
    def captures_graphs(self) -> bool:
        """Whether a step that was run once can be replayed as one."""
        return self.capabilities.captures_graphs

    @property
    def scales_fp16(self) -> bool:
        """Whether the loss can be scaled here, without which fp16 loses small gradients."""
        return self.capabilities.scales_fp16

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

    def why_not(self, precision: str) -> str:
        """A sentence on why a precision is not possible here, with a space behind it; empty where there is no more to say."""
        at = self.capability
        if precision in ("tf32", "fp8") or (at is not None and precision in _NEEDS):
            return f"{_NEEDS[precision]}; {self.torch_device}" + (f" has {at[0]}.{at[1]}. " if at else " is none. ")
        if precision == "fp16" and not self.scales_fp16:
            return "fp16 loses small gradients unless the loss is scaled, and torch does not scale it there. "
        return ""

    @property
    def exact(self) -> torch.dtype:
        """The dtype for sums that should not round: float64 where the device has it."""
        return exact_dtype(self.torch_device)

    def generators(self) -> list[Any]:
        """What kernels on this device draw from, the host's first: each has ``manual_seed``, ``get_state``, ``set_state``."""
        return [torch.default_generator, *accelerator.generators(self.torch_device)]

    def move(self, model: nn.Module) -> nn.Module:
        """``model`` on this device, with the parameters that it has now: ties and optimizers keep them.

        Raises:
            DeviceError: if the device cannot keep them.
        """
        return move(model, self.torch_device)

    def mend(self, model: nn.Module) -> list[tuple[str, str, str]]:
        """Operators without effect here that the model may use get a stand-in.

        Returns:
            (what, how, why) of all that is computed in another way here than torch's backend would by itself.
        """
        products = [("float32 products", *TOLD[self.kind])] if self.kind in TOLD else []
        return products + [(f"operator {name}", "replaced", what) for name, what in mend(model, self.torch_device)]

    @property
    def ranks_backend(self) -> str:
        """The backend of torch.distributed for sums between processes on such devices.

        Raises:
            DeviceError: if there is none.
        """
        named = self.capabilities.ranks_backend
        if not named:
            able = ", ".join(kind for kind, what in KNOWN.items() if what.get("ranks_backend"))
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
        count = accelerator.count(self.kind)
        if local >= count:
            raise DeviceError(
                f"Rank {local} of this machine has no device of its own.",
                f"There are {count} of {self.kind}, counted from 0.",
                f"Start {count} ranks here, or train with device='cpu'.",
            )
        mine = Device(torch.device(self.kind, local))
        accelerator.use(mine.torch_device)
        return mine

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        accelerator.synchronize(self.torch_device)

    def memory_bytes(self) -> int:
        """All of the device's memory; 0 where it does not say."""
        if self.kind in ("cpu", "mps"):  # one memory for both
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return accelerator.memory_of(self.torch_device)[1]

    def name(self) -> str:
        return _cpu_name() if self.kind == "cpu" else accelerator.name(self.torch_device)


def choose(asked: str) -> tuple[Device, str]:
    """The device for ``asked`` ("auto" or a torch device) and the reason.

    Raises:
        DeviceError: if this machine does not have it.
    """
    here = accelerator.current()
    if asked == "auto":
        if here is None:
            return Device(torch.device("cpu")), "torch finds no accelerator here"
        found = Device(torch.device(here, accelerator.index()))
        if not found.capabilities.views:
            return Device(torch.device("cpu")), f"torch finds {here}, which has no parameters that are views"
        return found, "torch finds this accelerator"
    try:
        wanted = torch.device(asked)
    except RuntimeError:
        raise _no_device(asked, here) from None
    if wanted.type != "cpu" and (wanted.index or 0) >= accelerator.count(wanted.type):
        raise _no_device(asked, here)
    if not Device(wanted).capabilities.views:
        raise DeviceError(
            f"device={asked!r} cannot train here.",
            "A parameter cannot be a view of a flat buffer there, which is how parameters lie here.",
            "Use device='cpu'.",
        )
    return Device(wanted), "asked for"


def _no_device(asked: str, here: str | None) -> DeviceError:
    have = "cpu" if here is None else f"cpu and {accelerator.count(here)} of {here}"
    kind = asked.split(":")[0]
    kinds = sorted({*KNOWN, "auto", *([here] if here else [])})
    if kind not in kinds:
        return DeviceError(f"device={asked!r} is not known.", f"This machine has {have}.", did_you_mean(kind, kinds))
    return DeviceError(
        f"device={asked!r} is not on this machine.",
        f"It has {have}.{_unknown(kind)}",
        "Use device='auto' or one it has.",
    )


def _unknown(kind: str) -> str:
    """Why torch does not know a kind of device that a package brings; empty where it does."""
    package = PACKAGES.get(kind)
    if package is None or accelerator.registered() == kind:
        return ""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f" Torch knows no {kind}: the package {package} is not installed."
    why = (
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"
        else "it finds no chip"
    )
    return f" Torch knows no {kind}: {package} is installed and did not register it ({why})."


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts(device: Device, precision: str = "") -> dict[str, Any]:
    """What the machine is, as plain data for the plan and the report.

    Args:
        precision: of a recipe: where a data sheet of the chip is known, the operations a second that it states are told.
    """
    name, size = device.name(), device.memory_bytes()
    chip = None if device.is_host else chip_here(name, size)
    wanted = {"bf16-pure": "bf16"}.get(precision, precision)
    stated = {} if chip is None or wanted not in chip.rates else {"chip": chip.name, "peak_flops": chip.rates[wanted]}
    return {
        "device": str(device.torch_device),
        "name": name,
        "memory_bytes": size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **stated,
    }
