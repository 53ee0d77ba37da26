"""Accelerate, as the loop of its documentation. It logs and saves what its user writes, here nothing."""

from __future__ import annotations

from accelerate import Accelerator

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    precision = "bf16" if w.bf16 else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=w.accumulate)
    plain = nets.net(w)
    made = nets.optimizer(plain.parameters(), feed)
    model, optimizer, data = accelerator.prepare(plain, made, nets.loader(feed))
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nets.loss_of(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return nets.final_loss(plain, w)
