"""torch-tpu on a machine without a TPU: its programs are compiled and run by XLA's plugin for the CPU.

For tests, and to write a step down as StableHLO for the TPU's own compiler (``device/aot.py``): nothing is learnt here of how
fast a TPU is, or how its products round. torch-tpu asks for two things that the plugin lacks; both are put in its place before
torch-tpu sees it. Source: PJRT's C interface (``pjrt_c_api.h``), which only ever grows at its end.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
from contextlib import redirect_stderr
from pathlib import Path

from thalweg.core import DeviceError

#: Places of functions in PJRT's table, and where the table begins.
TABLE = 40
CLIENT_CREATE, NUM_OUTPUTS, OUTPUT_MEMORY_KINDS = 10, 44, 47
#: The interface that the places above are those of; later minor versions only append.
MAJOR = 0

Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class _Option(ctypes.Structure):  # PJRT_NamedValue with a 64-bit integer
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("name_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("value", ctypes.c_int64),
        ("value_size", ctypes.c_size_t),
    )


class _Create(ctypes.Structure):  # how PJRT_Client_Create_Args begins
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("options", ctypes.c_void_p),
        ("num_options", ctypes.c_size_t),
    )


class _NumOutputs(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("executable", ctypes.c_void_p),
        ("num", ctypes.c_size_t),
    )


class _Kinds(ctypes.Structure):  # PJRT_Executable_OutputMemoryKinds_Args
    _fields_ = (
        *_NumOutputs._fields_,
        ("kinds", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
    )


_INT64 = 1  # PJRT_NamedValue_kInt64
_kept: list[object] = []  # what the plugin points to


def plugin() -> Path | None:
    """XLA's plugin for the CPU, where the package xla-cpu-pjrt is installed."""
    if importlib.util.find_spec("xla_plugins") is None:
        return None
    spec = importlib.util.find_spec("xla_plugins.xla_cpu_pjrt")
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name("xla_cpu_pjrt.so")
    return path if path is not None and path.exists() else None


def why_not() -> str:
    """Why there can be no simulated TPU here, and what to do; "" where there can."""
    missing = [
        package
        for package, there in (
            ("torch-tpu", importlib.util.find_spec("torch_tpu") is not None),
            ("xla-cpu-pjrt", plugin() is not None),
        )
        if not there
    ]
    return f"{' and '.join(missing)} not installed here (pip install {' '.join(missing)})" if missing else ""


def begin() -> None:
    """Make ``torch.device("tpu")`` a simulated one, for the rest of this process.

    Raises:
        DeviceError: where a package is missing, or the plugin speaks another interface.
    """
    found = plugin()
    if reason := why_not():
        raise DeviceError("A TPU cannot be simulated here.", f"{reason}.", "Install them into this environment.")
    assert found is not None
    os.environ["TPU_LIBRARY_PATH"] = str(found)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    library = ctypes.CDLL(str(found), mode=ctypes.RTLD_LOCAL)
    library.GetPjrtApi.restype = ctypes.c_void_p
    table = library.GetPjrtApi()
    major = ctypes.c_int.from_address(table + 32).value
    if major != MAJOR:
        raise DeviceError(
            f"The plugin {found.name} cannot be used.",
            f"It speaks version {major} of PJRT's interface; {MAJOR} is known here.",
            "Install xla-cpu-pjrt 0.0.1.",
        )
    _kept.append(library)
    _replace(table)
    with redirect_stderr(io.StringIO()):  # it says four lines about itself
        from torch_tpu import _loader

        device = _loader._init_device("tpu")
    import torch

    torch.ones(1, device=device)  # only from here on does torch.accelerator see it


def _place(table: int, number: int) -> ctypes.c_void_p:
    return ctypes.c_void_p.from_address(table + TABLE + 8 * number)


def _replace(table: int) -> None:
    create, count = (Function(_place(table, number).value) for number in (CLIENT_CREATE, NUM_OUTPUTS))

    @Function
    def client_create(address: int) -> int | None:
        """One device; options of a TPU that the plugin would refuse are left out."""
        args = _Create.from_address(address)
        given = args.options, args.num_options
        name = b"cpu_device_count"
        option = _Option(ctypes.sizeof(_Option), None, name, len(name), _INT64, 1, 1)
        args.options, args.num_options = ctypes.addressof(option), 1
        error: int | None = create(address)
        args.options, args.num_options = given
        return error

    @Function
    def output_memory_kinds(address: int) -> int | None:
        """Every output lies in the device's memory."""
        args = _Kinds.from_address(address)
        asked = _NumOutputs(ctypes.sizeof(_NumOutputs), None, args.executable, 0)
        error: int | None = count(ctypes.addressof(asked))
        if error:
            return error
        kinds = (ctypes.c_char_p * max(asked.num, 1))(*[b"device"] * asked.num)
        sizes = (ctypes.c_size_t * max(asked.num, 1))(*[6] * asked.num)
        _kept.append((kinds, sizes))
        args.num, args.kinds, args.sizes = asked.num, ctypes.addressof(kinds), ctypes.addressof(sizes)
        return None

    _kept.extend((create, count, client_create, output_memory_kinds))
    for number, new in ((CLIENT_CREATE, client_create), (OUTPUT_MEMORY_KINDS, output_memory_kinds)):
        _place(table, number).value = ctypes.cast(new, ctypes.c_void_p).value
