"""Random transforms of images: each draws a fixed number of uniforms an image, so that it is a function of the sample alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.core import DataError, LastingDraw, RecipeError, Registry
from thalweg.regularize import images as ops

#: ``draw(num)``: (samples, num) float32 in [0, 1), on the CPU, a function of (seed, epoch, sample); each call goes on.
Draw = Callable[[int], Tensor]
#: ``transform(images, draw)``: images (samples, channels, height, width), floats in [0, 1] or uint8.
Transform = Callable[[Tensor, Draw], Tensor]

TRANSFORMS: Registry[Callable[..., Transform]] = Registry("image transform")


def named(make: Callable[..., Transform]) -> Callable[..., Transform]:
    """Register a maker of transforms under its own name."""
    return TRANSFORMS.add(make.__name__, make)


def in_range(name: str, value: float, low: float, high: float, *, whole: bool = False) -> None:
    """
    Raises:
        RecipeError: for a number outside [low, high], or no whole one where it must be.
    """
    if not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        limits = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise RecipeError(
            f"{name}={value:g} is out of range.", f"It must be {kind}, {limits}.", "Give one in that range."
        )


def _drawn(images: Tensor, draw: Draw, num: int) -> tuple[Tensor, ...]:
    """``num`` tensors of (samples,) uniforms, on the device of the images."""
    return draw(num).to(images.device, non_blocking=True).unbind(1)


def _signed(uniform: Tensor, most: float) -> Tensor:
    return (2 * uniform - 1) * most


def _whole_below(uniform: Tensor, num: Tensor | int) -> Tensor:
    """Integers in [0, num)."""
    return (uniform * num).to(torch.int64)


@named
def flip(p: float = 0.5, alternate: float = 0) -> Transform:
    """Left and right change places with probability ``p``.

    Args:
        alternate: true: which images those are is drawn once, for the first epoch; in the second it is the others, and so on,
            so that two epochs show each image both ways (airbench, arXiv:2404.00498).
    """
    in_range("p", p, 0, 1)
    if not alternate:
        return lambda images, draw: ops.flipped(images, _drawn(images, draw, 1)[0] < p)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        if not isinstance(draw, LastingDraw):
            raise DataError(
                "flip(alternate=true) has to know the epoch of its samples.",
                f"The draw that it was given, a {type(draw).__name__}, has numbers for one epoch alone.",
                "Use it in a recipe's regularize.augment on data in memory, or flip() here.",
            )
        first = draw.lasting(1)[:, 0] < p
        return ops.flipped(images, (first ^ bool(draw.epoch % 2)).to(images.device, non_blocking=True))

    return apply


@named
def crop(pad: float, reflect: float = 0) -> Transform:
    """A window of the padded image: a shift by up to ``pad`` whole pixels each way. Padding is 0, or reflected."""
    in_range("pad", pad, 0, math.inf, whole=True)
    most = int(pad)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        if reflect and most >= min(images.shape[-2:]):
            raise DataError(
                f"crop({most}, reflect=true) reaches beyond the image.",
                f"Images are {images.shape[-2]} x {images.shape[-1]} pixels.",
                "Give fewer pixels, or pad with 0.",
            )
        down, right = (_whole_below(u, 2 * most + 1) - most for u in _drawn(images, draw, 2))
        return ops.shifted(images, down, right, most, reflect=bool(reflect))

    return apply


@named
def random_resized_crop(low: float = 0.08, high: float = 1.0, aspect: float = 4 / 3) -> Transform:
    """A part of the image with ``low`` to ``high`` of its area and sides of up to ``aspect``, blown up to its size.

    Departures: sides longer than the image are cut to it, where torchvision draws again up to ten times.
    """
    in_range("low", low, 1e-6, 1)
    in_range("high", high, low, 1)
    in_range("aspect", aspect, 1, math.inf)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        area, shape, down, right = _drawn(images, draw, 4)
        side, longer = torch.sqrt(low + (high - low) * area), torch.exp(_signed(shape, math.log(aspect) / 2))
        wide, high_ = (side * longer).clamp(max=1), (side / longer).clamp(max=1)  # as shares of the image
        x, y = ((1 - wide) * (right - 0.5) * images.shape[-1], (1 - high_) * (down - 0.5) * images.shape[-2])
        zero = torch.zeros_like(wide)
        return ops.warped(images, torch.stack((wide, zero, x, zero, high_, y), -1).view(-1, 2, 3), border=True)

    return apply


@named
def cutout(size: float, fill: float = 0.0) -> Transform:
    """A square of ``size`` pixels around a random pixel becomes ``fill`` (DeVries and Taylor 2017, arXiv:1708.04552)."""
    in_range("size", size, 0, math.inf, whole=True)
    in_range("fill", fill, 0, 1)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        y, x = _drawn(images, draw, 2)
        top, left = (_whole_below(u, n) - int(size) // 2 for u, n in zip((y, x), images.shape[-2:]))
        side = torch.full_like(top, int(size))
        return ops.filled(images, ops.inside(images, top, left, side, side), fill)

    return apply


@named
def erase(
    p: float = 0.5, low: float = 0.02, high: float = 1 / 3, aspect: float = 10 / 3, noise: float = 0
) -> Transform:
    """Random erasing (Zhong et al. 2017, arXiv:1708.04896): with probability ``p`` a box becomes 0, or uniform noise.

    Args:
        low, high: least and greatest share of the area.
        aspect: the longer side over the shorter, at most.

    Departures: the aspect is drawn uniformly in its logarithm, and boxes that do not fit are cut, not drawn again.
    """
    in_range("p", p, 0, 1)
    in_range("low", low, 0, 1)
    in_range("high", high, low, 1)
    in_range("aspect", aspect, 1, math.inf)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        height, width = images.shape[-2:]
        chosen, area, shape, down, right = _drawn(images, draw, 5)
        side = torch.sqrt((low + (high - low) * area) * height * width)
        longer = torch.exp(_signed(shape, math.log(aspect) / 2))
        tall = (side * longer).round().clamp(max=height).to(torch.int64)
        wide = (side / longer).round().clamp(max=width).to(torch.int64)
        top, left = _whole_below(down, height - tall + 1), _whole_below(right, width - wide + 1)
        where = ops.inside(images, top, left, tall, wide) & (chosen < p).view(-1, 1, 1, 1)
        fill: Tensor | float = 0.0
        if noise:
            fill = draw(images[0].numel()).view(images.shape).to(images.device, non_blocking=True)
        return ops.filled(images, where, fill)

    return apply


@named
def rotate(degrees: float) -> Transform:
    """A turn by up to ``degrees`` each way; bilinear, 0 outside."""
    in_range("degrees", degrees, 0, 180)
    return lambda images, draw: ops.warped(images, ops.rotation(_signed(_drawn(images, draw, 1)[0], degrees)))


@named
def shear(most: float) -> Transform:
    """Lines and columns slide by up to ``most`` times their distance from the centre."""
    in_range("most", most, 0, 2)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        x, y = (_signed(u, most) for u in _drawn(images, draw, 2))
        return ops.warped(images, ops.shearing(x, y))

    return apply


@named
def translate(most: float) -> Transform:
    """A shift by up to ``most`` of the image's size each way, whole pixels or not; ``crop`` is cheaper."""
    in_range("most", most, 0, 1)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        right, down = (_signed(u, most * n) for u, n in zip(_drawn(images, draw, 2), images.shape[:-3:-1]))
        return ops.warped(images, ops.translation(right, down))

    return apply


