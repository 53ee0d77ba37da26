"""Checkpoints in an object store that fsspec knows: S3, GCS, Azure and so on.

Such a store has no rename. A folder is whole once its manifest is there, and the manifest is written last; its objects are whole or
not there, and durable when the store has said so. A folder that is written again gets another name in the store
(``step-00000120.2``), so that the old one is there until the new one is whole.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from thalweg.checkpoint.damage import Damage
from thalweg.checkpoint.files import Write
from thalweg.checkpoint.place import Reading, Writing
from thalweg.core import CheckpointError, MissingExtra

_LAST = ("manifest.json", "recipe.toml")  # what makes a folder whole
_DAMAGED = ".damaged"
_OWNER = "owner"


class RemotePlace:
    """A folder of an object store.

    Args:
        address: such as ``s3://bucket/runs/digits``; how to reach the store comes from its package's own settings.

    Raises:
        MissingExtra: if the store's package is not installed.
        CheckpointError: if it cannot be reached.
    """

    def __init__(self, address: str, *, make: bool = True) -> None:
        import fsspec

        self.address = address.rstrip("/")
        protocol = address.partition("://")[0]
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.address)
            if make:
                self.fs.makedirs(self.root, exist_ok=True)
        except (ImportError, ValueError) as err:
            raise MissingExtra(
                f"checkpoint.store='{address}' is of a kind that is not known here.",
                f"{err}.",
                f"Install fsspec's package for {protocol}: (s3: pip install s3fs; gs: gcsfs; az: adlfs).",
            ) from None
        except Exception as err:  # each package raises errors of its own
            raise CheckpointError(
                f"The store {address} cannot be used.",
                f"{type(err).__name__}: {err}.",
                "See to its address and its keys.",
            ) from None

        self._token = ""

    def __str__(self) -> str:
        return self.address

    def claim(self) -> None:
        """The newest run to begin here is the owner; an older one that lives yet saves nothing more."""
        self._token = f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}"
        with _as_os_errors():
            self.fs.pipe_file(f"{self.root}/{_OWNER}", self._token.encode())

    def release(self) -> None:
        self._token = ""

    def _check_owner(self) -> None:
        if self._token:
            owner = bytes(self.fs.cat_file(f"{self.root}/{_OWNER}")).decode(errors="replace")
            if owner != self._token:
                raise OSError(f"another run has begun in {self.address}: {owner.partition(' ')[2]}")

    def _listed(self, path: str) -> list[dict[str, Any]]:
        with _as_os_errors():
            self.fs.invalidate_cache()
            try:
                return list(self.fs.ls(path, detail=True))
            except FileNotFoundError:
                return []

    def _variants(self) -> dict[str, dict[int, str]]:
        """Folder name to number to path, of those that are whole."""
        found: dict[str, dict[int, str]] = {}
        for row in self._listed(self.root):
            path = str(row["name"]).rstrip("/")
            match = re.fullmatch(r"(.+?)(?:\.([1-9][0-9]*))?", path.rpartition("/")[2])
            if row["type"] != "directory" or match is None:
                continue
            names = {str(r["name"]).rpartition("/")[2] for r in self._listed(path)}
            if names & set(_LAST) and _DAMAGED not in names:
                found.setdefault(match.group(1), {})[int(match.group(2) or 1)] = path
        return found

    def _path(self, folder: str) -> str:
        variants = self._variants().get(folder)
        if not variants:
            raise OSError(f"{self.address}/{folder} is not there")
        return variants[max(variants)]

    def folders(self) -> list[str]:
        return list(self._variants())

    def files(self, folder: str) -> dict[str, int]:
        rows = self._listed(self._path(folder))
        if odd := [row["name"] for row in rows if row["type"] != "file"]:
            raise Damage(f"{odd[0]} is no plain file")
        return {str(row["name"]).rpartition("/")[2]: int(row["size"]) for row in rows}

    @contextmanager
    def open(self, folder: str, name: str) -> Iterator[Reading]:
        with _as_os_errors():
            path = f"{self._path(folder)}/{name}"
            yield _Object(self.fs, path, int(self.fs.info(path)["size"]))

    @contextmanager
    def new(self, folder: str) -> Iterator[Writing]:
        with _as_os_errors():
            before = self._variants().get(folder, {})
            number = self._free(folder)
            path = f"{self.root}/{folder}" + (f".{number}" if number > 1 else "")
            self._check_owner()
            try:
                yield _Prefix(self.fs, path, self._check_owner)
            except BaseException:
                self._remove(path)
                raise
            for old in before.values():
                self._remove(old)

    def _free(self, folder: str) -> int:
        """A number that nothing lies under, whole or not."""
        pattern = re.compile(re.escape(folder) + r"(?:\.([1-9][0-9]*))?")
        names = [str(row["name"]).rstrip("/").rpartition("/")[2] for row in self._listed(self.root)]
        taken = [int(match.group(1) or 1) for name in names if (match := pattern.fullmatch(name))]
        return max(taken, default=0) + 1

    def rename(self, folder: str, to: str) -> None:
        """A store that cannot rename marks the folder: it is passed over from then on, and kept under its own name."""
        with _as_os_errors():
            self.fs.pipe_file(f"{self._path(folder)}/{_DAMAGED}", to.encode())

    def remove(self, folder: str) -> None:
        for path in self._variants().get(folder, {}).values():
            self._remove(path)

    def _remove(self, path: str) -> None:
        """What makes it whole goes first: a removal that breaks off leaves no half checkpoint."""
        with _as_os_errors():
            for name in _LAST:
                if self.fs.exists(f"{path}/{name}"):
                    self.fs.rm_file(f"{path}/{name}")
            if self.fs.exists(path):
                self.fs.rm(path, recursive=True)

    def sweep(self) -> None:
        whole = {path for variants in self._variants().values() for path in variants.values()}
        for row in self._listed(self.root):
            path = str(row["name"]).rstrip("/")
            ours = re.fullmatch(r"step-[0-9]{8,}(\.[1-9][0-9]*)?", path.rpartition("/")[2])
            if ours and row["type"] == "directory" and path not in whole:
                names = {str(r["name"]).rpartition("/")[2] for r in self._listed(path)}
                if _DAMAGED not in names:
                    self._remove(path)


class _Object:
    def __init__(self, fs: Any, path: str, size: int) -> None:
        self.fs, self.path, self.size = fs, path, size

    def read_into(self, at: int, view: memoryview) -> None:
        if not view:
            return
        with _as_os_errors():
            data = self.fs.cat_file(self.path, start=at, end=at + len(view))
        if len(data) != len(view):
            raise Damage(f"it ends at byte {at + len(data)}")
        view[:] = data


class _Prefix:
    def __init__(self, fs: Any, path: str, check_owner: Callable[[], None]) -> None:
        self.fs, self.path, self.check_owner = fs, path, check_owner

    def file(self, name: str) -> AbstractContextManager[Write]:
        return self._file(name)

    @contextmanager
    def _file(self, name: str) -> Iterator[Write]:
        self.fs.makedirs(self.path, exist_ok=True)
        if name in _LAST:
            self.check_owner()
        with self.fs.open(f"{self.path}/{name}", "wb") as file:
            yield lambda data: _swallow(file.write(data))


def _swallow(count: Any) -> None:
    """A buffered file takes all that it is given."""


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Each store's package has errors of its own; to us all of them are a place that could not do what was asked."""
    try:
        yield
    except (OSError, CheckpointError, Damage, GeneratorExit):
        raise
    except Exception as err:
        raise OSError(f"{type(err).__name__}: {err}") from err
