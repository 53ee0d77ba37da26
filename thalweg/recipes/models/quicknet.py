"""A convolutional net for small images that learns fast: a stem meant to be whitened, blocks that pool early, no wasted layer.

The form is that of airbench94 (Jordan 2024, arXiv:2404.00498), with the stem's stride and the widths left open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thalweg.core import ModelError


class QuickNet(nn.Module):
    """Stem, activation, blocks of two convolutions, the largest value of each channel, a linear head without bias.

    Args:
        channels: of the images.
        classes: number of classes.
        stem: filters of the stem: even, so that ``initialise.whiten`` can give it pairs of opposite sign.
        patch: the stem's kernel; a patch of (channels, patch, patch) has to have half as many numbers as there are filters.
        stride: of the stem.
        pooled: whether the largest of each 2 x 2 values of the stem is taken, which makes all that follows four times cheaper.
        widths: channels of the blocks; each halves height and width.
        residual: whether the second convolution of a block adds to its input.
        scale: of the logits; 1/9 is airbench's.
        mean, deviation: of the pixels in [0, 1], taken off first: one number, or one for each channel.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        stem: int = 32,
        patch: int = 5,
        stride: int = 1,
        pooled: bool = True,
        widths: Sequence[int] = (64, 128),
        residual: bool = False,
        scale: float = 1 / 9,
        mean: float | Sequence[float] = 0.5,
        deviation: float | Sequence[float] = 0.25,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        if not widths:
            raise ModelError(
                "QuickNet has no block.", "widths is empty.", "Give the channels of each, such as [64, 128]."
            )
        self.scale, self.pooled = scale, pooled
        self.register_buffer("mean", _each(mean), persistent=False)
        self.register_buffer("deviation", _each(deviation), persistent=False)
        self.stem = nn.Conv2d(channels, stem, patch, stride, padding=(patch - 1) // 2, bias=False)
        self.blocks = nn.Sequential(*(Block(a, b, residual) for a, b in zip((stem, *widths), widths)))
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) for images (batch, channels, height, width), uint8 or floats in [0, 1]."""
        x = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        x = self.stem((x - self.mean) / self.deviation)
        x = nn.functional.gelu(nn.functional.max_pool2d(x, 2) if self.pooled else x)
        x = self.blocks(x)
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits * self.scale


class Block(nn.Module):
    """Convolution, pooling, normalization, GELU; convolution, normalization, GELU."""

    def __init__(self, before: int, after: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        gelu, pool = nn.functional.gelu, nn.functional.max_pool2d
        x = gelu(self.norm1(pool(self.conv1(x), 2)))
        y = self.norm2(self.conv2(x))
        return gelu(x + y if self.residual else y)


def _each(values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
