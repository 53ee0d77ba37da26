"""Files of safetensors, alone or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thalweg.checkpoint.convert.torchfiles import alone, read_torch
from thalweg.checkpoint.convert.weights import Weights, listed, refused
from thalweg.core import CheckpointError

_LARGEST_INDEX = 64 << 20
_AGAIN = "Write the file again, from where it came."


def read_safetensors(path: Path) -> Weights:
    """One file.

    Raises:
        CheckpointError: if it is damaged, or holds a dtype that torch does not have.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            tensors = {}
            for name in names:
                tensors[name] = file.get_tensor(name)
            about = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as err:
        raise refused(path, f"{type(err).__name__}: {str(err)[:200]}.", _AGAIN) from None
    tied = {n: kept for n, kept in about.items() if kept in tensors and n not in tensors and n != "format"}
    return Weights(tensors=tensors, tied=tied, kind="a safetensors file", files=(path,))


def read_index(path: Path) -> Weights:
    """The shards that an index names; each must lie beside it.

    Raises:
        CheckpointError: if the index is none, names a file elsewhere or one that is missing, or a tensor that its file
            does not hold.
    """
    places = _places(path)
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    others = 0
    shards = sorted(set(places.values()))
    for shard in shards:
        file = inside(path.parent, shard)
        read = read_safetensors(file) if shard.endswith(".safetensors") else read_torch(file)
        wanted = {name for name, place in places.items() if place == shard}
        if absent := sorted(wanted - read.tensors.keys() - read.tied.keys()):
            raise refused(path, f"It says that {listed(absent)} is in {shard}, which does not hold it.", _AGAIN)
        names = wanted | (read.tied.keys() if shard.endswith(".safetensors") else set())
        kept = {read.tied.get(name, name) for name in names}
        others += len(read.tensors.keys() - kept)
        tensors |= {name: read.tensors[name] for name in read.tensors if name in kept}
        tied |= {name: first for name, first in read.tied.items() if name in names}
    told = f"{others} tensors of the shards are left out: the index does not name them." if others else ""
    kind = f"{len(shards)} shards with an index"
    files = (path, *(path.parent / shard for shard in shards))
    return Weights(tensors=tensors, tied=tied, kind=kind, files=files).telling(told)


def _places(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        whole: Any = json.loads(path.read_text(encoding="utf-8"))
        places = whole["weight_map"]
        if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
            raise ValueError("its weight_map is no table of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise refused(path, f"{type(err).__name__}: {str(err)[:200]}.", _AGAIN) from None
    return dict(places)


def inside(folder: Path, name: str) -> Path:
    """A plain file of ``folder`` by the name that another file gives it.

    A link is followed where it stays in the folder, or leads to the ``blobs`` of a cache of the Hugging Face hub, whose
    snapshots are made of such links.

    Raises:
        CheckpointError: for a path, a link that leads elsewhere, and what is no plain file.
    """
    file = folder / name
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise refused(
            folder, f"A file is asked for that lies elsewhere: {name[:160]!r}.", "Take shards beside their index."
        )
    if not file.is_symlink() and not file.exists():
        raise refused(folder, f"{name} is missing.", "Bring all of its files.")
    real = file.resolve()
    allowed = {folder.resolve()}
    if folder.parent.name == "snapshots":
        allowed.add((folder.parent.parent / "blobs").resolve())
    if real.parent not in allowed:
        raise refused(folder, f"{name} is a link to {real}, outside of it.", "Copy the file into the folder.")
    if not real.is_file():
        raise refused(folder, f"{name} is no plain file.", "Bring all of its files.")
    return file


def write_safetensors(weights: Weights, file: Path) -> None:
    """One file; further names of a tensor stand in its header, as ``safetensors.torch.save_model`` writes them.

    Raises:
        CheckpointError: for a dtype that the format does not have; the tensor is named.
    """
    check_fits(weights)
    _save(weights.tensors, weights.tied, file)


def _save(tensors: Mapping[str, Tensor], tied: Mapping[str, str], file: Path) -> None:
    about = {"format": "pt", **{name: kept for name, kept in tied.items() if kept in tensors}}
    safetensors.torch.save_file({name: alone(tensor) for name, tensor in tensors.items()}, file, metadata=about)


def check_fits(weights: Weights) -> None:
    if "format" in weights.tied:
        raise CheckpointError(
            "A tied tensor is called 'format'.", "In safetensors files that word is taken.", "Use --rename format=NEW."
        )
    first: dict[torch.dtype, str] = {}
    for name, tensor in weights.tensors.items():
        first.setdefault(tensor.dtype, name)
    for dtype, name in first.items():
        try:
            safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
        except Exception:  # how it says so differs between its releases
            raise CheckpointError(
                f"{name} cannot be written as safetensors.",
                f"It is {dtype}, which the format does not have.",
                "Write a torch file: --to torch.",
            ) from None


def shards_of(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many together as fit in ``most`` bytes; one that is larger stands alone."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_shards(weights: Weights, folder: Path, most: int) -> int:
    """``model.safetensors``, or shards of at most ``most`` bytes with an index.

    Returns:
        How many files of tensors there are.
    """
    check_fits(weights)
    shards = list(shards_of(weights.tensors, most))
    if len(shards) == 1:
        write_safetensors(weights, folder / "model.safetensors")
        return 1
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, weights.tied, folder / name)
        places.update(dict.fromkeys(shard, name))
    total = sum(tensor.nbytes for tensor in weights.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    return len(shards)
