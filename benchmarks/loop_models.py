"""The losses and the data of ``benchmarks.loop``; its nets are those of ``benchmarks.speed``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def images(num: int, *shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(num, *shape), "y": torch.randint(0, 10, (num,))}


def text(num: int = 4080) -> dict[str, Tensor]:
    tokens = torch.randint(0, 96, (num, 65))
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
