"""pytorch-ignite's Engine around a step by hand; not ``bare``: the log and checkpoints of its quickstart, by 100 and 500."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ModelCheckpoint

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    model, around = nets.net(w), nets.around(w)
    params = list(model.parameters())
    optimizer = nets.optimizer(params, feed)

    def update(engine: Engine, batch: Any) -> float:
        with around:
            loss = nets.loss_of(model(batch[0]), batch[1])
        (loss / w.accumulate if w.accumulate > 1 else loss).backward()
        if engine.state.iteration % w.accumulate == 0:
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    engine = Engine(update)
    if variant != "bare":
        every = Events.ITERATION_COMPLETED
        engine.add_event_handler(every(every=100), lambda e: print(f"{e.state.iteration}: {e.state.output:.2f}"))
        save = ModelCheckpoint("ignite", n_saved=2, require_empty=False)
        engine.add_event_handler(every(every=500), save, {"model": model, "optimizer": optimizer})
    engine.run(nets.loader(feed), max_epochs=1)
    return nets.final_loss(model, w)
