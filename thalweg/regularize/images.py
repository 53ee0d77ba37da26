"""Image operations on whole batches, on their device, each image with strengths of its own.

Images are (samples, channels, height, width): floats in [0, 1], or uint8 in [0, 255], which stays uint8. Strengths are tensors
of shape (samples,) on the same device. Nothing here draws a random number; ``policies`` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def flipped(images: Tensor, which: Tensor) -> Tensor:
    """Left and right change places in the images that ``which`` (bool) names."""
    return torch.where(_each(which), images.flip(-1), images)


def shifted(images: Tensor, down: Tensor, right: Tensor, most: int, *, reflect: bool = False) -> Tensor:
    """Each image moved by whole pixels; what comes in is 0, or the image reflected at its border.

    Args:
        down, right: integers in [-most, most].
        most: pixels of padding; with ``reflect`` below height and width.
    """
    num, channels, height, width = images.shape
    whole = (
        images.to(torch.float32) if reflect and not images.is_floating_point() else images
    )  # all that torch reflects
    padded = F.pad(whole, (most,) * 4, mode="reflect" if reflect else "constant").to(images.dtype)
    high, wide = padded.shape[-2:]
    corner = (most - down) * wide + (most - right)
    planes = torch.arange(num * channels, device=images.device).view(num, channels, 1) * (high * wide)
    lines = torch.arange(height, device=images.device) * wide
    starts = corner.view(num, 1, 1) + planes + lines  # of every line of every image, in the padded memory
    return padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view_as(images)


def inside(images: Tensor, top: Tensor, left: Tensor, high: Tensor, wide: Tensor) -> Tensor:
    """(samples, 1, height, width) bool: the pixels of one box an image; what lies outside the image is cut off."""
    rows = torch.arange(images.shape[-2], device=images.device) - top[:, None]
    columns = torch.arange(images.shape[-1], device=images.device) - left[:, None]
    in_rows, in_columns = (rows >= 0) & (rows < high[:, None]), (columns >= 0) & (columns < wide[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


def filled(images: Tensor, where: Tensor, fill: Tensor | float) -> Tensor:
    """``fill`` (in [0, 1] also for uint8) where ``where`` is true."""
    value = torch.as_tensor(fill, device=images.device)
    value = value.to(images.dtype) if images.is_floating_point() else (value * 255).round().to(images.dtype)
    return torch.where(where, value, images)


def warped(images: Tensor, matrix: Tensor, *, border: bool = False) -> Tensor:
    """Bilinear samples at affine places. Images whose matrix is the identity stay as they are, to the bit.

    Args:
        matrix: (samples, 2, 3): where the pixel at (x, y, 1) comes from, in pixels from the centre, x to the right, y down.
        border: outside of the image its edge goes on; else 0.
    """
    height, width = images.shape[-2:]
    size = torch.tensor([width, height, 2.0], dtype=matrix.dtype, device=matrix.device)
    theta = matrix * size / size[:2, None]  # torch measures in half sizes

    def warp(x: Tensor) -> Tensor:
        grid = F.affine_grid(theta.to(x.dtype), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border" if border else "zeros", align_corners=False)

    still = (matrix == torch.eye(2, 3, dtype=matrix.dtype, device=matrix.device)).flatten(1).all(1)
    return torch.where(_each(still), images, _as_floats(images, warp))


def rotation(degrees: Tensor) -> Tensor:
    """The matrix for ``warped`` that turns the image counter-clockwise."""
    angle = torch.deg2rad(degrees)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _matrix(cos, -sin, sin, cos)


def shearing(x: Tensor, y: Tensor) -> Tensor:
    """Lines move to the side by ``x`` times their distance from the centre, columns by ``y``."""
    one = torch.ones_like(x)
    return _matrix(one, x, y, one)


def translation(right: Tensor, down: Tensor) -> Tensor:
    """The image moves by so many pixels, whole or not."""
    one, zero = torch.ones_like(right), torch.zeros_like(right)
    return _matrix(one, zero, zero, one, -right, -down)


def zooming(factor: Tensor) -> Tensor:
    """Above 1: what is shown grows."""
    zero = torch.zeros_like(factor)
    return _matrix(1 / factor, zero, zero, 1 / factor)


def brightened(images: Tensor, factor: Tensor) -> Tensor:
    """0: black; 1: as it is."""
    return _as_floats(images, lambda x: _blend(torch.zeros_like(x), x, factor))


def contrasted(images: Tensor, factor: Tensor) -> Tensor:
    """0: the mean of its grey in every pixel; 1: as it is."""
    return _as_floats(images, lambda x: _blend(_grey(x).mean((-2, -1), keepdim=True), x, factor))


def coloured(images: Tensor, factor: Tensor) -> Tensor:
    """0: grey; 1: as it is. Nothing for a single channel."""
    return _as_floats(images, lambda x: _blend(_grey(x), x, factor))


def sharpened(images: Tensor, factor: Tensor) -> Tensor:
    """0: smoothed by ((1, 1, 1), (1, 5, 1), (1, 1, 1)) / 13 except at the border; 1: as it is; above: sharper."""

    def sharpen(x: Tensor) -> Tensor:
        kernel = torch.ones(3, 3, dtype=x.dtype, device=x.device)
        kernel[1, 1] = 5
        channels = x.shape[1]
        smooth = x.clone()
        if min(x.shape[-2:]) > 2:
            weight = (kernel / 13).expand(channels, 1, 3, 3)
            smooth[..., 1:-1, 1:-1] = F.conv2d(x, weight, groups=channels)
        return _blend(smooth, x, factor)

    return _as_floats(images, sharpen)


def posterized(images: Tensor, bits: Tensor) -> Tensor:
    """The highest ``bits`` (integers, 1 to 8) of each value's eight; 8: as it is."""
    step = 2 ** (8 - bits)
    cut = _levels(images).div(_each(step), rounding_mode="floor") * _each(step)
    return torch.where(_each(bits >= 8), images, _from_levels(cut, images))


