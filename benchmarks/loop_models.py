"""The nets of ``benchmarks.loop``: what the published loops are measured on, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: (channels in, channels out, stride) of each residual block.
BLOCKS = ((32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def normed(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution and its batch normalization."""
    conv = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


class Cnn(nn.Module):
    """Three convolutions for images of 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = normed(1, 32), normed(32, 64), normed(64, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(images)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(F.relu(self.third(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = normed(before, after, 3, stride), normed(after, after)
        same = (before, stride) == (after, 1)
        self.short = nn.Identity() if same else normed(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


class ResNet(nn.Module):
    """Eight residual blocks, as of ResNet-18, at half its width, for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = normed(3, 32), nn.Sequential(*(Residual(*block) for block in BLOCKS))
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(images))).mean((2, 3)))


def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def images(num: int, *shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(num, *shape), "y": torch.randint(0, 10, (num,))}


def text(num: int = 4080) -> dict[str, Tensor]:
    tokens = torch.randint(0, 96, (num, 65))
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
