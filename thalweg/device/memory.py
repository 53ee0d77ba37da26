"""Bytes: in use, at most since a mark, still to be had; on every kind of device."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

from thalweg.core import DeviceError
from thalweg.device import accelerator
from thalweg.device.backend import Device

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def in_use(device: Device) -> int:
    """Bytes taken now: on a CPU by the whole process (resident set), elsewhere by tensors in torch's allocator.

    0 where the device does not say.
    """
    if device.kind == "cpu":
        status = _status()
        return status["VmRSS"] if "VmRSS" in status else _most_ever()
    if device.kind == "mps":
        return int(torch.mps.current_allocated_memory())
    return int(torch.accelerator.memory_allocated(device.torch_device)) if device.capabilities.measures_memory else 0


def peak(device: Device) -> int | None:
    """The most bytes that were in use since ``reset_peak``; None where the system does not say.

    Where the mark of a process cannot be reset (macOS, some containers), it is the most since the process began.
    """
    if device.kind == "cpu":
        status = _status()
        return status["VmHWM"] if "VmHWM" in status else _most_ever()
    if device.kind == "mps" or not device.capabilities.measures_memory:
        return None
    return int(torch.accelerator.max_memory_allocated(device.torch_device))


def reset_peak(device: Device) -> bool:
    """Let ``peak`` begin from what is in use now; False where that cannot be."""
    if device.kind == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return True
    if device.kind == "mps" or not device.capabilities.measures_memory:
        return False
    torch.accelerator.reset_peak_memory_stats(device.torch_device)
    return True


def release(device: Device, *, cycles: bool = False) -> None:
    """Give back to the system what was freed and is only kept in case it is needed again.

    Args:
        cycles: first let Python look for objects that hold each other, a few tenths of a second.
    """
    if cycles:
        gc.collect()
    if device.kind == "cpu":
        trim = getattr(_libc(), "malloc_trim", None) if sys.platform == "linux" else None  # glibc has it
        if trim is not None:
            trim(0)
    elif device.kind == "mps":
        torch.mps.empty_cache()
    elif device.capabilities.measures_memory:
        torch.accelerator.empty_cache()


def there(device: Device) -> int:
    """Bytes that this process may have on the device: those in use and those still to be had.

    Raises:
        DeviceError: if the device does not say, and nobody else did.
    """
    left = available(device)
    if left is None:
        raise DeviceError(
            f"How much memory {device.torch_device} has is not known.",
            "Its backend does not say, and a plan within what is there was asked for.",
            "Say it: memory_budget='16GiB' in the recipe, or --device-memory 16GiB for a plan.",
        )
    return in_use(device) + left


def available(device: Device) -> int | None:
    """Bytes that this process may still take on the device.

    On a CPU the least of: what the system has without swapping, what the process's control groups leave it, and its limits of
    address space and data (``ulimit -v``, ``-d``). Elsewhere what is free on the device and what torch's allocator holds
    unused. None where the device does not say.
    """
    if device.kind == "cpu":
        return max(0, min([_system_free(), *_group_free(), *_limits_free()]))
    if device.kind == "mps":
        return max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory()))
    at = device.torch_device
    free, whole = accelerator.memory_of(at)
    if not whole:
        return None
    can = device.capabilities.measures_memory
    held = torch.accelerator.memory_reserved(at) - torch.accelerator.memory_allocated(at) if can else 0
    return free + held


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes; empty where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in found}


def _most_ever() -> int:
    """The largest resident set since the process began; macOS tells bytes, others KiB."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _system_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return _PAGE * os.sysconf("SC_PHYS_PAGES") - in_use(Device(torch.device("cpu")))


def _group_free(groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[int]:
    """What each control group around this process leaves it: versions 1 and 2, from the inside out.

    Pages of files that the kernel can drop count as free.
    """
    try:
        lines = Path(groups).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            top, limit, usage, dropped = Path(root), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = Path(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file"
        else:
            continue
        place = top / inside.lstrip("/")
        for folder in (place, *place.parents):  # in a container the path may not be there, but its top is
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None and most < 1 << 60:
                found.append(most - used + _stat(folder / "memory.stat", dropped))
            if folder == top:
                break
    return found


def _number(file: Path) -> int | None:
    """The number in a file; None without one, or where it says "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _stat(file: Path, name: str) -> int:
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError:
        return 0
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


def _limits_free() -> list[int]:
    """What limits of address space and data leave."""
    try:
        import resource
    except ImportError:
        return []
    status = _status()
    found = []
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in status:
            found.append(most - status[used])
    return found


#: From here on a block has pages of its own, which go back to the system when it is freed (glibc's DEFAULT_MMAP_THRESHOLD_MAX).
_OWN_PAGES = 32 << 20
_HEAP_LEAST, _HEAP_PART = 64 << 20, 0.3


def lost_in_heap(device: Device, live: int) -> int:
    """Bytes that the C library's heap holds in holes between blocks, of which at most ``live`` are in use at once.

    Small blocks that live long keep holes open beside them, and glibc puts blocks of up to 32 MiB into its heap once such a
    block was freed. What that loses was measured over convolutional nets and transformers of 5 to 400 MiB: as much as is in
    use, up to 64 MiB, and 0.2 to 0.5 of it beyond. Accelerators' allocators count tensors alone.
    """
    if device.kind != "cpu":
        return 0
    return max(min(live, _HEAP_LEAST), round(_HEAP_PART * live))


def widened_by_steps(device: Device, seen: int) -> int:
    """Bytes that holes in the C library's heap grow by while steps repeat, where the first pass took ``seen``.

    Measured over 20 steps of convolutional nets and transformers (benchmarks/results/memory.json): about 8 MiB and 8 %.
    """
    return (8 << 20) + round(0.08 * seen) if device.kind == "cpu" else 0


def in_heap(nbytes: int) -> bool:
    """Whether a block of so many bytes may lie in the C library's heap."""
    return nbytes < _OWN_PAGES
