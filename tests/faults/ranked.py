"""A task for several ranks that writes down which samples each step saw, and takes its time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.core import Loss, Split, Task
from thalweg.data import Order
from thalweg.engine import Step

NUM, BATCH, MICRO = 60, 16, 4  # the last window of an epoch has 12 samples: three micro-batches
LEDGER = "THALWEG_RANKED_LEDGER"  # a folder for the lines
PAUSE = 0.04  # seconds that a micro-batch takes
_now: list[int] = []


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 3)).double()


def loss(model: nn.Module, batch: Any) -> Loss:
    if _now and model.training:
        _note(_now[0], batch["id"].tolist())
        time.sleep(PAUSE)
    return Loss(F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"]))


def _note(step: int, samples: list[int]) -> None:
    """A line that is in the file at once."""
    if folder := os.environ.get(LEDGER):
        group = os.environ.get("MASTER_PORT")  # one that meets anew has another, often
        who = {"group": group, "rank": os.environ.get("RANK", "0"), "process": os.getpid()}
        line = json.dumps({"step": step, "samples": samples, "at": time.time(), **who})
        handle = os.open(
            Path(folder, f"rank-{os.environ.get('RANK', '0')}-{os.getpid()}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.write(handle, line.encode() + b"\n")
        os.close(handle)


def counted(patch: Any = None) -> None:
    """What the loss sees in steps is noted, and not what it sees in trials.

    Args:
        patch: a pytest.MonkeyPatch that takes it back; None: it stays.
    """
    plain = Step.run

    def run(self: Step, window: Any) -> Tensor:
        _now.append(self.state.step)
        try:
            return plain(self, window)
        finally:
            _now.clear()

    if patch is not None:
        patch.setattr(Step, "run", run)
    else:
        Step.run = run  # type: ignore[method-assign]


def data() -> Split:
    if LEDGER in os.environ:
        counted()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(NUM + 20, 6, generator=draw, dtype=torch.float64)
    whole = {"id": torch.arange(NUM + 20), "x": x, "y": (x[:, 0] > 0).long() + (x[:, 1] > 0).long()}
    return Split(train={k: v[:NUM] for k, v in whole.items()}, test={k: v[NUM:] for k, v in whole.items()})


def each_once(folder: Path, steps: int) -> None:
    """In the ledger, the last time that a step was made its samples were those of its window, each once.

    Raises:
        AssertionError: if not.
    """
    told = [json.loads(line) for file in folder.glob("rank-*") for line in file.read_text().splitlines()]
    order = Order(NUM, BATCH, seed=0, keep_last=True)
    for step in range(steps):
        lines = [line for line in told if line["step"] == step]
        assert lines, f"step {step} was never made"
        last = max(lines, key=lambda line: line["at"])["group"]
        ranks = {
            line["rank"]: line["process"] for line in sorted(lines, key=lambda x: x["at"]) if line["group"] == last
        }
        mine = [line for line in lines if line["group"] == last and line["process"] == ranks[line["rank"]]]
        saw = sorted(sample for line in mine for sample in line["samples"])
        wanted = sorted(map(int, order.window(step)[1]))
        assert saw == wanted, f"step {step} saw {saw}, and its window is {wanted}"


task = Task(
    name="ranked",
    unit="samples",
    model=net,
    loss=loss,
    data=data,
    recipe={
        "precision": "fp32",
        "optimizer.lr": 0.01,
        "regularize.average": 0.9,
        "train.batch": BATCH,
        "train.micro_batch": MICRO,
        "train.steps": 60,
        "evaluate.every": 15,
        "checkpoint.every": 4,
    },
)
