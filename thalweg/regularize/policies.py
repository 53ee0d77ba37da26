"""Pipelines of image transforms by name, and RandAugment, which draws an operation for each image."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.core import DataError, RecipeError
from thalweg.regularize import images as ops
from thalweg.regularize.transforms import TRANSFORMS, Draw, Transform, in_range, named


def pipeline(transforms: Sequence[str | Transform], *, inputs: str | int = "images") -> Callable[[Any, Draw], Any]:
    """``augment(batch, draw)`` for ``Split``, from transforms in their order.

    Args:
        transforms: texts such as ``"crop(4)"``, ``"flip"``, ``"randaugment(2, 9)"``; or functions ``(images, draw)``.
        inputs: where a batch (a dict or tuple) has its images.

    Raises:
        RecipeError: for names that are not known, and options outside their range.
        DataError: when called, for images that are not (samples, channels, height, width) floats or uint8.

    >>> augment = pipeline(["flip(1)"])
    >>> augment({"images": torch.tensor([[[[0.0, 1.0]]]])}, lambda num: torch.zeros(1, num))["images"].tolist()
    [[[[1.0, 0.0]]]]
    """
    chain = [parse(t) if isinstance(t, str) else t for t in transforms]

    def augment(batch: Any, draw: Draw) -> Any:
        images = _images_of(batch, inputs)
        for transform in chain if len(images) else ():
            images = transform(images, draw)
        if isinstance(batch, Mapping):
            return {**batch, inputs: images}
        entries = [images if place == inputs else entry for place, entry in enumerate(batch)]
        return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)

    return augment


def parse(text: str) -> Transform:
    """The transform that a text names: ``name`` or ``name(number, ...)``; a number may be named: ``erase(p=0.5)``."""
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise RecipeError(
            f"{text!r} is no transform.", "It is read as name(number, ...).", 'Write "crop(4)" or "flip".'
        )
    name, options = found.group(1), [part.strip() for part in (found.group(2) or "").split(",") if part.strip()]
    make = TRANSFORMS[name]
    places: list[float] = []
    names: dict[str, float] = {}
    for option in options:
        word, equals, value = (part.strip() for part in option.rpartition("="))
        number = _number(value, text)
        if equals:
            names[word] = number
        else:
            places.append(number)
    signature = inspect.signature(make)
    try:
        signature.bind(*places, **names)
    except TypeError as err:
        told = ", ".join(str(p).split(":")[0] for p in signature.parameters.values())
        raise RecipeError(f"{text!r} cannot be read.", f"{err}.", f"Its options are {name}({told}).") from None
    return make(*places, **names)


def _number(text: str, where: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        value = words[text] if text in words else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RecipeError(f"{where!r} cannot be read.", f"{text!r} is no number.", "Give numbers, such as crop(4).")
    return value


def _images_of(batch: Any, inputs: str | int) -> Tensor:
    try:
        images = batch[inputs]
    except (KeyError, IndexError, TypeError):
        images = None
    is_image = isinstance(images, Tensor) and (images.is_floating_point() or images.dtype == torch.uint8)
    if not is_image or images.ndim != 4:
        told = f"{tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"The batch has no images under {inputs!r}.",
            f"Found {told}.",
            "Give (samples, channels, height, width), floats in [0, 1] or uint8, and their name as inputs=...",
        )
    found: Tensor = images
    return found


#: name: (operation on (images, strength), strength at magnitudes 0 and 10, whether its sign is drawn too)
Operation = Callable[[Tensor, Tensor], Tensor]
OPERATIONS: dict[str, tuple[Operation, float, float, bool]] = {
    "identity": (lambda x, s: x, 0, 0, False),
    "shear_x": (lambda x, s: ops.warped(x, ops.shearing(s, torch.zeros_like(s))), 0, 0.3, True),
    "shear_y": (lambda x, s: ops.warped(x, ops.shearing(torch.zeros_like(s), s)), 0, 0.3, True),
    "translate_x": (lambda x, s: ops.warped(x, ops.translation(s * x.shape[-1], torch.zeros_like(s))), 0, 0.45, True),
    "translate_y": (lambda x, s: ops.warped(x, ops.translation(torch.zeros_like(s), s * x.shape[-2])), 0, 0.45, True),
    "rotate": (lambda x, s: ops.warped(x, ops.rotation(s)), 0, 30, True),
    "brightness": (lambda x, s: ops.brightened(x, 1 + s), 0, 0.9, True),
    "color": (lambda x, s: ops.coloured(x, 1 + s), 0, 0.9, True),
    "contrast": (lambda x, s: ops.contrasted(x, 1 + s), 0, 0.9, True),
    "sharpness": (lambda x, s: ops.sharpened(x, 1 + s), 0, 0.9, True),
    "posterize": (lambda x, s: ops.posterized(x, s.round().to(torch.int64)), 8, 4, False),
    "solarize": (lambda x, s: ops.solarized(x, s), 1 + 1 / 255, 0, False),
    "autocontrast": (lambda x, s: ops.autocontrasted(x), 0, 0, False),
    "equalize": (lambda x, s: ops.equalized(x), 0, 0, False),
}


@named
def randaugment(num: float = 2, magnitude: float = 9) -> Transform:
    """RandAugment (Cubuk et al. 2019, arXiv:1909.13719): ``num`` of 14 operations an image, drawn anew for each image.

    Args:
        num: operations in a row, 1 or more.
        magnitude: 0 to 10, the same for all operations: 10 is a shear of 0.3, a shift by 0.45 of the size, a turn by 30
            degrees, factors of 1 +- 0.9, 4 bits, a solarization of everything. Signs are drawn.

    Cost: images are sorted by operation, and each operation runs once, on its own images.
    Departures: geometry is bilinear, about the centre, with 0 outside; on one channel "color" does nothing.
    """
    in_range("num", num, 1, 100, whole=True)
    in_range("magnitude", magnitude, 0, 10)

    def apply(images: Tensor, draw: Draw) -> Tensor:
        for _ in range(int(num)):
            images = _one_each(images, draw(2), magnitude / 10)
        return images

    return apply


def _one_each(images: Tensor, numbers: Tensor, share: float) -> Tensor:
    """One operation an image; ``numbers`` (samples, 2) lie on the CPU, so that sorting by them waits for no device."""
    choice = (numbers[:, 0] * len(OPERATIONS)).to(torch.int64)
    order = choice.argsort(stable=True)
    sizes = torch.bincount(choice, minlength=len(OPERATIONS)).tolist()
    sign = torch.where(numbers[:, 1] < 0.5, -1.0, 1.0)
    result = torch.empty_like(images)
    for which, (change, low, high, signed) in zip(order.split(sizes), OPERATIONS.values()):
        if len(which):
            strength = low + (high - low) * share * (sign[which] if signed else torch.ones(len(which)))
            places = which.to(images.device, non_blocking=True)
            changed = change(images.index_select(0, places), strength.to(images.device, non_blocking=True))
            result.index_copy_(0, places, changed)
    return result
