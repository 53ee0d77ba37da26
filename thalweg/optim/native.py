"""C kernels on the CPU: compiled once by the machine's own compiler, in tenths of a second, kept on disk, called on pointers.

Inductor needs ten seconds for its first kernel, and takes a power and a root for each element where they depend on the
step alone (LOG.md); here uniform values are computed once, whole lists of tensors are one call, and sums over rows, columns
and parameters need no temporary tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, is_dense, laid_like, matrix_shape, offsets
from thalweg.optim.codecs import BLOCK
from thalweg.optim.csource import TILE, Port, Source, write_source
from thalweg.optim.eager import Extra, Kernel, eager
from thalweg.optim.program import Program
from thalweg.optim.trace import WHOLE, Inputs, Trace, Untraceable, described, record

#: No contraction to fused multiply-add and no fast maths: results are those of the eager way but for the order of sums.
_FLAGS = ("-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv")
_NATIVE = ("-march=native", "-mprefer-vector-width=512")


class NoCompiler(Exception):
    """This machine cannot build a kernel."""


@cache
def compiler() -> tuple[str, ...] | None:
    """The C compiler and the flags that it takes, or None."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            for extra in (_NATIVE, _NATIVE[:1], ()):
                command = (name, *_FLAGS, *extra)
                tried = subprocess.run(
                    [*command, "-x", "c", "-c", "-", "-o", os.devnull],
                    input=b"#include <omp.h>\nint f(void) { return omp_get_max_threads(); }\n",
                    capture_output=True,
                )
                if tried.returncode == 0:
                    return command
    return None


def compiler_or_raise() -> tuple[str, ...]:
    """``compiler``.

    Raises:
        NoCompiler: if there is none.
    """
    command = compiler()
    if command is None:
        raise NoCompiler("no C compiler with OpenMP was found (CC, cc, gcc, clang)")
    return command


