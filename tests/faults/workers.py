"""Data workers that are killed, or hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import thalweg
from tests.faults.core import Given, Row, fault
from tests.faults.tasks import NUM, Noisy, loss, net
from thalweg.core import Split, StopReason
from thalweg.watch import Memory

RECIPE = {
    "precision": "fp32",
    "train.steps": 24,
    "train.batch": 8,
    "train.micro_batch": 4,
    "data.workers": 2,
    "evaluate.every": 0,
    "regularize.average": 0.9,
}


class Trap(Noisy):
    """One sample harms the process that reads it, the first time.

    Args:
        at: the sample; None: none does.
        kind: "killed" or "hung".
        mark: a file that says that it has happened.
    """

    def __init__(self, at: int | None, kind: str, mark: Path) -> None:
        super().__init__(seconds=0.0)
        self.at, self.kind, self.mark = at, kind, mark

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.at and not self.mark.exists():
            self.mark.touch()
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().__getitem__(index)


def _go(data: Noisy, **changes: Any) -> tuple[Any, Memory]:
    torch.manual_seed(0)
    sink = Memory()
    return thalweg.train(net(), loss, Split(train=data), {**RECIPE, **changes}, sinks=[sink]), sink


def _restarted(row: Row, given: Given, kind: str) -> None:
    whole = _go(Trap(None, kind, given.folder))[0].model.state_dict()
    for number in range(given.times):
        mark = given.folder / f"mark-{number}"
        at = given.draw.randrange(NUM)
        with row.trial(f"at sample {at}"):
            result, _ = _go(Trap(at, kind, mark), **{"data.timeout": 3.0})
            assert mark.exists() and result.reason is StopReason.FINISHED
            again = result.model.state_dict()
            assert all(torch.equal(again[name], whole[name]) for name in whole), "other bits"


@fault("a data worker is killed", times=20, quick=2)
def killed(row: Row, given: Given) -> None:
    """It is started again, with what it was about to read; the run ends with the same bits."""
    _restarted(row, given, "killed")


@fault("a data worker hangs", times=10, quick=1)
def hung(row: Row, given: Given) -> None:
    """After ``data.timeout`` seconds the same."""
    _restarted(row, given, "hung")
