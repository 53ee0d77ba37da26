"""A run that writes down which samples its data set was asked for, and which its loss saw: a line each, after every step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import thalweg
from tests.faults import tasks
from thalweg.core import Split

NUM, BATCH, STEPS = 48, 8, 36  # six epochs


class _Ledger:
    """Lines that are in the file at once, whoever writes them."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, *words: object) -> None:
        os.write(self.handle, (" ".join(map(str, words)) + "\n").encode())


class Asked(tasks.Noisy):
    """Writes down each sample that it is asked for."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__(NUM, seconds=0.002)
        self.ledger = ledger

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.ledger.write("asked", index)
        return super().__getitem__(index)


class _Begun:
    """A sink; told right before the first step, when all that looks ahead is behind."""

    def __init__(self, ledger: _Ledger) -> None:
        self.ledger = ledger

    def start(self, plan: Any, step: int) -> None:
        self.ledger.write("begin", step)

    def steps(self, records: Any) -> None: ...
    def evaluation(self, evaluation: Any) -> None: ...
    def event(self, event: Any) -> None: ...
    def stop(self, reason: Any) -> None:
        self.ledger.write("end", reason.value)


def main(arguments: list[str]) -> int:
    """FOLDER WORKERS KIND: train, or go on."""
    folder, workers, kind = Path(arguments[0]), int(arguments[1]), arguments[2]
    ledger = _Ledger(folder.parent / f"{folder.name}.ledger")

    def loss(model: Any, batch: Any) -> Any:
        if model.training and torch.is_grad_enabled():
            ledger.write("saw", *batch["id"].tolist())
        return tasks.loss(model, batch)

    whole = {"id": torch.arange(NUM), "x": torch.randn(NUM, 6), "y": torch.arange(NUM) % 3}
    recipe = {
        "precision": "fp32",
        "train.steps": STEPS,
        "train.batch": BATCH,
        "train.micro_batch": 4,
        "data.workers": workers,
        "checkpoint.every": 2,
        "evaluate.every": 0,
    }
    data = Split(train=Asked(ledger) if kind == "dataset" else whole)
    result = thalweg.train(tasks.net(), loss, data, recipe, folder=folder, resume="auto", sinks=[_Begun(ledger)])
    return result.exit_code
