"""What ranks must have in common before they train together: recipe, versions, and the sources of what they run."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thalweg.core import VERSION, Recipe, Task

_SHOWN = 12


def held(task: Task, recipe: Recipe) -> list[str]:
    """One thing a line."""
    own = sorted(Path(__file__).parent.parent.rglob("*.py"))
    lines = [f"thalweg {VERSION}, sources {_digest(own)}", f"torch {torch.__version__}"]
    return [*lines, *_modules(task), *recipe.to_toml().splitlines()]


def _modules(task: Task) -> list[str]:
    """The files that the parts of a task come from, outside of installed packages."""
    files = set()
    for part in (task.model, task.loss, task.data, task.metrics, task.sample):
        while isinstance(part, functools.partial):
            part = part.func
        for one in part.modules() if isinstance(part, nn.Module) else (part,):
            files.add(_file_of(one))
    return [f"{path.name} {_digest([path])}" for path in sorted(filter(None, files)) if not _is_installed(path)]


def _file_of(part: Any) -> Path | None:
    """Where a function or the class of an object was written; None for what has no file, as in a notebook."""
    name = getattr(part, "__module__", None) or type(part).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _is_installed(path: Path) -> bool:
    return "site-packages" in path.parts or Path(torch.__file__).parent in path.parents


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:_SHOWN]
