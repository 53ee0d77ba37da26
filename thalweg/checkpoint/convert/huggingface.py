"""Folders of Hugging Face: a config, files of a tokenizer, and the weights, alone or in shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from thalweg.checkpoint.convert.safetensorfiles import inside, read_index, read_safetensors, write_shards
from thalweg.checkpoint.convert.torchfiles import read_torch
from thalweg.checkpoint.convert.weights import Weights, listed
from thalweg.core import CheckpointError, RunFolderError

READERS = {
    "model.safetensors": read_safetensors,
    "model.safetensors.index.json": read_index,
    "pytorch_model.bin": read_torch,
    "pytorch_model.bin.index.json": read_index,
}
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # data; a model's own Python files are left behind
_LARGEST_COPY = 256 << 20


def is_hf(path: Path) -> bool:
    return (path / "config.json").is_file() or any((path / name).exists() for name in READERS)


def read_hf(path: Path) -> Weights:
    """The weights of a folder, safetensors before pickles.

    Raises:
        CheckpointError: if it holds none, or they are damaged.
    """
    for name, reader in READERS.items():
        if (path / name).exists() or (path / name).is_symlink():
            read = reader(inside(path, name))
            return replace(read, kind=f"a Hugging Face folder ({name})", folder=path)
    raise CheckpointError(
        f"{path} holds no weights.", f"None of {', '.join(READERS)} is in it.", "Bring them beside its config.json."
    )


def write_hf(weights: Weights, folder: Path, like: Path | None, most: int) -> list[str]:
    """A folder that ``from_pretrained`` loads.

    Args:
        like: where the config and the files of the tokenizer are copied from; None: from where the weights are.
        most: bytes in a shard.

    Returns:
        What was done, a sentence each.
    """
    like = like or weights.folder
    if like is None:
        raise CheckpointError(
            "A Hugging Face folder needs a config.json.",
            "The source has none.",
            "Name a folder with one: --like FOLDER.",
        )
    if not (like / "config.json").exists():
        raise RunFolderError(f"{like} is no Hugging Face folder.", "It holds no config.json.", "Name one that does.")
    _check_names(weights, like)
    copied, left = _copy(like, folder)
    told = [f"Copied from {like}: {', '.join(copied)}."]
    if left:
        told.append(f"Left there, as it is code: {listed(left)}.")
    told += _settle_dtype(weights, folder / "config.json")
    num = write_shards(weights, folder, most)
    return [*told, f"Weights in {num} file{'s' if num > 1 else ''}."]


def _check_names(weights: Weights, like: Path) -> None:
    """Where ``like`` has weights, their names must be ours: transformers would begin what is missing at random."""
    if like == weights.folder or not any((like / name).exists() for name in READERS):
        return
    theirs = read_hf(like)
    mine, wanted = {*weights.tensors, *weights.tied}, {*theirs.tensors, *theirs.tied}
    missing, extra = sorted(wanted - mine), sorted(mine - wanted - {*weights.tied})
    if missing or extra:
        raise CheckpointError(
            f"The names of the weights are not those in {like}.",
            f"Missing: {listed(missing)}. Not known there: {listed(extra)}.",
            "Give them the model's names by --rename, or name a folder of this model.",
        )


def _copy(like: Path, folder: Path) -> tuple[list[str], list[str]]:
    copied, left = [], []
    for path in sorted(like.iterdir()):
        name = path.name
        if name.endswith(".index.json") or name.startswith(".") or path.is_dir():
            continue
        if name.endswith(".py"):
            left.append(name)
        elif name.endswith(_COPIED):
            file = inside(like, name)
            if file.stat().st_size > _LARGEST_COPY:
                raise CheckpointError(
                    f"{file} is not copied.",
                    f"It has {file.stat().st_size} bytes.",
                    "Name a folder of config and tokenizer.",
                )
            shutil.copyfile(file, folder / name)
            copied.append(name)
    return copied, left


def _settle_dtype(weights: Weights, config: Path) -> list[str]:
    """transformers loads in the dtype that the config names; one that is not the weights' would round them."""
    dtypes = {tensor.dtype for tensor in weights.tensors.values() if tensor.is_floating_point()}
    try:
        said: Any = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("it holds no table")
    except (ValueError, RecursionError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{config.name} is not JSON.", f"{str(err)[:200]}.", "Name another --like.") from None
    told = []
    for key in ("dtype", "torch_dtype"):
        if isinstance(said.get(key), str) and len(dtypes) == 1:
            mine = str(next(iter(dtypes))).removeprefix("torch.")
            if said[key] != mine:
                told.append(f"config.json: {key} is {mine}, as the weights are; it was {said[key]}.")
                said[key] = mine
    if told:
        config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return told
