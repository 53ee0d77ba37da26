"""Weights from one kind of file to another: torch, safetensors, Lightning, Hugging Face, and runs of ours.

Nothing that is read can run: pickles are looked through first, and one that asks for more than tensors is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from thalweg.checkpoint.convert.folders import is_checkpoint, is_run, read_ours
from thalweg.checkpoint.convert.huggingface import is_hf, read_hf, write_hf
from thalweg.checkpoint.convert.rename import renamed, suggestion
from thalweg.checkpoint.convert.safetensorfiles import read_index, read_safetensors, write_safetensors
from thalweg.checkpoint.convert.target import check_target, new_target
from thalweg.checkpoint.convert.torchfiles import read_torch, write_lightning, write_torch
from thalweg.checkpoint.convert.weights import Weights, listed, refused
from thalweg.core import CheckpointError, RecipeError, did_you_mean, human_bytes

__all__ = ["SHARD_BYTES", "Weights", "convert", "listed", "read_weights", "renamed", "suggestion"]

SHARD_BYTES = 5_000_000_000
_WRITERS: dict[str, tuple[str, Callable[[Weights, Path], None]]] = {
    "torch": ("a torch state dict", write_torch),
    "safetensors": ("a safetensors file", write_safetensors),
    "lightning": ("a Lightning checkpoint", write_lightning),
}
TARGETS = (*_WRITERS, "hf")
_BY_SUFFIX = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".safetensors": "safetensors",
    ".ckpt": "lightning",
    "": "hf",
}


def read_weights(source: str | Path, *, choice: str | None = None, step: int | None = None) -> Weights:
    """Weights from wherever they lie; what it is is told by its content.

    Args:
        source: a run folder or checkpoint of ours; a file of torch, safetensors or Lightning; an index of shards; a
            Hugging Face folder.
        choice: of a run or checkpoint: "live", "average" or "best"; None: the average where there is one.
        step: of a run: which checkpoint; None: the newest good one.

    Raises:
        ThalwegError: if it is none of these, is damaged, or could run code.
    """
    path = Path(source)
    if path.is_dir() and (is_checkpoint(path) or is_run(path) or path.name == "checkpoints"):
        return read_ours(path, choice=choice, step=step)
    if choice is not None or step is not None:
        raise RecipeError(
            f"{path} holds one set of weights.",
            "--weights and --step choose among those of a run folder of thalweg.",
            "Leave them out, or name a run.",
        )
    if path.is_dir() and is_hf(path):
        read = read_hf(path)
    elif path.is_file():
        read = _reader_of(path)(path)
    else:
        what = "It is a folder that holds neither" if path.is_dir() else "There is no plain file"
        raise refused(path, f"{what}{' checkpoints nor a config.json' if path.is_dir() else ' of that name'}.", _KINDS)
    if not read.tensors:
        raise refused(path, "It holds no tensor.", _KINDS)
    return read


_KINDS = "Name a run folder, a checkpoint, a Hugging Face folder, or a file of torch, safetensors or Lightning."


def _reader_of(path: Path) -> Callable[[Path], Weights]:
    if path.name.endswith(".index.json"):
        return read_index
    with open(path, "rb") as file:
        head = file.read(9)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return read_torch
    if head[8:] == b"{" or path.suffix == ".safetensors":
        return read_safetensors
    raise refused(path, f"It begins with {head[:8]!r}, as none of the kinds does.", _KINDS)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    choice: str | None = None,
    step: int | None = None,
    rename: Sequence[str] = (),
    like: str | Path | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
) -> list[str]:
    """Write weights as another kind of file.

    Args:
        source, choice, step: see ``read_weights``.
        target: the file or folder to write.
        to: "torch", "safetensors", "lightning" or "hf"; None: by the target's suffix, where none is a Hugging Face folder.
        rename: ``OLD=NEW`` names of modules or tensors; the first that fits a name changes it.
        like: with "hf": the folder that config and tokenizer are copied from.
        shard_bytes: with "hf": bytes in a file, 5 GB where left out.
        force: replace a target that is there.

    Returns:
        What was read and written, a sentence each.

    Raises:
        ThalwegError: before anything is written, if it cannot be done.
    """
    path = Path(target)
    kind = _kind(path, to)
    if kind != "hf" and (like is not None or shard_bytes is not None):
        raise RecipeError("--like and --shard-size go with a Hugging Face folder.", f"This is {kind}.", "Add --to hf.")
    check_target(path, folder=kind == "hf", force=force)
    weights = renamed(read_weights(source, choice=choice, step=step), rename)
    if not weights.tensors:
        raise CheckpointError(f"Nothing of {source} is left.", "All is renamed to nothing.", "Rename less.")
    told = [f"read {source}: {weights.kind}", *weights.told]
    with new_target(path, folder=kind == "hf", force=force) as aside:
        if kind == "hf":
            told += write_hf(weights, aside, None if like is None else Path(like), shard_bytes or SHARD_BYTES)
        else:
            _WRITERS[kind][1](weights, aside)
    size = sum(tensor.nbytes for tensor in weights.tensors.values())
    what = "a Hugging Face folder" if kind == "hf" else _WRITERS[kind][0]
    tied = f", and {len(weights.tied)} further names of them" if weights.tied else ""
    return [*told, f"wrote {path}: {what} of {len(weights.tensors)} tensors{tied}, {human_bytes(size)}"]


def _kind(path: Path, to: str | None) -> str:
    if to is not None:
        if to not in TARGETS:
            raise RecipeError(f"--to {to} is not known.", f"{len(TARGETS)} kinds are.", did_you_mean(to, TARGETS))
        return to
    if path.suffix not in _BY_SUFFIX:
        raise RecipeError(
            f"{path.name} does not say what to write.",
            f"Suffixes that do: {', '.join(suffix for suffix in _BY_SUFFIX if suffix)}; none is a Hugging Face folder.",
            f"Add --to, one of {', '.join(TARGETS)}.",
        )
    return _BY_SUFFIX[path.suffix]
