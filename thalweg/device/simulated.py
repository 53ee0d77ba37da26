"""torch-tpu on a machine without a TPU: its programs are compiled and run by XLA's plugin for the CPU.

For tests, and to write a step down as StableHLO for the TPU's own compiler (``device/aot.py``): nothing is learnt here of how
fast a TPU is, or how its products round. torch-tpu asks for two things that the plugin lacks; both are put in their place before
torch-tpu sees it. They are C, not Python: threads that compile call them while the main thread waits with Python's lock held.
Source: PJRT's C interface (``pjrt_c_api.h``), which only ever grows at its end.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import shutil
import subprocess
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from thalweg.core import DeviceError

#: What torch calls it.
KIND = "tpu"
#: The major version of PJRT's interface whose places stand below; minor ones only append.
MAJOR = 0

#: Functions lie in PJRT's table from byte 40 on: number 10 makes a client, 44 counts outputs, 47 says where outputs lie.
_SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
typedef void *(*function)(void *);
typedef struct { size_t size; void *extension; const char *name; size_t name_size; int type; int64_t value; size_t num; } option;
typedef struct { size_t size; void *extension; void *options; size_t num; } create_args;
typedef struct { size_t size; void *extension; void *executable; size_t num; } count_args;
typedef struct { size_t size; void *extension; void *executable; size_t num; const char **kinds; size_t *sizes; } kind_args;
static function create, count;
static const char *kinds[65536];
static size_t sizes[65536];

/* One device; the options of a TPU, which the plugin would refuse, are left out. */
static void *client_create(void *given) {
  create_args *args = given;
  void *options = args->options;
  size_t num = args->num;
  option one = {sizeof(option), NULL, "cpu_device_count", 16, 1, 1, 1};
  args->options = &one;
  args->num = 1;
  void *error = create(given);
  args->options = options;
  args->num = num;
  return error;
}

/* Every output lies in the device's memory. */
static void *output_memory_kinds(void *given) {
  kind_args *args = given;
  count_args asked = {sizeof(count_args), NULL, args->executable, 0};
  void *error = count(&asked);
  if (error) return error;
  args->num = asked.num < 65536 ? asked.num : 65536;
  args->kinds = kinds;
  args->sizes = sizes;
  return NULL;
}

void replace(char *table) {
  function *functions = (function *)(table + 40);
  for (int i = 0; i < 65536; i++) {
    kinds[i] = "device";
    sizes[i] = 6;
  }
  create = functions[10];
  count = functions[44];
  functions[10] = client_create;
  functions[47] = output_memory_kinds;
}
"""
_kept: list[object] = []  # what the plugin points to


def plugin() -> Path | None:
    """XLA's plugin for the CPU, where the package xla-cpu-pjrt is installed."""
    if importlib.util.find_spec("xla_plugins") is None:
        return None
    spec = importlib.util.find_spec("xla_plugins.xla_cpu_pjrt")
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name("xla_cpu_pjrt.so")
    return path if path is not None and path.exists() else None


def why_not() -> str:
    """What is missing for a simulated TPU here, and how to get it; "" where nothing is."""
    there = {"torch-tpu": importlib.util.find_spec("torch_tpu") is not None, "xla-cpu-pjrt": plugin() is not None}
    missing = [package for package, found in there.items() if not found]
    if missing:
        return f"{' and '.join(missing)} not installed here: pip install {' '.join(missing)}"
    return "" if _compiler() else "there is no C compiler here (CC, cc, gcc, clang): install one"


def begin() -> None:
    """Make ``torch.device("tpu")`` a simulated one, for the rest of this process. Call it before anything imports torch_tpu.

    Raises:
        DeviceError: where something is missing, or the plugin speaks another interface.
    """
    if reason := why_not():
        raise DeviceError("A TPU cannot be simulated here.", *reason.split(": ", 1))
    found = plugin()
    assert found is not None
    os.environ["TPU_LIBRARY_PATH"] = str(found)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    os.environ.setdefault(
        "NPROC", "16"
    )  # programs wait for one another in threads: as few as two cores have all wait for ever
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
    stand_in = _built()
    stand_in.replace.argtypes = [ctypes.c_void_p]
    stand_in.replace(table)
    _kept.extend((library, stand_in))
    with redirect_stderr(io.StringIO()):  # it says four lines about itself
        from torch_tpu import _loader

        device = _loader._init_device(KIND)
    import torch

    torch.ones(1, device=device)  # only from here on does torch.accelerator see it


def _compiler() -> str | None:
    return next((name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and shutil.which(name)), None)


def _built() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "simulated.so"
        command = [_compiler() or "cc", "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
        built = subprocess.run(command, input=_SOURCE.encode(), capture_output=True)
        if built.returncode:
            raise DeviceError(
                "A TPU cannot be simulated here.",
                f"The C compiler says: {built.stderr.decode().strip()[-300:]}",
                "Name another in CC.",
            )
        return ctypes.CDLL(str(path))
