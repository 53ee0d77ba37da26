"""skorch's NeuralNet; ``bare`` prints no table. It accumulates through the ``train_step`` of its documentation; bf16 by hand."""

from __future__ import annotations

from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Checkpoint, GradientNormClipping
from torch.utils.data import DataLoader

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, LR, Workload


class Net(NeuralNet):
    accumulate, micro = 1, 0

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        return DataLoader(dataset, batch_size=None, collate_fn=nets.as_it_is)

    def train_step(self, batch: Any, **params: Any) -> Any:
        if self.accumulate == 1:
            return super().train_step(batch, **params)
        self.micro += 1
        step = self.train_step_single(batch, **params)
        if self.micro % self.accumulate == 0:
            torch.nn.utils.clip_grad_norm_(self.module_.parameters(), CLIP)
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


class MeanLoss(torch.nn.Module):
    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.accumulate = accumulate

    def forward(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nets.loss_of(out, y) / self.accumulate if self.accumulate > 1 else nets.loss_of(out, y)


def run(w: Workload, feed: Feed, variant: str) -> float:
    callbacks = [GradientNormClipping(CLIP)]
    options: dict[str, Any] = {"callbacks__print_log": None, "verbose": 0} if variant == "bare" else {}
    if variant != "bare":
        callbacks.append(Checkpoint(dirname="skorch", monitor=None))
    fused = lambda groups, **_: nets.optimizer([p for g in groups for p in g["params"]], feed)
    data = {"max_epochs": 1, "train_split": None, "criterion__accumulate": w.accumulate}
    net = Net(nets.wrapped(w), MeanLoss, optimizer=fused, lr=LR, callbacks=callbacks, **data, **options)
    net.accumulate = w.accumulate
    net.partial_fit(nets.Data(feed), y=None)
    return nets.final_loss(net.module_, w)
