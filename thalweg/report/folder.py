"""A run folder read back: the plan, the lines of the record in order, and how the run ended."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.core import Evaluation, Event, Plan, Record, RunFolderError, read_lines
from thalweg.core.goodput import Goodput, goodput, times_of

Line = Record | Evaluation


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        name: the folder's own name.
        given: the text of recipe.toml, as the run began with it; empty where the file is missing.
        lines: steps and evaluations, in the order in which they were written.
        outcome: reason, advice and sample; empty while the run is not finished.
        goodput: where its time went; None where nothing tells of it.
    """

    name: str
    plan: Plan
    given: str
    lines: list[Line]
    events: list[Event]
    outcome: dict[str, str]
    goodput: Goodput | None = None

    @property
    def records(self) -> list[Record]:
        return [line for line in self.lines if isinstance(line, Record)]

    @property
    def evaluations(self) -> list[Evaluation]:
        return [line for line in self.lines if isinstance(line, Evaluation)]


def read_run(folder: Path) -> Run:
    """Read a run folder; of its files, only plan.json has to be there.

    Raises:
        RunFolderError: if the folder holds no plan, or a file in it cannot be read as what it is.
    """
    lines: list[Line] = []
    events: list[Event] = []
    name = "plan.json"
    try:
        plan = Plan.from_json((folder / name).read_text(encoding="utf-8"))
        name = "recipe.toml"
        given = _text_of(folder / name)
        name = "outcome.json"
        outcome = {key: str(value) for key, value in json.loads(_text_of(folder / name) or "{}").items()}
        name = "records.jsonl"
        for tree in read_lines(folder / name) if (folder / name).exists() else ():
            if tree["kind"] == "event":
                events.append(_event(tree))
            elif tree["kind"] == "evaluation":
                lines.append(_evaluation(tree))
            elif tree["kind"] == "step":
                lines.append(_record(tree))
        times = None
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # a run is told without them
            found = times_of(folder / "times.jsonl")
            times = goodput(found) if found else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise RunFolderError(
            f"{folder} cannot be reported on.",
            f"{name}: {type(err).__name__}: {err}.",
            "Give the folder of a run, the one that holds plan.json; a damaged file can be restored from a copy.",
        ) from err
    return Run(folder.resolve().name, plan, given, lines, events, outcome, times)


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _record(tree: dict[str, Any]) -> Record:
    return Record(
        step=int(tree["step"]),
        epoch=int(tree["epoch"]),
        loss=float(tree["loss"]),
        weight=float(tree["weight"]),
        grad_norm=float(tree["grad_norm"]),
        lr=float(tree["lr"]),
        applied=int(tree["applied"]),
        skipped=bool(tree["skipped"]),
        scale=float(tree["scale"]),
        seconds=float(tree["seconds"]),
        values={str(name): float(value) for name, value in tree.get("values", {}).items()},
    )


def _evaluation(tree: dict[str, Any]) -> Evaluation:
    metrics = {str(name): float(value) for name, value in tree["metrics"].items()}
    return Evaluation(int(tree["step"]), metrics, bool(tree["best"]), float(tree["seconds"]))


def _event(tree: dict[str, Any]) -> Event:
    detail = {key: value for key, value in tree.items() if key not in ("kind", "step", "name", "text")}
    return Event(int(tree["step"]), str(tree["name"]), str(tree["text"]), detail)