@named
def zoom(low: float, high: float) -> Transform:
    """What is shown is scaled by ``low`` to ``high``, uniform in the logarithm."""
    in_range("low", low, 0.01, 100)
    in_range("high", high, low, 100)
    ratio = math.log(high / low)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        return ops.warped(images, ops.zooming(low * torch.exp(_drawn(images, draw, 1)[0] * ratio)))

    return apply


@named
def brightness(most: float) -> Transform:
    """Values times a factor in [1 - most, 1 + most]."""
    return _by_factor(ops.brightened, most)


@named
def contrast(most: float) -> Transform:
    """Distances from the mean grey times a factor in [1 - most, 1 + most]."""
    return _by_factor(ops.contrasted, most)


@named
def color(most: float) -> Transform:
    """Distances from grey times a factor in [1 - most, 1 + most]."""
    return _by_factor(ops.coloured, most)


@named
def sharpness(most: float) -> Transform:
    """Distances from the smoothed image times a factor in [1 - most, 1 + most]."""
    return _by_factor(ops.sharpened, most)


@named
def posterize(bits: float, p: float = 1.0) -> Transform:
    """The highest ``bits`` of eight stay, with probability ``p``."""
    in_range("bits", bits, 1, 8, whole=True)
    return _sometimes(lambda x: ops.posterized(x, torch.full((len(x),), int(bits), device=x.device)), p)


@named
def solarize(threshold: float = 0.5, p: float = 1.0) -> Transform:
    """Values from ``threshold`` on are inverted, with probability ``p``."""
    in_range("threshold", threshold, 0, 1)
    return _sometimes(lambda x: ops.solarized(x, torch.full((len(x),), threshold, device=x.device)), p)


@named
def invert(p: float = 0.5) -> Transform:
    """Black and white change places with probability ``p``."""
    return _sometimes(ops.inverted, p)


@named
def autocontrast(p: float = 0.5) -> Transform:
    """Each channel is stretched to [0, 1] with probability ``p``."""
    return _sometimes(ops.autocontrasted, p)


@named
def equalize(p: float = 0.5) -> Transform:
    """The levels of each channel become equally frequent with probability ``p``."""
    return _sometimes(ops.equalized, p)


def _by_factor(change: Callable[[Tensor, Tensor], Tensor], most: float) -> Transform:
    in_range("most", most, 0, 1)
    return lambda images, draw: change(images, 1 + _signed(_drawn(images, draw, 1)[0], most))


def _sometimes(change: Callable[[Tensor], Tensor], p: float) -> Transform:
    in_range("p", p, 0, 1)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        chosen = _drawn(images, draw, 1)[0] < p
        return torch.where(chosen.view(-1, 1, 1, 1), change(images), images)

    return apply
