"""Mixup and cutmix over the whole window of a step, so that how the window is split changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thalweg.core import DataError, LossError, RecipeError
from thalweg.regularize.labels import check_indices, soft_targets


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Each sample of a window is mixed with another one of it, and so are their targets.

    Mixup (Zhang et al. 2018, arXiv:1710.09412) blends: ``x = share * x + (1 - share) * x_partner``. Cutmix (Yun et al.
    2019, arXiv:1905.04899) pastes a box of the partner; the target's share is that of the pixels that are left, counted
    after the box was cut at the border. Partners lie on one random cycle through the window: nobody is mixed with itself.

    Smoothing comes after, in the loss: it is linear, so before and after are the same, and in both it would count twice.

    Args:
        num_classes: what the targets become: (..., num_classes).
        inputs, targets: where a batch (a dict, or a tuple) has them. Inputs are (samples, ...), float; for cutmix
            (samples, ..., height, width). Targets are (samples,) integers, or (samples, num_classes) floats. All else that
            lies in a batch is passed on as it is.
        mixup, cutmix: their alphas: shares are drawn from Beta(alpha, alpha); 0 turns one off.
        share: how likely a window is mixed at all.
        switch: where both are on: how likely a window is cut rather than blended.
        per_sample: every sample draws a share of its own; False: one for the window, as in the papers.
        ignore_index: the label of samples that do not count; mixed, they take their part of the weight away.

    Raises:
        RecipeError: for an alpha below 0, both 0, or a probability outside [0, 1].

    >>> mixing = Mixing(num_classes=3, inputs=0, targets=1, mixup=1.0)
    >>> [(images, targets)] = mixing([(torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]))], key=5)
    >>> targets.shape, targets.sum(-1).tolist()
    (torch.Size([2, 3]), [1.0, 1.0])
    """

    num_classes: int
    inputs: str | int = "images"
    targets: str | int = "labels"
    mixup: float = 0.0
    cutmix: float = 0.0
    share: float = 1.0
    switch: float = 0.5
    per_sample: bool = True
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not (0 <= alpha < math.inf):
                raise RecipeError(
                    f"{name}={alpha} is no alpha of a Beta distribution.",
                    "It must be 0 or more, and finite.",
                    "0.2 (mixup) and 1.0 (cutmix) are common; 0 turns it off.",
                )
        for name in ("share", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"{name}={getattr(self, name)} is no probability.", "It must lie in [0, 1].", "1.0 means always."
                )
        if self.mixup == 0 and self.cutmix == 0:
            raise RecipeError(
                "Mixing has nothing to do.", "mixup=0 and cutmix=0.", "Give one of them an alpha above 0."
            )

    def __call__(self, window: Sequence[Any], key: int) -> list[Any]:
        """The window, mixed; its micro-batches keep their sizes. Targets are always soft, also where nothing is mixed.

        Args:
            window: all micro-batches of a step.
            key: names what is drawn, in [0, 2**63), such as ``seed_for(seed, "mix", step)``. Everything is a function of
                it and of a sample's place in the window, on any device.

        Raises:
            DataError: for inputs or targets that are not there, or that cannot be mixed.
        """
        parts = [(self._entry(b, self.inputs), self._entry(b, self.targets)) for b in window]
        for images, labels in parts:
            self._check(images, labels)
        sizes = [len(images) for images, _ in parts]
        inputs = _joined([images for images, _ in parts])
        targets = self._soft(_joined([labels for _, labels in parts]), inputs)
        if sum(sizes) > 1:
            inputs, targets = self._mixed(inputs, targets, np.random.RandomState([key & 0xFFFFFFFF, key >> 32]))
        cut = zip(window, inputs.split(sizes), targets.split(sizes))
        return [_replaced(batch, {self.inputs: x, self.targets: y}) for batch, x, y in cut]

    def _mixed(self, inputs: Tensor, targets: Tensor, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
        num = len(inputs)
        mixed, cut = random.random_sample(2)
        if mixed >= self.share:
            return inputs, targets
        places = random.permutation(num)
        partners = np.empty(num, dtype=np.int64)
        partners[places] = np.roll(places, -1)
        partner = torch.from_numpy(partners).to(inputs.device, non_blocking=True)
        others = inputs.index_select(0, partner)
        if self.mixup == 0 or (self.cutmix != 0 and cut < self.switch):
            shares, inside = _boxes(self._shares(random, self.cutmix, num), inputs.shape[-2:], random)
            inside = inside.to(inputs.device, non_blocking=True)
            mixed_inputs = torch.where(_broadcast(inside, inputs), others, inputs)
        else:
            shares = torch.from_numpy(self._shares(random, self.mixup, num))
            mixed_inputs = others.lerp_(inputs, _broadcast(shares.to(inputs, non_blocking=True), inputs))
        kept = _broadcast(shares.to(targets, non_blocking=True), targets)
        return mixed_inputs, torch.lerp(targets.index_select(0, partner), targets, kept)

    def _shares(self, random: np.random.RandomState, alpha: float, num: int) -> NDArray[np.float64]:
        return np.broadcast_to(random.beta(alpha, alpha, num if self.per_sample else 1), (num,)).copy()

    def _soft(self, targets: Tensor, inputs: Tensor) -> Tensor:
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        if targets.is_floating_point():
            return targets.to(dtype)
        return soft_targets(targets, self.num_classes, ignore_index=self.ignore_index, dtype=dtype)

    def _entry(self, batch: Any, name: str | int) -> Tensor:
        entries: dict[Any, Any] = {}
        if isinstance(batch, Mapping):
            entries = dict(batch)
        elif isinstance(batch, (tuple, list)):
            entries = dict(enumerate(batch))
        found = entries.get(name)
        if isinstance(found, Tensor) and found.ndim:
            return found
        raise DataError(
            f"A batch has no {name!r} to mix.",
            f"It is a {type(batch).__name__}" + (f" with {', '.join(map(str, entries))}." if entries else "."),
            "Give Mixing the names (dict) or places (tuple) of a tensor of inputs and one of targets.",
        )

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        if not inputs.is_floating_point():
            raise DataError(
                f"{self.inputs!r} cannot be mixed.",
                f"Its dtype is {inputs.dtype}: a blend of two tokens or bytes is none.",
                "Give floats, such as images in [0, 1]; for tokens, turn mixing off.",
            )
        if self.cutmix != 0 and inputs.ndim < 3:
            raise DataError(
                f"{self.inputs!r} has no box to cut.",
                f"Its shape is {tuple(inputs.shape)}.",
                "Cutmix needs (samples, ..., height, width); use mixup alone.",
            )
        if len(inputs) != len(targets):
            raise DataError(
                f"{self.inputs!r} and {self.targets!r} do not belong together.",
                f"They hold {len(inputs)} and {len(targets)} samples.",
                "Give each sample one target.",
            )
        if not (targets.is_floating_point() and targets.shape[1:] == (self.num_classes,)):
            check_indices(targets, self.num_classes, self.ignore_index)


def soft_target_error(err: Exception) -> LossError:
    """What to say where a loss fails on the soft targets that mixing gives it: ``raise soft_target_error(err) from err``."""
    return LossError(
        "Mixing needs a loss that takes soft targets.",
        f"Given targets of shape (samples, num_classes), it failed: {type(err).__name__}: {err}"[:300],
        "Use thalweg.regularize.cross_entropy or torch's cross_entropy, with targets as they come; or turn mixing off.",
    )


def _boxes(shares: NDArray[np.float64], size: Sequence[int], random: np.random.RandomState) -> tuple[Tensor, Tensor]:
    """(share of the pixels outside, (num,); what lies inside, (num, height, width)), after cutting at the border."""
    num, sides = len(shares), np.array(size)
    box = np.floor(sides * np.sqrt(1 - shares)[:, None]).astype(np.int64)
    centre = np.floor(random.random_sample((num, 2)) * sides).astype(np.int64)
    start = np.clip(centre - box // 2, 0, sides)
    stop = np.clip(centre - box // 2 + box, 0, sides)
    outside = 1 - (stop - start).prod(1) / sides.prod()
    along = [(np.arange(s) >= start[:, k, None]) & (np.arange(s) < stop[:, k, None]) for k, s in enumerate(size)]
    return torch.from_numpy(outside), torch.from_numpy(along[0][:, :, None] & along[1][:, None, :])


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """(num, ...) with ones between, so that it broadcasts over ``like``."""
    return values.reshape(len(values), *[1] * (like.ndim - values.ndim), *values.shape[1:])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _replaced(batch: Any, new: Mapping[Any, Tensor]) -> Any:
    if isinstance(batch, Mapping):
        return {**batch, **new}
    entries = [new.get(place, entry) for place, entry in enumerate(batch)]
    return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)
