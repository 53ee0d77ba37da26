"""thalweg.train with its records, progress, guard and checkpoints; ``auto`` leaves precision, compiling and the rest to it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

import thalweg
from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, DECAY, LR, Workload
from thalweg.watch import Terminal


class Source:
    """In-memory samples; from the run's first step on, the feed hears of what is taken."""

    def __init__(self, feed: Feed, batch: int) -> None:
        self.feed, self.batch, self.begun = feed, batch, False
        self.x, self.y = (torch.cat(parts) for parts in zip(*nets.as_tensors(feed)))
        if feed.updates is not None:  # so few that they fit in one epoch: the samples lie where it looks for them
            order = thalweg.data.Order(feed.updates * batch, batch, seed=0, keep_last=True)
            looked = torch.as_tensor([int(i) for step in range(feed.updates) for i in order.window(step)[1]])
            self.x, self.y = (part[looked.argsort() % len(part)] for part in (self.x, self.y))

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.begun and self.feed.updates is None:
            self.feed.draw(len(indices) // self.batch)
        return {"x": self.x.index_select(0, indices), "y": self.y.index_select(0, indices)}


class Progress(Terminal):
    def start(self, plan: Any, step: int) -> None:
        self.source.begun = True
        self.source.feed.note = f"{plan.recipe.precision}, compile={plan.recipe.compile}"
        super().start(plan, step)

    def steps(self, records: list[Any]) -> None:
        self.source.feed.first_update()  # up to a quarter of a second late
        super().steps(records)


def run(w: Workload, feed: Feed, variant: str) -> float:
    batch, model, progress = w.batch * w.accumulate, nets.net(w), Progress()
    progress.source = source = Source(feed, batch)
    recipe = {"optimizer.lr": LR, "optimizer.weight_decay": DECAY, "optimizer.no_decay": [], "train.clip": CLIP}
    recipe |= {"train.batch": batch, "train.micro_batch": w.batch, "train.steps": feed.limit}
    recipe["schedule.lr"] = "constant()"
    if variant != "auto":
        recipe |= {"precision": "bf16" if w.bf16 else "fp32", "compile": "off"}
    loss = lambda model, part: nets.loss_of(model(part["x"]), part["y"])
    with tempfile.TemporaryDirectory() as folder:
        thalweg.train(model, loss, source, recipe, folder=folder, sinks=[progress])
    return nets.final_loss(model, w)
