"""Files that a task reads and that nobody ships: found in the data folder, compared with the ones that its figures are for."""

from __future__ import annotations

import lzma
import warnings
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.checkpoint.files import digest as sha256_of
from thalweg.core import DataError
from thalweg.data.folder import VARIABLE, folder_in_use

_DIGITS = 16


def data_file(name: str, *, what: str, source: str, sha256: str = "") -> Path:
    """The file called ``name`` in the data folder: that of ``data.folder`` (``--data``), or else of ``THALWEG_DATA``.

    Args:
        name: of the file, with a folder in it maybe: "cifar10_jpg/index.npz".
        what: the data, for a sentence: "Fashion-MNIST".
        source: where one gets it, for a sentence: "the package dataset-fashion-mnist of Debian".
        sha256: first digits of the digest of the file that the task's figures are for; another file is warned about.

    Raises:
        DataError: if it is in no such folder.
    """
    folder = folder_in_use()
    path = folder.look(name)
    if path is None:
        looked = " and ".join(f"{place} ({who})" for place, who in folder.places)
        raise DataError(
            f"{what}: its file {name} is not there.",
            f"Looked in {looked}." if looked else "No data folder is named.",
            f"Get it from {source}, and name its folder by --data FOLDER, data.folder or {VARIABLE}.",
        )
    if sha256 and (found := digest(path)) != sha256[:_DIGITS]:
        warnings.warn(
            f"{path} is not the file that the figures of {what} are for: its sha256 begins with {found}, "
            f"not with {sha256[:_DIGITS]}. It is used; results will not compare.",
            stacklevel=2,
        )
    return path


def digest(path: Path) -> str:
    """The first 16 digits of the sha256 of a file: a fact by which a resumed run knows its data again."""
    told = path.stat()
    return _sha256(path, told.st_size, told.st_mtime_ns)[:_DIGITS]


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """Once for a file as it is: it is asked for when the file is found, and again as a fact of the data."""
    return sha256_of(path)


def unpacked(path: Path) -> bytes:
    """What is in a file, behind xz where its name ends in it.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data
    except (OSError, lzma.LZMAError) as err:
        raise DataError(f"{path} cannot be read.", f"{err}.", "Get it anew.") from None


def text(path: Path) -> str:
    """The text in a file of UTF-8, behind xz where its name ends in it.

    Raises:
        DataError: if it cannot be read, or is no text.
    """
    data = unpacked(path)
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is no text.", f"Byte {err.start} of it is no UTF-8.", "Get it anew.") from None


#: what numpy raises for an archive that is damaged, cut off, empty, or none.
NO_ARCHIVE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def arrays(path: Path, names: tuple[str, ...], *, what: str) -> dict[str, Any]:
    """Arrays by name from an npz; nothing in it is executed.

    Raises:
        DataError: if it is none, is damaged, or lacks one of them.
    """
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            return {name: archive[name] for name in names}
    except NO_ARCHIVE as err:
        numbers = (
            f"{err.args[0]}."
            if isinstance(err, KeyError)
            else f"numpy reads no whole npz there ({type(err).__name__})."
        )
        raise DataError(
            f"{path} is not {what}.", numbers, f"It is an npz that has {', '.join(names)}; get it anew."
        ) from None
