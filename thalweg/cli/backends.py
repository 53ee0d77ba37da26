"""Which backends torch loads: packages may register themselves with it, and then every ``import torch`` loads them.

torch-tpu takes three seconds of it, on machines without such a chip too. The command line knows what was asked for before it
imports torch, and tells torch to leave them out (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) where none of them can be meant.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
#: Kinds of device that torch has by itself.
_TORCHS = ("cpu", "cuda", "xpu", "mps")
#: Packages by what their entry points name: which vendor's number chips for them have on the PCI bus.
_VENDORS = {"torch_tpu": "0x1ae0"}
#: Set where a library other than the machine's own is to be used: then a chip need not be there.
_ELSEWHERE = ("TPU_LIBRARY_PATH", "PJRT_DEVICE")


def leave_out(asked: Any, pci: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Tell torch to load no backends where that costs something and none is meant; whether it was told.

    What the user has set stays. Packages that are not known here stay too, unless a device of torch's own was asked for.

    Args:
        asked: the arguments of a command.
    """
    if SWITCH in os.environ or _loaded() or not {"task", "device"} & vars(asked).keys():
        return False
    from importlib.metadata import entry_points

    packages = [entry.value.split(":")[0].split(".")[0] for entry in entry_points(group="torch.backends")]
    if not packages:
        return False
    kind = device_asked(asked).split(":")[0]
    if kind not in _TORCHS and (kind != "auto" or not all(_absent(package, pci) for package in packages)):
        return False
    os.environ[SWITCH] = "0"
    return True


def _loaded() -> bool:
    return "torch" in sys.modules


def device_asked(asked: Any) -> str:
    """The device that the words of a command or its recipe file name; "auto" where they do not say."""
    if device := getattr(asked, "device", None):
        return str(device)
    given = [text.partition("=")[2] for text in getattr(asked, "set", None) or () if text.startswith("device=")]
    if given:
        return str(given[-1]).strip("\"' ")
    try:
        tree = tomllib.loads(Path(asked.recipe).read_text(encoding="utf-8")) if asked.recipe else {}
    except (AttributeError, OSError, ValueError):  # what reads it next says so
        return "auto"
    return str(tree.get("device", "auto"))


def _absent(package: str, pci: Path) -> bool:
    """Whether no chip for a package is in this machine, as far as can be told without loading it."""
    return (
        package in _VENDORS and not any(name in os.environ for name in _ELSEWHERE) and not _on(pci, _VENDORS[package])
    )


def _on(pci: Path, vendor: str) -> bool:
    def numbers() -> Iterable[str]:
        for file in pci.glob("*/vendor"):
            try:
                yield file.read_text(encoding="ascii").strip()
            except OSError:
                continue

    return vendor in numbers()
