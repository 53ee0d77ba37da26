"""One process to a run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from thalweg.checkpoint.files import make_folder
from thalweg.core import RunFolderError

#: Held by this process.
_HELD: set[FolderLock] = set()


class FolderLock:
    """Holds a run folder for this process; the kernel lets go of it when the process ends, however it ends.

    A forked child, such as a data worker, does not hold it: it may live a moment longer than its parent.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            RunFolderError: if it cannot be written, or another process has it.
        """
        try:
            make_folder(self.path.parent)
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the lock
        except OSError as err:
            raise RunFolderError(
                f"The run folder {self.path.parent} cannot be written.",
                f"{err.strerror}: {err.filename}.",
                "Choose another with --runs, or see to its permissions.",
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            self._file = None
            raise RunFolderError(
                f"Another process is training in {self.path.parent}.",
                f"Its process id is {owner}.",
                "Wait for it, stop it, or start this run under another name with --name.",
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        _HELD.add(self)

    def release(self) -> None:
        _HELD.discard(self)
        if self._file is not None:
            self._file.close()
            self._file = None


def _let_go() -> None:
    for lock in list(_HELD):
        lock.release()  # closes this process's copy of the descriptor; the parent's holds the lock


os.register_at_fork(after_in_child=_let_go)
