"""transformers.Trainer: ``bare`` without bar, log and checkpoints; else its defaults, both every 500 updates."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from benchmarks.speed import nets
from benchmarks.speed.feed import Feed
from benchmarks.speed.workloads import CLIP, Workload

OFF = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "report_to": "none"}


class Net(torch.nn.Module):
    """It wants a model that gives its own loss."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.net = nets.net(w)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": nets.loss_of(out, labels), "logits": out}


class Ready(Trainer):
    def get_train_dataloader(self) -> Any:
        form = lambda batch: {"x": batch[0], "labels": batch[1]}
        return self.accelerator.prepare(nets.loader(self.train_dataset, form=form))


def run(w: Workload, feed: Feed, variant: str) -> float:
    warnings.simplefilter("ignore")
    net = Net(w)
    optimizer = nets.optimizer(net.parameters(), feed)
    arguments = TrainingArguments(
        "hf",
        max_steps=feed.updates or 10**9,
        per_device_train_batch_size=w.batch,
        gradient_accumulation_steps=w.accumulate,
        max_grad_norm=CLIP,
        bf16=w.bf16,
        use_cpu=True,
        **(OFF if variant == "bare" else {}),
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Ready(net, arguments, train_dataset=feed, optimizers=(optimizer, constant)).train()
    return nets.final_loss(net.net, w)
