"""A Record is what one step has to say; the end of a run is a value."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class StopReason(enum.Enum):
    """Why a run ended; ``advice`` is a sentence that a person can act on."""

    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    REACHED = "target reached"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"
    UNSAVED = "not saved"
    FAILED = "failed"

    @property
    def advice(self) -> str:
        return {
            StopReason.FINISHED: "All steps are done.",
            StopReason.STOPPED_EARLY: "Evaluations stopped improving (evaluate.patience); the model is the best of them.",
            StopReason.REACHED: "An evaluation is as good as evaluate.target; the model is that of this step.",
            StopReason.INTERRUPTED: "Stopped between two steps. With a run folder, the state is saved and --resume goes on.",
            StopReason.DIVERGED: "There were more steps that are not finite or far out of line than the recipe's guard allows, "
            "and none of those steps was applied. Lower optimizer.lr, lengthen the warm-up, or look for NaN or infinity in the "
            "data.",
            StopReason.UNSAVED: "The state could not be saved, and is in memory alone. Mend what the message above names; "
            "--resume goes on from the newest checkpoint.",
            StopReason.FAILED: "The run broke off. With a run folder, --resume goes on from its newest checkpoint.",
        }[self]

    @property
    def exit_code(self) -> int:
        """For a command line; a run that a signal ended says which: 128 and its number (``Result.exit_code``)."""
        codes = {
            "finished": 0,
            "stopped early": 0,
            "target reached": 0,
            "interrupted": 130,
            "diverged": 3,
            "not saved": 4,
            "failed": 1,
        }
        return codes[self.value]


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        step: steps attempted, this one included; from 1.
        epoch: the epoch that this step's samples come from; from 0.
        loss: sum of losses over sum of weights, before the update.
        weight: the sum of weights (tokens or samples).
        grad_norm: global norm of the mean gradient, before clipping.
        lr: the learning rate of this step.
        applied: updates applied so far; smaller than ``step`` by the number of skipped steps.
        skipped: whether this step was not applied, because its loss or gradient was not finite, or a spike (``guard``).
        scale: the loss scale; 1 but for fp16.
        seconds: wall time since the run (this attempt) began; with ``waited`` the only fields that two equal runs do not share.
        values: what else is scheduled, by name.
        waited: seconds that this step waited for its data.
    """

    step: int
    epoch: int
    loss: float
    weight: float
    grad_norm: float
    lr: float
    applied: int
    skipped: bool
    scale: float
    seconds: float
    values: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0

    def to_json(self) -> str:
        """``to_dict`` as JSON, four times as fast as by its own way: small steps are no longer than their records otherwise."""
        numbers = (self.loss, self.weight, self.grad_norm, self.lr, self.scale, self.seconds, self.waited)
        if self.values or {*map(type, numbers)} != {float} or not all(map(math.isfinite, numbers)):
            return json.dumps(self.to_dict())
        return (
            f'{{"kind": "step", "step": {self.step}, "epoch": {self.epoch}, "loss": {self.loss!r}, "weight": {self.weight!r}, '
            f'"grad_norm": {self.grad_norm!r}, "lr": {self.lr!r}, "applied": {self.applied}, '
            f'"skipped": {"true" if self.skipped else "false"}, "scale": {self.scale!r}, "seconds": {self.seconds!r}'
            + (f', "waited": {self.waited!r}}}' if self.waited else "}")
        )

    def to_dict(self) -> dict[str, Any]:
        told = {k: v for k, v in vars(self).items() if k != "values" and (k != "waited" or v)}
        return {"kind": "step", **_jsonable(told), **({"values": _jsonable(self.values)} if self.values else {})}


@dataclass(frozen=True)
class Evaluation:
    """Metrics over held-out data after ``step`` steps, with the averaged weights where there is an average."""

    step: int
    metrics: dict[str, float]
    best: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        rest = {"step": self.step, "best": self.best, "seconds": self.seconds}
        return {"kind": "evaluation", **rest, "metrics": _jsonable(self.metrics)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


@dataclass(frozen=True)
class Event:
    """Something that a person should know, such as a checkpoint saved or a damaged one passed over."""

    step: int
    name: str
    text: str
    detail: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "event", "step": self.step, "name": self.name, "text": self.text, **_jsonable(self.detail)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they are written as texts that float() reads back."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record file; a torn last line, as a kill leaves it, is passed over."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
