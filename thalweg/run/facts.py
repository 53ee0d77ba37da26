"""The plain data of a checkpoint, looked at before a run goes on by it: whoever wrote the file may have written anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thalweg.core import CheckpointError

_MOST = 2**62


def check_facts(facts: Mapping[str, Any], folder: Path) -> None:
    """
    Raises:
        CheckpointError: for what no run has written.
    """
    for name in ("step", "records_bytes", "streak"):
        value = facts.get(name)
        if type(value) is not int or not 0 <= value < _MOST:
            raise _not_ours(folder, f"{name} is {str(value)[:60]!r}")
    for row in _listed(facts.get("ranking"), folder, "ranking"):
        pair = _listed(row, folder, "ranking")
        if len(pair) != 2 or not all(isinstance(number, (int, float)) for number in pair):
            raise _not_ours(folder, f"ranking holds {str(row)[:60]!r}")
    if not all(number is None or isinstance(number, (int, float)) for number in _listed(facts.get("early"), folder, "early")):
        raise _not_ours(folder, f"early is {str(facts['early'])[:60]!r}")


def _listed(value: Any, folder: Path, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _not_ours(folder, f"{name} is {str(value)[:60]!r}")
    return value


def _not_ours(folder: Path, text: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint of {folder} holds no state of a run.",
        f"state.json: {text}. It was written so.",
        "Resume from another step, such as --resume 120, or start a new run with --name.",
    )
