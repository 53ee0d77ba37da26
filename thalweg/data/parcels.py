"""A batch on its way from a worker: one piece of shared memory, which stays whole whatever becomes of the worker.

Tensors and arrays lie in it beside each other, and the receiver sees them where they lie; the rest is pickled behind them.
``torch.multiprocessing`` leaves tensors with the sender instead, until the receiver has asked for each: a batch is lost with a
worker that is killed just after it has sent it, and a receiver waits for ever for one that hangs. The memory has no name, so
none is left over, and no limit of /dev/shm counts.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.core import DataError

_HEADER = struct.Struct("<QQ")  # where the pickle begins, where it ends
_ALIGNED = 64


def send(link: socket.socket, value: Any) -> None:
    """Send a value through a socket of this machine.

    Raises:
        Exception: of whatever kind, before anything is sent, for what cannot be pickled.
    """
    packed = io.BytesIO()
    packer = _Packer(packed)
    packer.dump(value)
    tail = pickle.dumps((packed.getvalue(), packer.buffers))
    begin, end = packer.size, packer.size + len(tail)
    fd = _memory()
    try:
        whole = _seen(fd, end)
        for place, part in [*packer.parts, (begin, torch.frombuffer(bytearray(tail), dtype=torch.uint8))]:
            whole[place : place + part.numel()].copy_(part)
        socket.send_fds(link, [_HEADER.pack(begin, end)], [fd])
    finally:
        os.close(fd)


def receive(link: socket.socket) -> Any:
    """The next value.

    Raises:
        EOFError: if the sender has ended.
        DataError: if this process may open no more files.
    """
    header, fds, flags, _ = socket.recv_fds(link, _HEADER.size, 1, socket.MSG_WAITALL)
    if flags & socket.MSG_CTRUNC:
        raise _too_many("The kernel cut off the descriptor of its memory")
    if len(header) < _HEADER.size or not fds:
        raise EOFError("the sender has ended")
    begin, end = _HEADER.unpack(header)
    try:
        whole = _seen(fds[0], end)
    except RuntimeError as err:
        raise _too_many(f"Its memory cannot be opened: {str(err).splitlines()[0][:200]}") from err
    finally:
        os.close(fds[0])
    packed, buffers = pickle.loads(bytes(whole[begin:].numpy()))
    parts = [whole[place : place + size].numpy() for place, size in buffers]
    return _Unpacker(io.BytesIO(packed), whole, parts).load()


def _too_many(what: str) -> DataError:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return DataError(
        "A batch of a data worker cannot be taken.",
        f"{what}; this process may have {most} files open.",
        "Raise that limit (ulimit -n), or see what keeps so many files open.",
    )


class _Packer(pickle.Pickler):
    """Sets tensors and large buffers aside, each with its place."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._set_buffer_aside)
        self.parts: list[tuple[int, Tensor]] = []
        self.buffers: list[tuple[int, int]] = []
        self.size = 0
        self.told: dict[int, tuple[Any, ...]] = {}  # by id
        self.kept: list[Tensor] = []  # so that no id comes twice

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or value.device.type != "cpu" or value.layout != torch.strided:
            return None
        if value.is_nested:
            raise TypeError("nested tensors of this layout cannot be sent between processes; of torch.jagged they can")
        if id(value) in self.told:  # what is one tensor here is one there
            return self.told[id(value)]
        if value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return None
        dense = (
            value if value.is_contiguous() else value.clone()
        )  # keeps the order of its strides, such as channels_last
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        place = self._set_aside(flat)
        told = (len(self.told), place, flat.numel(), value.dtype, tuple(value.shape), dense.stride())
        self.told[id(value)] = told
        self.kept.append(value)
        return told

    def _set_buffer_aside(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if not raw.nbytes or raw.readonly:
            return True  # pickled as usual: what is seen in shared memory can be written to
        self.buffers.append((self._set_aside(torch.frombuffer(raw, dtype=torch.uint8)), raw.nbytes))
        return False

    def _set_aside(self, flat: Tensor) -> int:
        place = self.size
        self.parts.append((place, flat))
        self.size = -(-(place + flat.numel()) // _ALIGNED) * _ALIGNED
        return place


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, whole: Tensor, buffers: list[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self.whole = whole
        self.read: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        number, place, size, dtype, shape, stride = pid
        if number not in self.read:
            self.read[number] = self.whole[place : place + size].view(dtype).as_strided(shape, stride)
        return self.read[number]


def _memory() -> int:
    """A file descriptor of memory without a name."""
    make: Callable[[str], int] | None = getattr(os, "memfd_create", None)
    if make is not None:
        return make("thalweg-batch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _seen(fd: int, size: int) -> Tensor:
    """The memory as bytes. By its path, because Python's own mmap would keep a descriptor open for each batch."""
    path = f"/proc/self/fd/{fd}" if sys.platform == "linux" else f"/dev/fd/{fd}"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
