"""Where weights are written: whole and durable, or not at all, and over nothing that was there unless that is asked for."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from thalweg.checkpoint.convert.folders import is_run
from thalweg.checkpoint.convert.huggingface import is_hf
from thalweg.checkpoint.files import new_folder, sync_file, sync_folder
from thalweg.core import CheckpointError, RunFolderError

_LITTLE = 1 << 20  # bytes: a disk with less left is full


def check_target(path: Path, *, folder: bool, force: bool) -> None:
    """Refuse a place that is taken, and any within a checkpoint of ours.

    Raises:
        RunFolderError: saying what is there.
    """
    if not path.parent.is_dir():
        raise RunFolderError(f"{path} cannot be written.", f"There is no folder {path.parent}.", "Make it first.")
    inner = path.resolve()
    if any((parent / "manifest.json").exists() for parent in (inner, *inner.parents)):
        raise RunFolderError(
            f"{path} lies in a checkpoint.", "A checkpoint with a further file in it is damaged.", "Write elsewhere."
        )
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise RunFolderError(f"{path} is there already.", "Nothing is written over.", "Name another, or add --force.")
    if path.is_dir() != folder or path.is_symlink():
        what = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a file"
        raise RunFolderError(f"{path} is {what}.", "It is not replaced by the other kind.", "Name another place.")
    if folder and (is_run(path) or not is_hf(path) or any(inner.is_dir() for inner in path.iterdir())):
        raise RunFolderError(
            f"{path} is not replaced.",
            "--force replaces a Hugging Face folder with plain files alone in it.",
            "Remove it yourself, or name another.",
        )


@contextmanager
def new_target(path: Path, *, folder: bool, force: bool) -> Iterator[Path]:
    """Yields where to write; it gets its name when all of it is on the disk.

    Raises:
        CheckpointError: if it cannot be written; what was there before is there still.
    """
    check_target(path, folder=folder, force=force)
    try:
        if folder:
            with new_folder(path) as aside:
                yield aside
                for file in aside.iterdir():  # which other packages wrote
                    sync_file(file)
                check_target(path, folder=folder, force=force)
        else:
            with _new_file(path) as aside:
                yield aside
                check_target(path, folder=folder, force=force)
    except (CheckpointError, RunFolderError):
        raise
    except (OSError, SafetensorError, RuntimeError) as err:
        full = getattr(err, "errno", None) == errno.ENOSPC or "No space" in str(err)
        full |= shutil.disk_usage(path.parent).free < _LITTLE  # torch's writer does not say why
        raise CheckpointError(
            f"{path} could not be written.",
            f"{str(err)[:200]}. Nothing stands under its name that did not before.",
            "Free some room, and say it again." if full else "See to its folder.",
        ) from None


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        sync_file(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
