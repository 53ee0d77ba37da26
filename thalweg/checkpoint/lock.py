"""One process to a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
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
            self._file = self._opened()
        except OSError as err:
            raise RunFolderError(
                f"The run folder {self.path.parent} cannot be written.",
                f"{err.strerror}: {err.filename}.",
                "Choose another with --runs, or see to its permissions.",
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                self._file.close()
                self._file = None
                raise RunFolderError(
                    f"The file system of {self.path.parent} has no locks.",
                    f"{err.strerror}.",
                    "Keep the run folder where flock works, and its checkpoints elsewhere by checkpoint.store.",
                ) from None
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            self._file = None
            raise RunFolderError(
                f"Another process is training in {self.path.parent}.",
                f"Its process id is {owner}.",
                "Wait for it, stop it, or start this run under another name with --name.",
            ) from None
        if not self._is_the_one():  # it was deleted and made again while we asked for it
            self._file.close()
            self._file = None
            return self.acquire()
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        _HELD.add(self)

    def _opened(self) -> IO[str]:
        """A plain file of this folder: whoever put a link here would have us write elsewhere."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "it is no plain file", str(self.path))
        return os.fdopen(handle, "r+", encoding="utf-8", errors="replace")

    def _is_the_one(self) -> bool:
        assert self._file is not None
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        mine = os.fstat(self._file.fileno())
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        _HELD.discard(self)
        if self._file is not None:
            self._file.close()
            self._file = None


def _let_go() -> None:
    for lock in list(_HELD):
        lock.release()  # closes this process's copy of the descriptor; the parent's holds the lock


os.register_at_fork(after_in_child=_let_go)
