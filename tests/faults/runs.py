"""Runs to do harm to, and what is compared afterwards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from thalweg.checkpoint import LocalPlace, Store
from thalweg.core import read_lines

#: Saved so often that much of the time goes into saves, and evaluated so often that much of the rest goes there.
SETTINGS = {
    "digits": {
        "train.steps": 60,
        "model.width": 8,
        "checkpoint.every": 2,
        "evaluate.every": 5,
        "evaluate.batch": 12,
        "precision": "fp32",
    },
    "pycode": {
        "train.steps": 40,
        "train.batch": 4,
        "train.micro_batch": 2,
        "model.width": 32,
        "model.layers": 2,
        "checkpoint.every": 3,
        "evaluate.every": 8,
        "data.options.held_out_windows": 24,
        "data.options.limit_bytes": 200_000,
        "precision": "fp32",
    },
    "tests.faults.tasks:items": {
        "train.steps": 54,
        "train.batch": 8,
        "train.micro_batch": 4,
        "data.workers": 2,
        "checkpoint.every": 3,
        "evaluate.every": 9,
        "evaluate.batch": 4,
        "precision": "fp32",
        "regularize.average": 0.9,
    },
}
KEEP = 2  # checkpoint.keep_last, as it is unless a recipe says otherwise


def command(task: str, runs: Path, name: str, **changes: Any) -> list[str]:
    """The one command, said again and again."""
    settings = {**SETTINGS[task], **changes}
    sets = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    return ["train", task, *sets, "--runs", str(runs), "--name", name, "--resume", "auto", "--quiet"]


class _Unswept(LocalPlace):
    """Looked at as it lies: what a killed process left is for the next start to remove."""

    def sweep(self) -> None:
        pass


def as_it_lies(folder: Path) -> Store:
    """The checkpoints of a run folder, of which nothing is changed."""
    return Store(_Unswept(folder / "checkpoints"))


def verified(folder: Path) -> list[int]:
    """Steps whose checkpoint is whole."""
    if not (folder / "checkpoints").is_dir():
        return []
    store = as_it_lies(folder)
    return [step for step in store.steps() if not store.fault(step)]


def residue(folder: Path) -> list[str]:
    """What should be gone."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "records.jsonl"
    return list(read_lines(file)) if file.exists() else []


@dataclass(frozen=True)
class Ended:
    """All that must be the same whatever happened on the way.

    Attributes:
        files: sha256 of each file of tensors of the last checkpoint: weights, average, slots and counters.
        facts: what else stands in it.
        told: step records and evaluations, without the seconds that they took.
    """

    files: dict[str, str]
    facts: dict[str, Any]
    told: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Ended:
        store = as_it_lies(folder)
        last = store.steps()[-1]
        assert not store.fault(last), store.fault(last)
        where = store.path(last)
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in where.glob("*.safetensors")}
        facts = json.loads((where / "state.json").read_text())
        length = facts.pop("records_bytes")
        assert (folder / "records.jsonl").stat().st_size >= length, "the records are shorter than the checkpoint says"
        told = [
            {k: v for k, v in line.items() if k not in ("seconds", "waited")}
            for line in lines(folder)
            if line["kind"] != "event"
        ]
        return cls(files, facts, told)

    def same_as(self, other: Ended) -> None:
        """
        Raises:
            AssertionError: naming what differs.
        """
        assert self.facts == other.facts, f"{self.facts} is not {other.facts}"
        assert [a for a, b in zip(self.told, other.told) if a != b][:1] == []
        assert len(self.told) == len(other.told), f"{len(self.told)} records, not {len(other.told)}"
        differ = [name for name in other.files if self.files.get(name) != other.files[name]]
        assert self.files.keys() == other.files.keys() and not differ, f"differ: {differ}"


@cache
def reference(task: str, ranks: int = 1) -> tuple[Ended, float]:
    """(how the run ends that nothing happens to, seconds that it takes; in one process, in a child of the fork server)."""
    import tempfile
    import time

    from tests.faults.server import Fresh, shared_server

    with tempfile.TemporaryDirectory() as runs:
        began = time.perf_counter()
        arguments = command(task, Path(runs), "whole") + (["--ranks", str(ranks)] if ranks > 1 else [])
        running = (shared_server() if ranks == 1 else Fresh()).start(arguments, Path(runs, "log"))
        code = running.ended()
        assert code == 0, running.text()
        return Ended.of(Path(runs, "whole")), time.perf_counter() - began
