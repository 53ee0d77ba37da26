"""What a run leaves, and how it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from thalweg.core import Evaluation, Plan, Record, StopReason, flops_use, training_times
from thalweg.core.goodput import Goodput
from thalweg.engine.signals import exit_code

#: False: a new run; True: go on; a step: go on from there; "auto": go on where there is a run, and begin where there is none.
Resume = bool | int | str


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        reason: why it ended.
        model: the trained module; where there is a weight average, it holds the averaged weights, those that were evaluated.
        plan: what was decided.
        records, evaluations: of this process; a resumed run's earlier ones stand in the run folder.
        folder: the run folder, or None.
        sample: what the task's sample function gave, at the end of a finished run.
        signal: the number of the signal that ended the run; 0: none did.
        goodput: where the wall time of the run went, over all its starts; on the first rank, where there is a run folder.
    """

    reason: StopReason
    model: nn.Module
    plan: Plan
    records: list[Record]
    evaluations: list[Evaluation]
    folder: Path | None
    sample: str = ""
    signal: int = 0
    goodput: Goodput | None = None

    @property
    def exit_code(self) -> int:
        """For a command line: 0 done, 3 diverged, 4 not saved, 128 and its number for a signal."""
        return (
            exit_code(self.signal) if self.reason is StopReason.INTERRUPTED and self.signal else self.reason.exit_code
        )

    @property
    def flops_use(self) -> float | None:
        """Model FLOPs use: the share of the operations a second that the chip's data sheet states; None where it is not known."""
        lines: list[Record | Evaluation] = [*self.records, *self.evaluations]
        lines.sort(key=lambda line: (line.step, isinstance(line, Evaluation)))
        return flops_use(self.plan, training_times(lines))

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation's metrics; empty where nothing was evaluated."""
        return self.evaluations[-1].metrics if self.evaluations else {}
