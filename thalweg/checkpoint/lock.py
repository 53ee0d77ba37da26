"""One process to a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
import uuid
from pathlib import Path
from typing import IO

from thalweg.checkpoint.files import make_folder
from thalweg.core import RunFolderError

#: Held by this process.
_HELD: set[FolderLock] = set()


class _Taken(RunFolderError):
    """Another process has it now."""


class FolderLock:
    """Holds a run folder for this process; the kernel lets go of it when the process ends, however it ends.

    A forked child, such as a data worker, does not hold it: it may live a moment longer than its parent.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._file: IO[str] | None = None
        self._words = ""

    def acquire(self, patience: float = 0.0) -> None:
        """Take the folder.

        Args:
            patience: seconds to wait for another process that is about to end.

        Raises:
            RunFolderError: if it cannot be written, or another process has it.
        """
        until = time.monotonic() + patience
        while True:
            try:
                return self._take()
            except _Taken:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)

    def check(self) -> None:
        """Whether the folder is still this process's: where a file system's locks hold on one machine alone, another may have it.

        Raises:
            RunFolderError: if it is not.
        """
        try:
            now = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return  # a disk that is away for a while is no other owner
        if self._file is not None and now != self._words:
            raise RunFolderError(
                f"Another process has taken the run folder {self.path.parent} from this one.",
                f"Its process id is {_owner(now)}; this one's is {os.getpid()}.",
                "Nothing more is written from here. See to it that one group of ranks trains in a folder.",
            )

    def _take(self) -> None:
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
            owner = _owner(self._file.read())
            self._file.close()
            self._file = None
            raise _Taken(
                f"Another process is training in {self.path.parent}.",
                f"Its process id is {owner}.",
                "Wait for it, stop it, or start this run under another name with --name.",
            ) from None
        if not self._is_the_one():  # it was deleted and made again while we asked for it
            self._file.close()
            self._file = None
            return self._take()
        self._words = f"{os.getpid()}\n{socket.gethostname()} {uuid.uuid4().hex}\n"
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(self._words)
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


def _owner(words: str) -> str:
    """Who stands in the file."""
    pid, _, rest = words.strip().partition("\n")
    host = rest.partition(" ")[0]
    return f"{pid or 'unknown'} on {host}" if host not in ("", socket.gethostname()) else pid or "unknown"


def _let_go() -> None:
    for lock in list(_HELD):
        lock.release()  # closes this process's copy of the descriptor; the parent's holds the lock


os.register_at_fork(after_in_child=_let_go)
