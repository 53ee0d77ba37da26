"""The manifest of a checkpoint: what is in its folder, with a digest of each file, of each tensor, and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from thalweg.checkpoint.damage import Damage, Unreadable
from thalweg.checkpoint.place import Place, Reading
from thalweg.checkpoint.tensors import CHUNK

FORMAT = 2
NAME = "manifest.json"
_MOST = 1 << 30  # bytes of a manifest, or of a file of plain data: more is none


def manifest_bytes(step: int, files: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest; it carries its own digest, so that a flipped bit in it is found too."""
    told = {"format": FORMAT, "step": step, "files": files}
    own = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return json.dumps({**told, "sha256": own}, indent=1, sort_keys=True).encode()


def check_size(data: bytes, what: str) -> bytes:
    """Refuse to write plain data that would not be read.

    Raises:
        ValueError: for more than a gibibyte.
    """
    if len(data) > _MOST:
        raise ValueError(f"{what} would have {len(data)} bytes, and at most {_MOST} are read")
    return data


def read_manifest(place: Place, folder: str, step: int) -> dict[str, Any]:
    """File name to its row, for a folder that holds these files and no others.

    Raises:
        Damage: for a manifest that is not what was written for this step, or another set of files.
        OSError: if it cannot be read.
    """
    there = place.files(folder)
    if NAME not in there:
        raise Damage("it is missing")
    with place.open(folder, NAME) as file:
        written = read_all(file, there[NAME])
    try:
        manifest = json.loads(written.decode("utf-8"))
        if manifest["format"] != FORMAT:
            raise Unreadable(f"it is of format {manifest['format']!r}, this thalweg reads {FORMAT}")
        files = dict(manifest["files"])
        ours = written == manifest_bytes(step, files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise Damage(f"it cannot be read: {str(err)[:200]}") from None
    if not ours:
        raise Damage(f"it is not what was written for step {step}")
    if missing := sorted(set(files) - set(there)):
        raise Damage(f"{missing[0]} is missing")
    if more := sorted(set(there) - set(files) - {NAME}):
        raise Damage(f"{more[0]} is not in it")
    for name, row in files.items():
        _check_row(name, row)
        if there[name] != row["bytes"]:
            raise Damage(f"{name} has {there[name]} bytes, not {row['bytes']}")
    return files


def _check_row(name: str, row: Any) -> None:
    ok = isinstance(row, dict) and isinstance(row.get("sha256"), str) and type(row.get("bytes")) is int
    if ok and name.endswith(".safetensors"):
        ok = isinstance(row.get("header"), str) and isinstance(row.get("tensors"), dict)
    if not ok:
        raise Damage(f"it does not say what {name} is")


def read_all(file: Reading, size: int) -> bytes:
    """A whole file of plain data."""
    if size > _MOST or file.size != size:
        raise Damage(f"a file of plain data has {file.size} bytes")
    data = bytearray(size)
    file.read_into(0, memoryview(data))
    return bytes(data)


def check_sha256(file: Reading, row: Mapping[str, Any]) -> None:
    """Compare a whole file with its row.

    Raises:
        Damage: if it is another.
    """
    sha, size = hashlib.sha256(), file.size
    buffer = memoryview(bytearray(min(CHUNK, size)))
    for at in range(0, size, CHUNK):
        part = buffer[: min(CHUNK, size - at)]
        file.read_into(at, part)
        sha.update(part)
    if sha.hexdigest() != row["sha256"]:
        raise Damage("it does not have the sha256 of its manifest")
