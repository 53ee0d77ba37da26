"""A small convolutional net with batch normalization, for images of a few pixels."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """Three convolutions with batch normalization, one pooling, dropout, a linear head.

    Args:
        classes: number of classes.
        width: channels of the first convolution.
        dropout: rate before the head.
    """

    def __init__(self, classes: int = 10, width: int = 32, dropout: float = 0.2) -> None:
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(((1, width), (width, 2 * width), (2 * width, 2 * width))):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if i == 1:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, classes)]
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) for images (batch, 1, height, width)."""
        for layer in self:
            images = layer(images)
        return images
