"""A step compiled for a TPU that is not here, by the TPU's own compiler: what it takes of memory, and how much it computes.

libtpu compiles StableHLO for a topology that it is told, without a device. It is reached through PJRT's C interface, which keeps
the places of what it has and appends what is new; the minor version below is the one that the places were read from
(``pjrt_c_api.h``). Run as a program, in a process of its own: ``python -m thalweg.device.aot tpu-v5e FILE...``.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thalweg.core import DeviceError

#: What brings everything that is needed for it.
EXTRA = "thalweg[tpu-test]"
#: The interface whose places stand below.
MAJOR, MINOR = 0, 81
#: Functions by their places in PJRT's table, which begins after its version.
_TABLE = 40
_PLACES = {"message": 1, "initialize": 3, "cost": 46, "topology": 82, "compile": 89, "memory": 96}
#: One chip of each kind, as libtpu names its topology.
TOPOLOGIES = {
    "tpu-v4": ("v4:2x2x1",),
    "tpu-v5e": ("v5e:1x1", "v5e:2x2"),
    "tpu-v5p": ("v5p:2x2x1",),
    "tpu-v6e": ("v6e:1x1", "v6e:2x2"),
}
#: CompileOptionsProto: executable_build_options(3) { device_ordinal(1) = -1, num_replicas(4) = 1, num_partitions(5) = 1 }
_OPTIONS = b"\x1a\x0f\x08" + b"\xff" * 9 + b"\x01\x20\x01\x28\x01"
_FLOAT = 3  # PJRT_NamedValue_kFloat


def _struct(*fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """A structure of PJRT: its size, what extends it, then ``fields``."""
    return type("Arguments", (ctypes.Structure,), {"_fields_": [("size", c_size_t), ("extension", c_void_p), *fields]})


_Message = _struct(("error", c_void_p), ("text", c_void_p), ("length", c_size_t))
_Nothing = _struct()
_Topology = _struct(
    ("name", c_char_p), ("name_size", c_size_t), ("options", c_void_p), ("num_options", c_size_t), ("made", c_void_p)
)
_Program = _struct(("code", c_char_p), ("code_size", c_size_t), ("format", c_char_p), ("format_size", c_size_t))
_Compile = _struct(
    ("topology", c_void_p),
    ("program", c_void_p),
    ("options", c_char_p),
    ("options_size", c_size_t),
    ("client", c_void_p),
    ("executable", c_void_p),
)
_KINDS = ("code", "arguments", "outputs", "alias", "temporary")
_Memory = _struct(
    ("executable", c_void_p), *((kind, c_int64) for kind in _KINDS), ("host", c_int64 * 5), ("peak", c_int64)
)
_Cost = _struct(("executable", c_void_p), ("num", c_size_t), ("properties", c_void_p))
_Named = _struct(
    ("name", c_void_p),
    ("name_size", c_size_t),
    ("type", c_int),
    ("gap", c_int),
    ("value", c_float),
    ("rest", c_float),
    ("num", c_size_t),
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program.

    Attributes:
        peak, arguments, outputs, temporary: bytes of the chip's memory; nothing is donated, so outputs are besides arguments.
        flops: floating-point operations; accessed: bytes that go between the chip and its memory.
        seconds: that compiling took.
        compiler: its name and version.
    """

    peak: int
    arguments: int
    outputs: int
    temporary: int
    flops: float
    accessed: float
    seconds: float
    compiler: str


def library() -> Path | None:
    """libtpu, where its package is installed."""
    spec = importlib.util.find_spec("libtpu")
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name("libtpu.so")
    return path if path is not None and path.exists() else None


def why_not(chip: str) -> str:
    """Why nothing can be compiled for ``chip`` here, and what to do; "" where it can."""
    if chip not in TOPOLOGIES:
        return f"libtpu is asked for {', '.join(TOPOLOGIES)} alone"
    return "" if library() else "libtpu is not installed here: pip install libtpu"