def cache_folder() -> Path:
    """Where kernels are kept: ``THALWEG_CACHE``, or the user's cache folder."""
    given = os.environ.get("THALWEG_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "thalweg" / "kernels"


@cache
def _machine() -> str:
    """What a kernel depends on besides its source: a kernel for one processor may crash on another."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    command = compiler() or ()
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout if command else ""
    return "\n".join((platform.machine(), flags, version, *command))


@cache
def load(text: str) -> Any:
    """The C function ``run`` of a source, from the cache or built now.

    Raises:
        NoCompiler: with the compiler's own words.
    """
    command = compiler_or_raise()
    name = hashlib.sha256((text + _machine()).encode()).hexdigest()[:32]
    folder = cache_folder()
    library = folder / f"{name}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _build(text, library, command)
        run = ctypes.CDLL(str(library)).run
    except OSError:  # a read-only home, or a file that another machine left: build where nobody else looks
        with tempfile.TemporaryDirectory() as private:
            library = Path(private) / "kernel.so"
            _build(text, library, command)
            run = ctypes.CDLL(str(library)).run
    run.restype = None
    run.argtypes = [ctypes.c_int64] + [ctypes.c_void_p] * 9 + [ctypes.c_int]
    return run


def _build(text: str, library: Path, command: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        code, made, linked = Path(folder) / "kernel.c", Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        code.write_text(text, encoding="utf-8")
        built = subprocess.run([*command, "-c", str(code), "-o", str(made)], capture_output=True, text=True)
        if built.returncode:
            raise NoCompiler(built.stderr.strip()[-500:])
        # Linked without OpenMP at first: its functions are then those of the library that torch has loaded, and both
        # share one crew of threads. Two crews would wait for each other's cores.
        for extra in ([], ["-fopenmp"]):
            subprocess.run([command[0], "-shared", str(made), "-o", str(linked), "-lm", *extra], check=True)
            if extra or _loads(linked):
                break
        os.replace(linked, library)


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOW)
    except OSError:
        return False
    return True


def native(program: Program, *, grad_dtype: torch.dtype | None = None, due: int = 0, ndim: int = 2) -> Kernel:
    """A kernel of compiled C for parameters on the CPU.

    Raises:
        Untraceable: for a program that is more than arithmetic on elements, rows and columns.
        NoCompiler: where it cannot be built.
    """
    inputs, function = described(program, grad_dtype or program.dtype, due=due, ndim=ndim)
    trace, ports = record(function, inputs), ports_of(inputs)
    if any(node.op == WHOLE for node in trace.nodes):
        raise Untraceable("it works on whole matrices")
    outputs: list[str | None] = ["p", *(part.name for part in program.parts)]
    matrices = program.folds
    width = BLOCK if program.blocked else None if matrices else TILE
    caller = Caller(
        trace, ports, write_source(trace, ports, outputs, width=width, clears="g" if program.clear else None)
    )
    uniform = {part.name: i for i, part in enumerate(program.parts) if part.shape == "uniform"}
    stored = [i for i, part in enumerate(program.parts) if part.shape != "uniform"]

    def kernel(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        numbers = {**scalars, **{name: batch.slots[i][0] for name, i in uniform.items()}}
        gs = laid_like(batch.gs, batch.ps)
        columns = [batch.ps, gs, *(batch.slots[i] for i in stored)]
        given = extra or {}
        columns += [laid_like(given[name], batch.ps) if name in given else batch.gs for name in program.tensors]
        shapes = [matrix_shape(p.shape, batch.fold(i)) for i, p in enumerate(batch.ps)] if matrices else None
        caller(columns, numbers, shapes=shapes, firsts=list(offsets(batch)) if program.random else None)
        if program.clear:
            for g, laid in zip(batch.gs, gs):
                if g is not laid:
                    g.zero_()

    return kernel


def ports_of(inputs: Inputs) -> list[Port]:
    """The tensors of each parameter among what a program reads; the kernel counts "index" itself."""
    return [Port(name, *kind) for name, kind in inputs.items() if kind[0] != "uniform" and name != "index"]


def native_by_ndim(program: Program) -> Kernel:
    """``native`` for parameters of any number of dimensions, any dtype of gradient, due or not: built when first met.

    One is built at once, so that what cannot be compiled is known now.
    """
    built: dict[tuple[Any, ...], Kernel] = {}
    by_ndim = any("ndim" in piece.component.needs for piece in program.pieces)

    def kernel_for(dtype: torch.dtype, ndim: int, due: int) -> Kernel:
        key = (dtype, ndim if by_ndim else 2, due if program.needs_due else 0)
        if key not in built:
            built[key] = native(program, grad_dtype=key[0], ndim=key[1], due=key[2])
        return built[key]

    def fits(batch: Batch, i: int) -> bool:
        """Whether a parameter lies in memory as the kernel walks it, and is one matrix where whole parameters are summed."""
        p = batch.ps[i]
        lies = p.is_contiguous() if program.folds else is_dense(p) or not p.numel()
        return lies and (not program.folds or program.stacks or len(matrix_shape(p.shape, batch.fold(i))) == 2)

    kernel_for(program.dtype, 2, 0)
    by_hand = eager(program)

    def kernel(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        kinds = [
            (g.dtype, p.ndim if by_ndim else 2, fits(batch, i)) for i, (p, g) in enumerate(zip(batch.ps, batch.gs))
        ]
        for kind in dict.fromkeys(kinds):
            mine = [i for i, other in enumerate(kinds) if other == kind]
            part = batch if len(mine) == len(kinds) else batch.take(program, mine)
            more = None if extra is None else {name: [tensors[i] for i in mine] for name, tensors in extra.items()}
            run = kernel_for(kind[0], kind[1], due) if kind[2] else by_hand
            run(part, scalars, due=due, extra=more)
        if len(set(kinds)) > 1:
            batch.adopt_uniform(program)

    return kernel


def native_sums(function: Callable[..., Sequence[Tensor]], inputs: Inputs, num: int) -> Caller:
    """A caller that adds ``function``'s results, ``num`` sums over elements, up over lists of tensors."""
    trace = record(function, inputs)
    ports = ports_of(inputs)
    return Caller(trace, ports, write_source(trace, ports, [None] * num, width=TILE, sums=num), sums=num)


class Caller:
    """Hands tensors to a compiled kernel.

    Args:
        ports: the tensors of each parameter, in the order of the columns that are handed over.
        sums: how many numbers it gives back.
    """

    def __init__(self, trace: Trace, ports: Sequence[Port], written: Source, *, sums: int = 0) -> None:
        self.run, self.source, self.ports = load(written.text), written, ports
        self.dtypes = [trace.inputs[name].dtype for name in written.scalars]
        self.numbers = [torch.zeros((), dtype=dtype) for dtype in self.dtypes]
        self.sums = torch.zeros(sums, dtype=torch.float64)
        self._scratch = torch.empty(0, dtype=torch.float64)

    def __call__(
        self,
        columns: Sequence[Sequence[Tensor]],
        scalars: Mapping[str, Any],
        *,
        shapes: Any = None,
        firsts: Sequence[int] | None = None,
    ) -> Tensor:
        """Run on ``columns``: for each port, a tensor of each parameter.

        Args:
            scalars: 0-dim tensors by name, and perhaps "skipped".
            shapes: (..., R, C) of each parameter, where the kernel works by rows and columns.
            firsts: number of the first element of each parameter, where the kernel draws random bits.
        """
        pointers = [[x.data_ptr() for x in column] for column in columns]
        if shapes is None:
            sizes = rows = extents = [x.numel() for x in columns[0]]
        else:
            pointers, rows, extents = self._matrices(columns, pointers, shapes)
            sizes = [r * c for r, c in zip(rows, extents)]
            if firsts is not None:
                num_of = [math.prod(shape[:-2]) for shape in shapes]
                firsts = [f + k * math.prod(s[-2:]) for f, s, n in zip(firsts, shapes, num_of) for k in range(n)]
        num, total = len(sizes), sum(sizes)
        flattened = [pointer for group in zip(*pointers) for pointer in group]
        threads = torch.get_num_threads() if total > 1 << 15 else 1
        given = [self._scalar(i, scalars[name]) for i, name in enumerate(self.source.scalars)]
        skipped = scalars.get("skipped")
        stop = None if skipped is None else skipped.to(torch.float64)
        numbers = ctypes.c_int64 * num
        self.run(
            num,
            numbers(*rows),
            numbers(*extents),
            numbers(*sizes),
            numbers(*(firsts or ())),
            (ctypes.c_void_p * len(flattened))(*flattened),
            (ctypes.c_void_p * len(given))(*(x.data_ptr() for x in given)),
            None if stop is None else stop.data_ptr(),
            self.sums.data_ptr(),
            self._room(sizes, rows if shapes is not None else None, extents, threads),
            threads,
        )
        return self.sums

    def _scalar(self, i: int, number: Any) -> Tensor:
        """A 0-dim tensor of the dtype that the kernel was built for; a Python number is put where it stays."""
        if isinstance(number, Tensor):
            return number.to(self.dtypes[i])
        self.numbers[i].fill_(number)
        return self.numbers[i]

    def _matrices(self, columns: Any, pointers: Any, shapes: Any) -> tuple[list[list[int]], list[int], list[int]]:
        """Batches of matrices become matrices: a row of pointers for each."""
        found: list[list[int]] = [[] for _ in columns]
        rows, extents = [], []
        for i, shape in enumerate(shapes):
            *batch, r, c = shape
            per = {"full": r * c, "row": r, "column": c, "tensor": 1}
            for k in range(math.prod(batch)):
                rows.append(r)
                extents.append(c)
                for place, (port, column) in enumerate(zip(self.ports, columns)):
                    found[place].append(pointers[place][i] + k * per[port.kind] * column[i].element_size())
        return found, rows, extents

    def _room(self, sizes: Sequence[int], rows: Sequence[int] | None, extents: Sequence[int], threads: int) -> int:
        """Scratch memory, kept between calls."""
        source = self.source
        walked = (
            [-(-size // BLOCK) for size in sizes] if rows is None else list(rows)
        )  # BLOCK: the shortest row there is
        longest = sum(walked) if source.flat else max(walked, default=0)
        need = longest * source.per_row + max(extents, default=0) * source.per_column * (threads + 1)
        if source.per_row + source.per_column and self._scratch.numel() < need:
            self._scratch = torch.empty(need, dtype=torch.float64)
        return self._scratch.data_ptr()
