"""Checkpoints that somebody wrote to do harm: each is a function that changes a good one, and may sign it anew."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thalweg.checkpoint.manifest import manifest_bytes

MARK = "pickle-was-run"


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Evil(folder.parent.parent / MARK))


def torch_saved(folder: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"weight": Evil(folder.parent.parent / MARK)}, out)
    return out.getvalue()


def zip_bomb(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(64 << 20))
    return out.getvalue()


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda files: None) -> None:
    """Write a manifest that fits what is in the folder now: a forger can do that too."""
    step = int(folder.name.removeprefix("step-"))
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name == "manifest.json" or not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        row: dict[str, Any] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if path.suffix == ".safetensors":
            row |= {"header": "", "tensors": {}, **_digests(data)}
        files[path.name] = row
    change(files)
    (folder / "manifest.json").write_bytes(manifest_bytes(step, files))


def _digests(data: bytes) -> dict[str, Any]:
    """Header and tensors of a file that claims to be safetensors."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:start])
        spans = {name: row["data_offsets"] for name, row in table.items() if name != "__metadata__"}
        tensors = {name: hashlib.sha256(data[start + a : start + b]).hexdigest() for name, (a, b) in spans.items()}
        return {"header": hashlib.sha256(data[:start]).hexdigest(), "tensors": tensors}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}


def with_header(data: bytes, text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with another header over the same bytes of tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data[start:]


def _table(data: bytes) -> dict[str, Any]:
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert isinstance(table, dict)
    return table


def _one(row: dict[str, Any]) -> bytes:
    return json.dumps({"x": row}).encode()


def headers(data: bytes) -> dict[str, bytes]:
    """Safetensors files with headers that lie."""
    table = _table(data)
    name = sorted(table)[0]
    changed = {
        "shape of 2^62": {**table, name: {**table[name], "shape": [2**62]}},
        "shape whose product is 0 mod 2^64": {**table, name: {**table[name], "shape": [2**32, 2**32]}},
        "negative shape": {**table, name: {**table[name], "shape": [-1, -4]}},
        "offsets of 2^62": {**table, name: {**table[name], "data_offsets": [2**62, 2**63]}},
        "negative offsets": {**table, name: {**table[name], "data_offsets": [-8, 0]}},
        "overlapping offsets": {
            key: {**row, "data_offsets": [0, row["data_offsets"][1]]} for key, row in table.items()
        },
        "a dtype of no bits": {**table, name: {**table[name], "dtype": "F0"}},
        "a list for a row": {**table, name: [1, 2]},
        "no rows": {},
        "a name that leads out": {"../../../" + key: row for key, row in table.items()},
        "metadata that is no text": {**table, "__metadata__": {"a": [[[[1]]]]}},
    }
    found = {what: with_header(data, json.dumps(value).encode()) for what, value in changed.items()}
    nested = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    text = json.dumps(table)
    found |= {
        "a header of 2^62 bytes": with_header(data, json.dumps(table).encode(), 2**62),
        "a header of 2^64 - 1 bytes": with_header(data, b"{}", 2**64 - 1),
        "a header of 0 bytes": with_header(data, b""),
        "nesting": with_header(data, nested),
        "brackets": with_header(data, b"[" * 200_000),
        "a number of 100,000 digits": with_header(data, text.replace("[0,", "[" + "9" * 100_000 + ",", 1).encode()),
        "the same name twice": with_header(data, (text[:-1] + "," + text[1:]).encode()),
        "no UTF-8": with_header(data, b"\xff\xfe\x00"),
        "NaN": with_header(data, text.replace("[0,", "[NaN,", 1).encode()),
        "7 bytes": data[:7],
        "nothing": b"",
    }
    return found


def plain(step: int) -> dict[str, bytes]:
    """Files of plain data that are none, or hold what no run wrote."""
    good = {"step": step, "records_bytes": 0}
    return {
        "brackets": b"[" * 200_000,
        "nesting": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "the same key twice": b'{"step": 1, "step": 2, "step": 3}',
        "a list": b"[1, 2]",
        "a text": b'"step"',
        "null": b"null",
        "a number of 100,000 digits": b'{"step": ' + b"9" * 100_000 + b"}",
        "1e999": b'{"step": 1e999, "records_bytes": 0}',
        "NaN": b'{"step": NaN}',
        "no UTF-8": b"\xff\xfe{}",
        "nothing": b"",
        "no step": b"{}",
        "a step that is a text": json.dumps({**good, "step": "../../x"}).encode(),
        "a negative step": json.dumps({**good, "step": -5}).encode(),
        "a step of 2^70": json.dumps({**good, "step": 2**70}).encode(),
        "negative records": json.dumps({**good, "records_bytes": -1}).encode(),
        "records of 2^80 bytes": json.dumps({**good, "records_bytes": 2**80}).encode(),
    }


Attack = Callable[[Path], None]


def _put(name: str, data: Callable[[Path], bytes], signed: bool) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).write_bytes(data(folder))
        if signed and name != "manifest.json":
            sign(folder)

    return attack


