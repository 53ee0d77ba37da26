"""A real power cut: an ext4 of its own on a loop device, shut down without its journal, and mounted again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.core import Given, Row, Skip, fault, needs_root
from tests.faults.power import naive
from tests.faults.samples import same, snapshot
from thalweg.checkpoint import Store

_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN


def sh(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skip(f"{words[0]} does not work here: {(done.stderr or done.stdout).strip()[:200]}")


class Ext4:
    """A small file system whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.file, self.root = folder / "disk.img", folder / "disk"
        needs_root("a file system of its own")
        if shutil.which("mkfs.ext4") is None:
            raise Skip("there is no mkfs.ext4")
        with open(self.file, "wb") as file:
            file.truncate(64 << 20)
        self.root.mkdir()
        sh("mkfs.ext4", "-q", "-F", self.file)

    def mount(self) -> None:
        sh("mount", "-o", "loop", self.file, self.root)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.root)], capture_output=True, check=False)

    def cut(self) -> None:
        """What is not on the disk now never comes there; then the file system is mounted again, as after a start."""
        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        except OSError as err:
            raise Skip(f"EXT4_IOC_SHUTDOWN does not work here: {err}") from None
        finally:
            os.close(handle)
        self.unmount()
        self.mount()


@contextmanager
def _mounted(folder: Path) -> Iterator[Ext4]:
    disk = Ext4(folder)
    disk.mount()
    try:
        yield disk
    finally:
        with contextlib.suppress(OSError):
            disk.unmount()


@fault("real power cut (ext4 shut down) right after a save is reported", times=100, quick=3)
def ext4(row: Row, given: Given) -> None:
    with _mounted(given.folder) as disk:
        for number in range(1, given.times + 1):
            with row.trial(f"save {number}"):
                store = Store(disk.root / "run" / "checkpoints")
                store.save(number, snapshot(number))
                disk.cut()
                found, faults = Store(disk.root / "run" / "checkpoints").load_newest()
                assert found is not None and same(found, snapshot(number)), f"lost: {faults}"
                store.retain(last=2, every=0, best=[])


@fault("the same loses what was written without fsync", times=10, quick=1)
def ext4_control(row: Row, given: Given) -> None:
    """Passed: a naive write is lost."""
    with _mounted(given.folder) as disk:
        for number in range(given.times):
            with row.trial(f"naive write {number}"):
                file, data = disk.root / f"model-{number}.pt", given.draw.randbytes(9000)
                naive(file, data, sync=False)
                disk.cut()
                assert not file.exists() or file.read_bytes() != data, "it survived"
