"""Layers that leave values out while training: Dropout and its relatives by channel, block and branch.

All keep the mean: what stays is scaled up. In evaluation each returns what it was given, the same tensor. Rates are
resolved to 2**-24.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.core import ModelError
from thalweg.regularize.keyed import Keyed

_UNIT = 2**24
_SELU_FLOOR = -1.7580993408473766  # what SELU tends to: -scale * alpha

MODES = ("row", "batch")


def check_rate(what: str, p: float) -> float:
    """``p``, if it is a rate in [0, 1).

    Raises:
        ModelError: if not.
    """
    if isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p < 1:
        return float(p)
    raise ModelError(
        f"{what}(p={p!r}) is no rate of dropout.",
        "p is the share that is left out, from 0 to below 1: what stays is scaled by 1/(1 - p).",
        "Use p=0 for none, or take the part out of the model instead of dropping all of it.",
    )


class Drop(Keyed):
    """A layer with a rate.

    Attributes:
        p: share that is left out, in [0, 1).
        factor: None, or a 0-dim tensor that ``p`` is multiplied by; the product is held to [0, 1).
    """

    p: float

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = check_rate(type(self).__name__, p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def _chance(self, p: float) -> tuple[int | Tensor, float | Tensor]:
        """(the lowest bits that are kept, the share that is left out), at rate ``p`` times the factor."""
        units = min(round(p * _UNIT), _UNIT - 1)
        if self.factor is None:
            return (units - _UNIT // 2) * 256, units / _UNIT
        part = (self.factor.to(torch.float32) * units).round().clamp(0, _UNIT - 1)
        return (part.to(torch.int32) - _UNIT // 2) * 256, part / _UNIT

    def _kept(self, x: Tensor, bits: Tensor) -> Tensor:
        """``x`` where ``bits`` say so, scaled; ``bits`` are used up."""
        lowest, rate = self._chance(self.p)
        return x * bits.ge_(lowest).to(x.dtype) * (1 / (1 - rate))


class Dropout(Drop):
    """Each value is left out with probability p; the others are divided by 1 - p.

    Args:
        p: in [0, 1).

    References: Srivastava et al. 2014, JMLR 15(56).

    >>> Dropout(0.1).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, samples first."""
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        return self._kept(x, self.sample_bits(x, x.shape))


class SpatialDropout(Drop):
    """Each channel of each sample is left out whole with probability p; the others are divided by 1 - p.

    Args:
        p: in [0, 1).

    References: Tompson et al. 2015, arXiv:1411.4280; torch's Dropout1d, 2d and 3d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, channels, places...), with one to three dimensions of places."""
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        return self._kept(x, self.sample_bits(x, _channels(x, "SpatialDropout")))


class AlphaDropout(Drop):
    """Dropout for SELU: what is left out takes SELU's lowest value; then y -> a*y + b keeps mean 0 and variance 1.

    With q = 1 - p and c = -1.7581: a = 1/sqrt(q*(1 + p*c**2)), b = -a*p*c.

    Args:
        p: in [0, 1).

    References: Klambauer et al. 2017, arXiv:1706.02515.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, samples first."""
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        return self._moved(x, self.sample_bits(x, x.shape))

    def _moved(self, x: Tensor, bits: Tensor) -> Tensor:
        lowest, rate = self._chance(self.p)
        a = ((1 - rate) * (1 + rate * _SELU_FLOOR**2)) ** -0.5
        keep = bits.ge_(lowest).to(x.dtype)
        return (x * keep + (1 - keep) * _SELU_FLOOR) * a - a * rate * _SELU_FLOOR


class FeatureAlphaDropout(AlphaDropout):
    """AlphaDropout of whole channels.

    Args:
        p: in [0, 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, channels, places...), with one to three dimensions of places."""
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        return self._moved(x, self.sample_bits(x, _channels(x, "FeatureAlphaDropout")))


class DropBlock(Drop):
    """Squares of ``size`` x ``size`` places are left out, in each channel by itself.

    The squares' corners are drawn where a whole square fits, each with probability
    gamma = p/size**2 * H*W/((H - size + 1)*(W - size + 1)). What stays of a sample is multiplied by
    count(mask)/count_ones(mask), both over that sample. Along a side shorter than ``size``, a square is as long as the side.

    Args:
        p: in [0, 1). As in the paper the share that is left out is a little below it, since squares overlap.
        size: of the squares, in places.

    Departures: the paper does not say over what it counts; its authors' code counts over the batch. Counted over the sample,
    the result does not hang on how a batch is split.

    References: Ghiasi, Lin and Le 2018, arXiv:1810.12890, algorithm 1.
    """

    def __init__(self, p: float, size: int = 7) -> None:
        super().__init__(p)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ModelError(f"DropBlock(size={size!r}) has no squares.", "size counts places.", "Use 1 or more.")
        self.size = size

    def extra_repr(self) -> str:
        return f"p={self.p:g}, size={self.size}"

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, channels, H, W)."""
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        if x.ndim != 4:
            raise _wrong_shape(x, "DropBlock", "(samples, channels, height, width)")
        B, C, H, W = x.shape
        h, w = min(self.size, H), min(self.size, W)
        gamma = self.p / (h * w) * (H * W) / ((H - h + 1) * (W - w + 1))
        lowest, _ = self._chance(gamma)
        with torch.no_grad():
            corners = (self.sample_bits(x, (B, C, H - h + 1, W - w + 1)) < lowest).to(torch.float32)
            spread = F.pad(corners, (w - 1, w - 1, h - 1, h - 1))
            mask = 1 - F.max_pool2d(spread, (h, w), stride=1)
            mask = mask * (C * H * W / mask.sum((1, 2, 3), keepdim=True).clamp(min=1))
        return x * mask.to(x.dtype)


class StochasticDepth(Drop):
    """A residual branch is left out whole with probability p; otherwise it is divided by 1 - p.

    Put it last in the branch: ``x + depth(branch(x))``.

    Args:
        p: in [0, 1).
        mode: "row": each sample by itself. "batch": all samples of a step together, over all its micro-batches.

    Departures: the paper scales by 1 - p when evaluating; scaled while training, evaluation needs nothing.

    References: Huang et al. 2016, arXiv:1603.09382; "row" is timm's DropPath.
    """

    rate: ClassVar[str] = "stochastic_depth"

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__(p)
        if mode not in MODES:
            raise ModelError(
                f"StochasticDepth(mode={mode!r}) is not known.", f"Modes: {', '.join(MODES)}.", "Use one of these."
            )
        self.mode = mode

    def extra_repr(self) -> str:
        return f"p={self.p:g}, mode={self.mode}"

    def forward(self, x: Tensor) -> Tensor:
        """x: the branch's output, samples first."""
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        if self.mode == "batch":
            return self._kept(x, self.step_bits(x, (1,) * x.ndim, by_call=True))
        return self._kept(x, self.sample_bits(x, (*x.shape[:1], *(1,) * (x.ndim - 1))))


def _channels(x: Tensor, layer: str) -> tuple[int, ...]:
    if not 3 <= x.ndim <= 5:
        raise _wrong_shape(x, layer, "(samples, channels, places...)")
    return (*x.shape[:2], *(1,) * (x.ndim - 2))


def _wrong_shape(x: Tensor, layer: str, wanted: str) -> ModelError:
    return ModelError(
        f"{layer} was given a tensor of shape {tuple(x.shape)}.",
        f"It takes {wanted}.",
        "Add the dimension that is missing, or use Dropout, which takes any shape.",
    )
