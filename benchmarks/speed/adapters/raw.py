"""A competent loop by hand; ``compile``: the net through torch.compile; ``tuned``: bf16, and channels last for convolutions."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    model = nets.net(w)
    if variant == "tuned":
        w = replace(w, bf16=True)
        model = model.to(memory_format=torch.channels_last)
    params = list(model.parameters())
    optimizer = nets.optimizer(params, feed)
    compiled = torch.compile(model) if variant == "compile" else model
    around = nets.around(w)
    feed.items = nets.as_tensors(feed)
    for i, (x, y) in enumerate(feed, 1):
        with around:
            loss = nets.loss_of(compiled(x), y)
        (loss / w.accumulate if w.accumulate > 1 else loss).backward()
        if i % w.accumulate == 0:
            torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return nets.final_loss(model, w)
