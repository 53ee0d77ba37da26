"""Where checkpoints lie. A place knows folders of files, whole or not there; it knows nothing of what is in them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from thalweg.checkpoint.damage import Damage
from thalweg.checkpoint.files import Write, make_folder, new_file, new_folder, remove_folder, sweep, sync_folder
from thalweg.checkpoint.lock import FolderLock
from thalweg.core import CheckpointError


class Reading(Protocol):
    """A file that is open for reading, by several threads at once.

    Attributes:
        size: in bytes.
    """

    @property
    def size(self) -> int: ...

    def read_into(self, at: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``at`` on.

        Raises:
            Damage: if the file ends before.
            OSError: if they cannot be read.
        """


class Writing(Protocol):
    """A folder that is being written, and that nobody sees yet."""

    def file(self, name: str) -> AbstractContextManager[Write]:
        """A new file in it, whole when the context ends."""


class Place(Protocol):
    """Folders of files, on a disk or in a store. What a method could not do is an ``OSError``."""

    def folders(self) -> list[str]:
        """The names of all whole folders, in no order."""

    def files(self, folder: str) -> dict[str, int]:
        """Name to size of all files of a folder; anything else in it, such as a link, is a Damage that names it."""

    def open(self, folder: str, name: str) -> AbstractContextManager[Reading]: ...

    def new(self, folder: str) -> AbstractContextManager[Writing]:
        """A folder that appears whole and durable when the context ends, in the place of one with the same name, or not at all."""

    def rename(self, folder: str, to: str) -> None: ...

    def remove(self, folder: str) -> None: ...

    def claim(self) -> None:
        """From now on this process alone writes here.

        Raises:
            RunFolderError: if another one does, where that can be known.
        """

    def release(self) -> None:
        """It no longer does."""

    def sweep(self) -> None:
        """Remove what an earlier, killed process left half-written."""

    def __str__(self) -> str:
        """As a person would write it."""


def open_place(where: str | Path, *, make: bool = True) -> Place:
    """The place that a path or an address such as ``s3://bucket/runs/digits`` names.

    Args:
        make: make it, where it is not there.

    Raises:
        CheckpointError: if it cannot be used.
        MissingExtra: if the store's own package is not installed.
    """
    text = str(where)
    if isinstance(where, str) and ("://" in where or "::" in where):
        protocol, _, rest = where.partition("://")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", protocol):
            raise CheckpointError(
                f"checkpoint.store='{where}' is no address of a store.",
                "It has one protocol, then :// and a path; layers such as simplecache:: do not keep what they are given.",
                "Write, for example, s3://bucket/runs/digits.",
            )
        if protocol.lower() not in ("file", "local"):
            from thalweg.checkpoint.remote import RemotePlace

            return RemotePlace(f"{protocol.lower()}://{rest}", make=make)
        text = rest
    return LocalPlace(Path(text), make=make)


class LocalPlace:
    """A folder of this machine's file system.

    Args:
        make: make it, where it is not there.
    """

    def __init__(self, root: Path, *, make: bool = True) -> None:
        self.root = root
        self._lock: FolderLock | None = None
        if not make:
            return
        try:
            make_folder(root)
        except OSError as err:
            raise CheckpointError(
                f"The checkpoint folder {root} cannot be used.", f"{err}.", "See to its path and its permissions."
            ) from None

    def __str__(self) -> str:
        return str(self.root)

    def folders(self) -> list[str]:
        return [path.name for path in self.root.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def files(self, folder: str) -> dict[str, int]:
        path = self.root / folder
        if path.is_symlink():
            raise Damage(f"{path} is a link")
        found = {}
        for entry in path.iterdir():
            facts = entry.lstat()
            if not stat.S_ISREG(facts.st_mode):
                raise Damage(f"{entry} is no plain file")
            found[entry.name] = facts.st_size
        return found

    @contextmanager
    def open(self, folder: str, name: str) -> Iterator[Reading]:
        handle = os.open(self.root / folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            yield _Descriptor(handle)
        finally:
            os.close(handle)

    @contextmanager
    def new(self, folder: str) -> Iterator[Writing]:
        with new_folder(self.root / folder) as aside:
            yield _Aside(aside)

    def rename(self, folder: str, to: str) -> None:
        os.rename(self.root / folder, self.root / to)
        sync_folder(self.root)

    def remove(self, folder: str) -> None:
        remove_folder(self.root / folder)

    def claim(self) -> None:
        lock = FolderLock(self.root)
        lock.acquire()
        self._lock = lock

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def sweep(self) -> None:
        sweep(self.root, lambda name: name.startswith((".step-", ".run.")))


_AHEAD = 16 << 20


class _Descriptor:
    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.size = os.fstat(handle).st_size

    def read_into(self, at: int, view: memoryview) -> None:
        # Several threads read from different places: the kernel would see no order in it, and read nothing ahead.
        if hasattr(os, "posix_fadvise"):  # not on every Unix
            os.posix_fadvise(self.handle, at + len(view), _AHEAD, os.POSIX_FADV_WILLNEED)
        while view:
            num = os.preadv(self.handle, [view], at)
            if not num:
                raise Damage(f"it ends at byte {at}")
            at, view = at + num, view[num:]


class _Aside:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> AbstractContextManager[Write]:
        return new_file(self.folder / name)
