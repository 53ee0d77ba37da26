"""Lightning's Trainer: ``bare`` with all that is optional off; else its defaults, and the loss logged."""

from __future__ import annotations

import warnings

import lightning
import torch

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, Workload

OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Module(lightning.LightningModule):
    def __init__(self, w: Workload, feed: Feed, logs: bool) -> None:
        super().__init__()
        self.net, self.w, self.feed, self.logs = nets.net(w), w, feed, logs

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nets.loss_of(self.net(batch[0]), batch[1])
        if self.logs:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # It refuses to clip beside a fused optimizer in mixed precision.
        return nets.optimizer(self.net.parameters(), self.feed, fused=not self.w.bf16)


def run(w: Workload, feed: Feed, variant: str) -> float:
    warnings.simplefilter("ignore")
    module = Module(w, feed, logs=variant != "bare")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=CLIP,
        accumulate_grad_batches=w.accumulate,
        precision="bf16-mixed" if w.bf16 else "32-true",
        **(OFF if variant == "bare" else {}),
    )
    trainer.fit(module, nets.loader(feed))
    return nets.final_loss(module.net, w)
