"""What was compiled and what was measured, kept between runs in the user's cache folder."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from thalweg.optim.native import cache_folder

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
#: By the user, before this was imported: torch sets the variable too where it is first asked for, to a folder that a restart takes.
_GIVEN = os.environ.get(INDUCTOR)
_OURS: list[str] = []  # what we have set it to


def folder() -> Path:
    """Beside the kernels of updates: ``THALWEG_CACHE``, or the user's cache folder."""
    return cache_folder() / "compiled"


def use_cache() -> None:
    """Inductor keeps its graphs there, unless the user has named another folder, at any time before."""
    now = os.environ.get(INDUCTOR)
    if now is None or (now != _GIVEN and (now in _OURS or now == _torchs_own())):
        os.environ[INDUCTOR] = str(folder() / "inductor")
        _OURS.append(os.environ[INDUCTOR])


def _torchs_own() -> str:
    """The folder that torch takes by itself."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(default_cache_dir())


def surroundings(functions: Iterable[Any]) -> str:
    """What a graph may fail by besides what it is made of: another word once a compiler was installed, or a file mended that one
    of ``functions`` (or classes) is written in."""
    files = {shutil.which(name) for name in (os.environ.get("CXX") or "c++", *_COMPILERS)}
    for function in functions:
        with suppress(TypeError, OSError):  # not written in Python, or in no file
            files.add(inspect.getsourcefile(function))
    stamps = []
    for name in sorted(filter(None, files)):
        with suppress(OSError):
            status = os.stat(name)
            stamps.append((os.path.realpath(name), status.st_mtime_ns, status.st_size))
    return hashlib.sha256(repr((sys.version, stamps)).encode()).hexdigest()[:32]


_COMPILERS = ("g++", "clang++")


def _file(facts: Mapping[str, Any]) -> Path:
    text = json.dumps(facts, sort_keys=True, default=str)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def kept(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``keep`` was given for equal facts; None where it was not, or cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(_file(facts).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return None


def keep(facts: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Note figures for the next run; a folder that cannot be written keeps none."""
    with suppress(OSError):
        path = _file(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(figures), encoding="utf-8")
        os.replace(beside, path)