class Compiler:
    """libtpu for one kind of chip.

    Raises:
        DeviceError: where libtpu is missing, speaks an interface that is not known, or does not know the chip.
    """

    def __init__(self, chip: str) -> None:
        path = library()
        if path is None or chip not in TOPOLOGIES:
            raise DeviceError(f"Nothing can be compiled for {chip} here.", f"{why_not(chip)}.", "Plan without it.")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask about itself
        library_ = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        library_.GetPjrtApi.restype = c_void_p
        self._table = library_.GetPjrtApi()
        major, minor = (c_int.from_address(self._table + at).value for at in (32, 36))
        if major != MAJOR or minor < MINOR:
            raise DeviceError(
                "This libtpu cannot be asked.",
                f"It speaks version {major}.{minor} of PJRT's interface; {MAJOR}.{MINOR} and later minor ones are known here.",
                "Install libtpu 0.0.52.",
            )
        self.version = f"libtpu {importlib.metadata.version('libtpu')}"
        self._call("initialize", _Nothing())
        self._topology = self._topology_of(chip)

    def _topology_of(self, chip: str) -> int:
        refused = None
        for name in TOPOLOGIES[chip]:
            try:
                made = self._call("topology", _Topology(name=name.encode(), name_size=len(name)))
                return int(made.made)
            except DeviceError as err:
                refused = err
        assert refused is not None
        raise refused

    def compile(self, code: bytes) -> Compiled:
        """Compile StableHLO, as text or bytecode.

        Raises:
            DeviceError: with the compiler's own words.
        """
        program = _Program(code=code, code_size=len(code), format=b"mlir", format_size=4)
        program.size = ctypes.sizeof(program)
        begun = time.perf_counter()
        made = self._call(
            "compile",
            _Compile(
                topology=self._topology,
                program=ctypes.addressof(program),
                options=_OPTIONS,
                options_size=len(_OPTIONS),
            ),
        ).executable
        seconds = time.perf_counter() - begun
        memory, cost = self._call("memory", _Memory(executable=made)), self._cost(made)
        return Compiled(
            peak=memory.peak or memory.arguments + memory.outputs + memory.temporary - memory.alias,
            arguments=memory.arguments,
            outputs=memory.outputs,
            temporary=memory.temporary,
            flops=cost.get("flops", 0.0),
            accessed=cost.get("bytes accessed", 0.0),
            seconds=seconds,
            compiler=self.version,
        )

    def _cost(self, executable: int) -> dict[str, float]:
        found = self._call("cost", _Cost(executable=executable))
        properties = (_Named * found.num).from_address(found.properties) if found.num else ()
        return {ctypes.string_at(p.name, p.name_size).decode(): p.value for p in properties if p.type == _FLOAT}

    def _call(self, what: str, args: Any) -> Any:
        args.size = ctypes.sizeof(args)
        error = self._function(what, c_void_p)(ctypes.addressof(args))
        if error:
            told = _Message(error=error)
            told.size = ctypes.sizeof(told)
            self._function("message", None)(ctypes.addressof(told))
            words = ctypes.string_at(told.text, told.length).decode(errors="replace")
            raise DeviceError(f"The TPU's compiler refused ({what}).", words.strip()[:600], "Plan without it.")
        return args

    def _function(self, what: str, result: Any) -> Any:
        place = c_void_p.from_address(self._table + _TABLE + 8 * _PLACES[what])
        return ctypes.CFUNCTYPE(result, c_void_p)(place.value or 0)


def main(chip: str, *files: str) -> None:
    """One line of JSON: what the compiler says of each file, or {"refused": why}."""
    try:
        compiler = Compiler(chip)
        print(json.dumps([asdict(compiler.compile(Path(file).read_bytes())) for file in files]))
    except DeviceError as err:
        print(json.dumps({"refused": " ".join(str(err).split())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
