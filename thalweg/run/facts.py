"""What a checkpoint holds, looked at before a run goes on by it: whoever wrote the file may have written anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thalweg.checkpoint import Snapshot
from thalweg.core import CheckpointError


def check_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """
    Raises:
        CheckpointError: for what no run has written.
    """
    for stem in ("weights", "state"):
        if stem not in snapshot.groups:
            raise _not_ours(folder, f"{stem}.safetensors is missing")
    facts = snapshot.facts
    for name in ("step", "records_bytes", "streak"):
        if not _is_count(facts.get(name)):
            raise _not_ours(folder, f"{name} is {str(facts.get(name))[:60]!r}")
    for name in ("bad_told", "accepted"):
        if not _is_count(facts.get(name, 0)):
            raise _not_ours(folder, f"{name} is {str(facts[name])[:60]!r}")
    ranking, most = facts.get("ranking"), facts.get("most_samples", {})
    if not isinstance(ranking, list) or not all(map(_is_pair, ranking)):
        raise _not_ours(folder, f"ranking is {str(ranking)[:60]!r}")
    if not _is_pair(facts.get("early")):
        raise _not_ours(folder, f"early is {str(facts.get('early'))[:60]!r}")
    reached = facts.get("reached")
    if reached is not None and not _is_pair([reached, 0]):
        raise _not_ours(folder, f"reached is {str(reached)[:60]!r}")
    if not isinstance(most, dict) or not all(map(_is_count, most.values())):
        raise _not_ours(folder, f"most_samples is {str(most)[:60]!r}")
    guard = facts.get("guard", {"rewinds": 0, "steps": {}})
    steps = guard.get("steps") if isinstance(guard, dict) and _is_count(guard.get("rewinds")) else None
    if not isinstance(steps, dict) or not all(stem in snapshot.groups and _is_count(at) for stem, at in steps.items()):
        raise _not_ours(folder, f"guard is {str(guard)[:60]!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_pair(value: Any) -> bool:
    """Two finite numbers."""
    return (
        isinstance(value, list) and len(value) == 2 and all(type(n) in (int, float) and abs(n) <= 1e308 for n in value)
    )


def _not_ours(folder: Path, text: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint of {folder} holds no state of a run.",
        f"{text[:1].upper()}{text[1:]}. It was written so.",
        "Resume from another step, such as --resume 120, or start a new run with --name.",
    )
