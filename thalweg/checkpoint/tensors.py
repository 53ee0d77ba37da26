"""Tensors as a safetensors file, with a digest of each: written and verified in one pass over their bytes.

The format is safetensors' (https://github.com/huggingface/safetensors#format): eight bytes with the length of a header, the
header as JSON, then the tensors' bytes without gaps. Any of its readers can open what is written here. The package's own
writer and reader are not used, because they cannot tell a digest of what passes through them, and reading twice costs the time of
a second reading.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.checkpoint.damage import Damage
from thalweg.checkpoint.files import Write
from thalweg.checkpoint.place import Reading

CHUNK = 4 << 20
_MOST_HEADER = 100 << 20  # as in the package
_MOST_DIMENSIONS = 64
_THREADS = 4  # some wait for the disk while others compute digests

NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of the CPU that lies in one piece."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def fresh(nbytes: int) -> Tensor:
    """Memory of the CPU, as bytes. numpy asks the kernel for large pages, torch does not: filling them is four times as fast."""
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8)) if nbytes else torch.empty(0, dtype=torch.uint8)


def copied(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, in one piece."""
    copy = fresh(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    return copy.copy_(tensor.detach())


def header_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """(the file up to the first tensor's bytes, names in the order of their bytes).

    Raises:
        ValueError: for a dtype that the format has no name for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"'{name}' is {tensor.dtype}, which safetensors has no name for")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    table, at = {}, 0
    for name in order:
        tensor = tensors[name]
        table[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise ValueError(f"the names of {len(order)} tensors take {len(text)} bytes, and the format has {_MOST_HEADER}")
    return len(text).to_bytes(8, "little") + text, order


def write_tensors(write: Write, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file; its row of the manifest: bytes and sha256 of the whole, of the header, and of each tensor.

    Args:
        tensors: on the CPU, each in one piece.
    """
    header, order = header_of(tensors)
    whole, size = hashlib.sha256(header), len(header)
    write(header)
    digests = {}
    for name in order:
        own = hashlib.sha256()
        for chunk in _chunks(raw(tensors[name])):
            write(chunk)
            own.update(chunk)
            whole.update(chunk)
            size += len(chunk)
        digests[name] = own.hexdigest()
    head = hashlib.sha256(header).hexdigest()
    return {"bytes": size, "sha256": whole.hexdigest(), "header": head, "tensors": digests}


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(view), CHUNK):
        yield view[at : at + CHUNK]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
        offsets: where it begins in the whole tensor, if it is a shard of one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    offsets: tuple[int, ...] | None = None


def read_header(file: Reading, sha256: str | None = None) -> list[Entry]:
    """The tensors of a file in the order of their bytes.

    Args:
        sha256: of the file up to the first tensor's bytes; None: it is not known.

    Raises:
        Damage: for anything but a header whose tensors fill the file without gaps; nothing large has been allocated then.
    """
    size = file.size
    if size < 8:
        raise Damage(f"it has {size} bytes, and no header")
    first = bytearray(8)
    file.read_into(0, memoryview(first))
    length = int.from_bytes(first, "little")
    if length > min(size - 8, _MOST_HEADER):
        raise Damage(f"its header claims {length} bytes of {size}, and cannot have its sha256")
    text = bytearray(length)
    file.read_into(8, memoryview(text))
    if sha256 is not None and hashlib.sha256(first + text).hexdigest() != sha256:
        raise Damage("its header does not have the sha256 of its manifest")
    try:
        table = json.loads(text.decode("utf-8"))
        shards = _shards(table.pop("__metadata__", None))
        rows = (_entry(name, row, 8 + length, shards.get(name)) for name, row in table.items())
        entries = sorted(rows, key=lambda entry: (entry.start, entry.stop))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as err:
        raise Damage(f"its header is none: {str(err)[:200]}") from None
    at = 8 + length
    for entry in entries:
        if entry.start != at:
            raise Damage(f"'{entry.name}' begins at byte {entry.start}, not {at}")
        at = entry.stop
    if at != size:
        raise Damage(f"it has {size} bytes, and its header tells of {at}")
    return entries


def _shards(metadata: Any) -> Mapping[str, Any]:
    """What DCP notes of the place of shards: name to a table with their offsets."""
    noted = {} if metadata is None else json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
    if not isinstance(noted, dict):
        raise ValueError("its note on shards is no table")
    return noted