def _linked(name: str, target: str, signed: bool) -> Attack:
    def attack(folder: Path) -> None:
        path = folder / name
        outside = folder.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        if path.exists():
            os.replace(path, outside / name)
        path.symlink_to({"outside": outside / name}.get(target, Path(target)))
        if signed and name != "manifest.json":
            sign(folder)

    return attack


def _fifo(folder: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def _folder_linked(folder: Path) -> None:
    outside = folder.parent.parent / "outside-folder"
    os.rename(folder, outside)
    folder.symlink_to(outside)


def _named(name: str) -> Attack:
    """The manifest speaks of a file elsewhere."""

    def attack(folder: Path) -> None:
        data = Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else b"x"
        row = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        sign(folder, lambda files: files.update({name: row}))

    return attack


def _rows(change: Any) -> Attack:
    return lambda folder: sign(folder, lambda files: files.update({"state.json": change}))


def _sparse(name: str, size: int) -> Attack:
    def attack(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return attack


def attacks(weights: bytes, step: int) -> dict[str, Attack]:
    """All of them, by what they are."""
    found: dict[str, Attack] = {}
    names = (
        "weights.safetensors",
        "average.safetensors",
        "state.safetensors",
        "state.json",
        "manifest.json",
        "more.pkl",
    )
    for what, data in (("a pickle", pickled), ("a torch file", torch_saved), ("a zip bomb", zip_bomb)):
        for name in names:
            for signed in (False, True):
                found[f"{what} as {name}{', signed' if signed else ''}"] = _put(name, data, signed)
    for what, made in headers(weights).items():
        found[f"a header with {what}, signed"] = _put("weights.safetensors", lambda folder, made=made: made, True)
    for what, made in plain(step).items():
        found[f"state.json with {what}, signed"] = _put("state.json", lambda folder, made=made: made, True)
        found[f"manifest.json with {what}"] = _put("manifest.json", lambda folder, made=made: made, False)
    for name in names[:5]:
        for target in ("outside", "/dev/zero", "/etc/passwd", "."):
            found[f"{name} is a link to {target}"] = _linked(name, target, False)
    for name in ("../../outside.json", "/etc/hostname", "a/../../../x", "..", ".", "", "a\0b", "x" * 5000):
        found[f"a manifest that names {name[:20]!r}"] = _named(name)
    for number, change in enumerate(
        (None, [], {}, {"bytes": -1, "sha256": ""}, {"bytes": 2**80, "sha256": "0"}, {"bytes": True})
    ):
        found[f"a manifest with odd row {number}"] = _rows(change)
    found["a FIFO as state.json"] = _fifo
    found["the folder is a link"] = _folder_linked
    found["a manifest of 1 GiB of zeros"] = _sparse("manifest.json", 1 << 30)
    found["a state.json of 4 GiB of zeros"] = _sparse("state.json", 4 << 30)
    return found
