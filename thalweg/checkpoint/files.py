"""Files that are there whole or not at all, and stay there when the power goes.

All that is written here goes through the functions of ``os``, one call an operation, so that a test can stand in between.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CHUNK = 4 << 20
_TMP, _GONE, _OLD = ".tmp", ".gone", ".old"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

#: Writes bytes to an open file, all of them.
Write = Callable[[bytes | memoryview], None]


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """A folder and those above it, where they are not there yet; their names are durable when this returns."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make a file durable that somebody else wrote."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def _beside(path: Path) -> Path:
    """A name that nobody has, in the same folder; ``sweep`` knows it by its form."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_TMP}")


def write_all(handle: int, data: bytes | memoryview) -> None:
    """A write may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


@contextmanager
def new_file(path: Path) -> Iterator[Write]:
    """A file under a name that nobody has; on the disk in full when this ends. Its name is the folder's matter."""
    handle = os.open(path, _NEW, 0o666)
    try:
        yield lambda data: write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file whole: written beside it, fsynced, renamed, the folder fsynced."""
    with replaced_file(path) as write:
        write(data)


@contextmanager
def replaced_file(path: Path) -> Iterator[Write]:
    """The same for a file that is written in pieces; if writing fails, ``path`` is as it was."""
    aside = _beside(path)
    try:
        with new_file(aside) as write:
            yield write
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name with all its files durable, or not at all.

    What is written into the yielded folder must be durable already (``new_file``); then its names are made so, and the
    folder is renamed to ``path``. If writing fails, what was written is removed and ``path`` is as it was. A folder that
    stands under the name already is exchanged for the new one in one system call, so that at every instant one is there.
    """
    aside = begin_folder(path)
    try:
        yield aside
        name_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)  # the folder that was there before, if any


def begin_folder(path: Path) -> Path:
    """An empty folder beside ``path``, to be written into and given its name."""
    aside = _beside(path)
    os.mkdir(aside)
    return aside


def name_folder(aside: Path, path: Path) -> None:
    """Give a folder whose files are durable its name; the one that had it before is removed by whoever called."""
    sync_folder(aside)
    if not path.exists():
        os.rename(aside, path)
    elif not exchange(aside, path):
        # For an instant neither stands under the name; ``sweep`` gives the old one its name back if we are killed there.
        before = _beside(path).with_suffix(_OLD)
        os.rename(path, before)
        try:
            os.rename(aside, path)
        except OSError:
            os.rename(before, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(before, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Give two names each other's folder, in one step (Linux renameat2 with RENAME_EXCHANGE).

    Returns:
        False where the C library or the file system cannot; nothing has changed then.
    """
    here, exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        failed = ctypes.CDLL(None, use_errno=True).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchanged)
    except AttributeError:
        return False
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    return not failed


def remove_folder(path: Path) -> None:
    """Remove a folder so that it never stands half-removed under its own name."""
    if path.is_symlink():
        os.unlink(path)
        return
    aside = _beside(path).with_suffix(_GONE)
    os.rename(path, aside)
    sync_folder(path.parent)  # or, after a power cut, it could be back under its name with some of its files
    shutil.rmtree(aside)


def sweep(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what an earlier, killed process left half-written; what cannot be removed now is left for the next time."""
    for path in list(folder.iterdir()):
        if not (path.name.startswith(".") and path.suffix in (_TMP, _GONE, _OLD) and is_ours(path.name)):
            continue
        with suppress(OSError):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                continue
            named = folder / path.name[1:].rsplit(".", 2)[0]
            if path.suffix == _OLD and not named.exists():
                os.rename(path, named)
                sync_folder(folder)
            else:
                shutil.rmtree(path)