def solarized(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from ``threshold`` (0 to 1) on are inverted; above 1: as it is."""
    return _as_floats(images, lambda x: torch.where(x >= _each(threshold).to(x.dtype), 1 - x, x))


def inverted(images: Tensor) -> Tensor:
    return _as_floats(images, lambda x: 1 - x)


def autocontrasted(images: Tensor) -> Tensor:
    """Each channel stretched to reach from 0 to 1; a channel of one value stays."""

    def stretch(x: Tensor) -> Tensor:
        low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
        return torch.where(high > low, (x - low) / torch.where(high > low, high - low, 1.0), x)

    return _as_floats(images, stretch)


def equalized(images: Tensor) -> Tensor:
    """Each channel with its 256 levels spread so that they are equally frequent; floats are rounded to levels first."""
    levels = _levels(images).flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    below = counts.cumsum(-1) - counts
    brightest = counts.gather(2, levels.amax(-1, keepdim=True))
    step = (levels.shape[-1] - brightest).div(255, rounding_mode="floor")
    table = (below + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    spread = table.gather(2, levels).view(images.shape)
    return torch.where((step == 0).unsqueeze(-1), images, _from_levels(spread, images))


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    zero = torch.zeros_like(a)
    return torch.stack((a, b, zero if x is None else x, c, d, zero if y is None else y), -1).view(-1, 2, 3)


def _blend(other: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``other`` at 0, ``x`` at 1, beyond it further away; to the bit ``x`` at 1."""
    f = _each(factor).to(x.dtype)
    return torch.where(f == 1, x, (other + f * (x - other)).clamp(0, 1))


def _grey(x: Tensor) -> Tensor:
    """ITU-R 601-2 luma of three channels, the mean of any other number."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return (x * luma.view(3, 1, 1)).sum(1, keepdim=True)


def _as_floats(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change`` on values in [0, 1]; uint8 is rounded to the nearest level."""
    if images.is_floating_point():
        return change(images)
    return _from_levels((change(images.to(torch.float32) / 255) * 255).round().clamp(0, 255), images)


def _levels(images: Tensor) -> Tensor:
    return ((images * 255).round().clamp(0, 255) if images.is_floating_point() else images).to(torch.int64)


def _from_levels(levels: Tensor, images: Tensor) -> Tensor:
    return levels.to(images.dtype) / 255 if images.is_floating_point() else levels.to(images.dtype)
