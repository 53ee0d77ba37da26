"""A task whose samples are read by workers and drawn from every generator there is."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.core import Loss, Split, Task

NUM = 96
HANG = "THALWEG_FAULTS_HANG"  # a step at which the loss never returns


class Noisy:
    """Samples that hold their own number, and noise."""

    def __init__(self, num: int = NUM, shift: int = 0, seconds: float = 0.001) -> None:
        self.num, self.shift, self.seconds = num, shift, seconds

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        noise = torch.randn(6) * 0.1 + random.random() + float(np.random.rand())
        x = torch.full((6,), (index + self.shift) / self.num) + noise
        return {"id": torch.tensor(index), "x": x, "y": torch.tensor(index % 3)}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 3))


_calls = 0


def loss(model: nn.Module, batch: Any) -> Loss:
    global _calls
    _calls += model.training
    if _calls == int(os.environ.get(HANG, "-1")):
        time.sleep(600)
    total = F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
    return Loss(total, len(batch["y"]))


def data() -> Split:
    return Split(train=Noisy(), test=Noisy(36, shift=7))


items = Task(name="items", unit="samples", model=net, loss=loss, data=data, recipe={"optimizer.lr": 0.01})