def _entry(name: str, row: Mapping[str, Any], base: int, shard: Any = None) -> Entry:
    dtype, shape, (start, stop) = DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
    if len(shape) > _MOST_DIMENSIONS:  # before their product is taken, which takes long for many
        raise ValueError(f"'{name}' has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, start, stop)):
        raise ValueError(f"'{name}' has no whole numbers for its shape and place")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' of {dtype} {shape} has {stop - start} bytes")
    offsets = None if shard is None else tuple(shard["saved_offsets"])
    if offsets is not None and not (len(offsets) == len(shape) and all(type(n) is int and n >= 0 for n in offsets)):
        raise ValueError(f"'{name}' has no whole numbers for its place in the whole")
    return Entry(name, dtype, tuple(shape), base + start, base + stop, offsets)


def read_tensors(file: Reading, row: Mapping[str, Any]) -> dict[Entry, Tensor]:
    """The tensors of a file, each byte of it compared with its row of the manifest.

    Raises:
        Damage: naming the tensor.
        OSError: if it cannot be read.
    """
    entries = _checked_header(file, row)

    def read(entry: Entry) -> tuple[Entry, Tensor]:
        flat = fresh(entry.stop - entry.start)
        view, sha = flat.numpy().data, hashlib.sha256()
        for at in range(0, len(view), CHUNK):
            part = view[at : at + CHUNK]
            file.read_into(entry.start + at, part)
            sha.update(part)
        _compare(entry.name, sha.hexdigest(), row)
        return entry, flat.view(entry.dtype).reshape(entry.shape)

    with _pool() as pool:
        return dict(pool.map(read, entries))


def describe(file: Reading) -> dict[str, Any]:
    """The row of the manifest for a file that somebody else wrote."""
    entries = read_header(file)
    first = min((entry.start for entry in entries), default=file.size)
    head = bytearray(first)
    file.read_into(0, memoryview(head))
    whole = hashlib.sha256(head)
    digests = {}
    for entry in entries:
        own = hashlib.sha256()
        for part in _parts(file, entry):
            own.update(part)
            whole.update(part)
        digests[entry.name] = own.hexdigest()
    header = hashlib.sha256(head).hexdigest()
    return {"bytes": file.size, "sha256": whole.hexdigest(), "header": header, "tensors": digests}


def _parts(file: Reading, entry: Entry) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, entry.stop - entry.start)))
    for at in range(entry.start, entry.stop, CHUNK):
        part = buffer[: min(CHUNK, entry.stop - at)]
        file.read_into(at, part)
        yield part


def check_tensors(file: Reading, row: Mapping[str, Any]) -> None:
    """The same without keeping anything."""
    entries = _checked_header(file, row)

    def check(entry: Entry) -> None:
        sha = hashlib.sha256()
        for part in _parts(file, entry):
            sha.update(part)
        _compare(entry.name, sha.hexdigest(), row)

    with _pool() as pool:
        list(pool.map(check, entries))


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for one file; after a fault, what has not begun does not begin."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _checked_header(file: Reading, row: Mapping[str, Any]) -> list[Entry]:
    entries = read_header(file, row["header"])
    if {entry.name for entry in entries} != set(row["tensors"]):
        raise Damage("it does not hold the tensors that its manifest names")
    return entries


def _compare(name: str, sha: str, row: Mapping[str, Any]) -> None:
    if row["tensors"][name] != sha:
        raise Damage(f"'{name}' does not have the sha256 of its manifest")


def joined(shards: Iterable[tuple[Entry, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors out of shards from several files.

    Raises:
        Damage: where shards do not fill a tensor.
    """
    parts: dict[str, list[tuple[Entry, Tensor]]] = {}
    for entry, tensor in shards:
        parts.setdefault(entry.name, []).append((entry, tensor))
    found = {}
    for name, mine in parts.items():
        offsets = [entry.offsets or (0,) * len(entry.shape) for entry, _ in mine]
        if len({(entry.dtype, len(entry.shape)) for entry, _ in mine}) > 1:
            raise Damage(f"the shards of '{name}' are of different kinds")
        ends = [[at + n for at, n in zip(o, entry.shape)] for o, (entry, _) in zip(offsets, mine)]
        shape = [max(column) for column in zip(*ends)]
        if math.prod(shape) != sum(math.prod(entry.shape) for entry, _ in mine):
            raise Damage(f"the shards of '{name}' do not fill it")
        found[name] = torch.empty(shape, dtype=mine[0][0].dtype)
        filled = torch.zeros(shape, dtype=torch.bool)
        for start, stop, (_, tensor) in zip(offsets, ends, mine):
            place = tuple(slice(a, b) for a, b in zip(start, stop))
            found[name][place], filled[place] = tensor, True
        if not filled.all():  # as many elements, and some of them twice
            raise Damage(f"the shards of '{name}' do not fill it")
    return found
