"""A plain, competent loop for small images, in torch alone: what ``benchmarks.road_images`` measures the recipes against.

Fashion-MNIST: three convolutions with batch normalization (32, 64, 128), pooling after each, dropout, a linear head: 104 thousand
parameters. AdamW at 3e-3 with decay 0.02 under one-cycle, batches of 128, float32, eager. Shifts and flips are left out there: in
eight epochs of so small a net they cost more than they give (91.8 % at the end with them, 93.1 % without).
CIFAR-10: the same loop on colour images, with shifts by up to 2 pixels and flips.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = 2


def net(channels: int, side: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = channels
    for width in (32, 64, 128):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        before, side = width, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(before * side * side, 10))


def moved(images: Tensor, fill: Tensor) -> Tensor:
    """Each image shifted by up to 2 pixels each way and flipped half of the time, in one gather."""
    num, channels, side, _ = images.shape
    padded = (F.pad(images - fill, (PAD,) * 4) + fill).flatten(2)
    places = torch.arange(side)
    down, right = torch.randint(0, 2 * PAD + 1, (2, num, 1))
    columns = torch.where(torch.rand(num, 1) < 0.5, side - 1 - places, places) + right
    where = ((places + down)[:, :, None] * (side + 2 * PAD) + columns[:, None, :]).view(num, 1, -1)
    return padded.gather(2, where.expand(-1, channels, -1)).view_as(images)


def train(
    data: dict[str, dict[str, Tensor]],
    mean: Tensor,
    deviation: Tensor,
    *,
    epochs: float,
    seed: int,
    heard: Callable[[dict[str, Any]], bool],
    augment: bool = False,
    best_form: bool = False,
    a_pass: int = 4,
) -> None:
    """Train and evaluate, ``a_pass`` times an epoch.

    Args:
        data: "train" and "test": uint8 images (n, channels, side, side), labels (n,).
        epochs: of the whole schedule.
        heard: told of each evaluation: step, seconds of training, accuracy; True ends the run.
        augment: shift and flip.
        best_form: channels last and bfloat16 under autocast.
    """
    torch.manual_seed(seed)
    ready = {part: (one["images"].float() / 255 - mean) / deviation for part, one in data.items()}
    images, labels = ready["train"], data["train"]["labels"]
    model = net(images.shape[1], images.shape[-1])
    if best_form:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch, whole = 128, len(images) // 128
    steps, every = int(epochs * whole), max(1, whole // a_pass)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    trained, began = 0.0, time.perf_counter()
    order = torch.empty(0)
    for step in range(steps):
        if step % whole == 0:
            order = torch.randperm(len(images))
        taken = order[(step % whole) * batch :][:batch]
        x = moved(images[taken], -mean / deviation) if augment else images[taken]
        if best_form:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=best_form):
            loss = F.cross_entropy(model(x), labels[taken])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rates.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            trained += time.perf_counter() - began
            right = accuracy(model, ready["test"], data["test"]["labels"], best_form)
            if heard({"step": step + 1, "seconds": trained, "accuracy": right}):
                return
            began = time.perf_counter()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, best_form: bool) -> float:
    model.eval()
    right = 0
    for start in range(0, len(images), 500):
        with torch.autocast("cpu", torch.bfloat16, enabled=best_form):
            found = model(images[start : start + 500]).argmax(1)
        right += int((found == labels[start : start + 500]).sum())
    model.train()
    return right / len(images)
