"""Lightning Fabric, as the loop of its documentation. It logs and saves what its user writes, here nothing."""

from __future__ import annotations

from lightning.fabric import Fabric

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, Workload


def run(w: Workload, feed: Feed, variant: str) -> float:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if w.bf16 else "32-true")
    fabric.launch()
    plain = nets.net(w)
    model, optimizer = fabric.setup(plain, nets.optimizer(plain.parameters(), feed))
    for i, (x, y) in enumerate(fabric.setup_dataloaders(nets.loader(feed)), 1):
        last = i % w.accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(nets.loss_of(model(x), y) / w.accumulate)
        if last:
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return nets.final_loss(plain, w)
