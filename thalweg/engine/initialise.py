"""Layers begin as the recipe says: whitening filters, the identity, orthogonal matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from thalweg.core import ModelError, Recipe, seed_for
from thalweg.data import batch_size
from thalweg.device import Device
from thalweg.engine.preflight import ModelLoss, as_written, in_evaluation_mode, untouched


def initialise(
    model: nn.Module,
    loss: ModelLoss,
    windows: Callable[[], Iterator[list[Any]]],
    recipe: Recipe,
    device: Device,
    take: Callable[[str, Any, str], Any],
    *,
    begins: bool,
) -> None:
    """Give layers what ``recipe.initialise`` asks for, in place, and say which they were.

    Args:
        windows: the run's windows from its first step on, whole.
        take: notes a decision: path, value, reason.
        begins: whether weights are new; those of a checkpoint stay, and only what is frozen is frozen again.

    Raises:
        ModelError: for a pattern that names no layer of its kind, or one that cannot be made so or is named twice; for data
            that does not vary.
    """
    wanted = recipe.initialise
    if not wanted.active:
        return
    identical = _named(model, wanted.dirac, "dirac", (_ConvNd,))
    orthogonal = _named(model, wanted.orthogonal, "orthogonal", (_ConvNd, nn.Linear))
    whitened = _named(model, wanted.whiten, "whiten", (nn.Conv2d,))
    for name, layer in whitened.items():
        _check_whitens(name, layer)
    _check_once({"dirac": identical, "orthogonal": orthogonal, "whiten": whitened})
    if recipe.weights is None and begins:
        generator = torch.Generator().manual_seed(seed_for(recipe.seed, "initialise"))
        for layer in identical.values():
            make_dirac(layer.weight, layer.groups)
        for layer in orthogonal.values():
            make_orthogonal(layer.weight, wanted.gain, generator)
        with untouched(model, device, recipe.seed), in_evaluation_mode(model), as_written():
            for name, layer in whitened.items():
                layer.weight.data.copy_(_whitening(model, loss, windows, name, layer, recipe))
    elif recipe.weights is not None:
        take("initialise", sorted([*identical, *orthogonal, *whitened]), "not used: weights are given")
    for told, layers in (("dirac", identical), ("orthogonal", orthogonal), ("whiten", whitened)):
        if layers:
            frozen = "; they stay as they begin" if told == "whiten" and wanted.whiten_freeze else ""
            take(f"initialise.{told}", sorted(layers), f"{len(layers)} layer{'s' if len(layers) > 1 else ''}{frozen}")
    if wanted.whiten_freeze:
        for layer in whitened.values():
            layer.weight.requires_grad_(False)


@torch.no_grad()
def make_dirac(weight: Tensor, groups: int = 1) -> None:
    """The first filters become the identity, as many as there are input channels; the others stay as they are.

    Source: airbench94 (Jordan 2024, arXiv:2404.00498); all filters at once: torch.nn.init.dirac_.

    Args:
        weight: of a convolution, (filters, channels / groups, ...), changed in place.
    """
    size = len(weight) // groups
    for group in range(groups):
        part = weight[group * size : group * size + min(size, weight.shape[1])]
        part.copy_(nn.init.dirac_(torch.empty_like(part)))


@torch.no_grad()
def make_orthogonal(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Orthonormal rows or columns, whichever are fewer, times ``gain`` (Saxe et al. 2013, arXiv:1312.6120); in place.

    Args:
        weight: (rows, ...); what follows the first dimension is one row.
        generator: on the CPU.
    """
    shape = (len(weight), weight[0].numel())
    drawn = torch.randn(max(shape), min(shape), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # else the signs would be those of the algorithm
    weight.copy_((gain * (q if shape[0] >= shape[1] else q.T)).reshape(weight.shape))


def filters_that_whiten(second: Tensor, num: int, eps: float) -> Tensor:
    """Half of ``num`` filters are the eigenvectors of the largest variances, divided by the deviation; half their negatives.

    Args:
        second: covariance of patches, (numbers, numbers), float64.
        num: filters, even, at most twice the numbers of a patch.
        eps: added to the variances, as a share of their mean.

    Returns:
        (num, numbers); outputs on the patches are uncorrelated within each half, and of variance 1 where eps is small.
    """
    values, vectors = torch.linalg.eigh(second)  # ascending
    largest = values.flip(0)[: num // 2]
    directions = vectors.flip(1)[:, : num // 2].T
    filters = directions / (largest.clamp(min=0) + eps * second.trace() / len(second)).sqrt()[:, None]
    return torch.cat((filters, -filters))


#: Variances below this share of the squared mean are what rounding in float32 leaves.
_ROUNDING = 1e-6


class _Seen(Exception):
    """The layer has been reached; the rest of the pass is of no use."""


@torch.no_grad()
def _whitening(
    model: nn.Module,
    loss: ModelLoss,
    windows: Callable[[], Iterator[list[Any]]],
    name: str,
    layer: nn.Conv2d,
    recipe: Recipe,
) -> Tensor:
    wanted, found = recipe.initialise, list[Tensor]()

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].detach())
        raise _Seen

    count, samples = 0, 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0
    handle = layer.register_forward_pre_hook(look)
    try:
        for batch in (part for window in windows() for part in window):
            with suppress(_Seen):
                loss(model, batch)
                raise ModelError(
                    f"initialise.whiten cannot be given to {name}.",
                    "A forward pass of the model does not come by it.",
                    "Name a layer that reads the images.",
                )
            patches = (
                F.unfold(found.pop().float(), layer.kernel_size, dilation=layer.dilation).transpose(0, 1).flatten(1)
            )
            total = total + patches.sum(1).cpu().double()
            square = square + (patches @ patches.T).cpu().double()
            count, samples = count + patches.shape[1], samples + batch_size(batch)
            if samples >= wanted.whiten_samples:
                break
    finally:
        handle.remove()
    mean = torch.as_tensor(total / count)
    second = torch.as_tensor(square / count) - mean.outer(mean)
    if not second.trace() > _ROUNDING * mean.dot(mean) or not second.trace() > 0:
        raise ModelError(
            "initialise.whiten has nothing to whiten.",
            f"The patches of {samples} samples have a variance of {float(second.trace()):g} in all.",
            "Look at the data, or leave initialise.whiten out.",
        )
    return filters_that_whiten(second, layer.out_channels, wanted.whiten_eps).view(layer.weight.shape)


def _check_once(named: dict[str, dict[str, Any]]) -> None:
    """A layer begins in one way."""
    ways: dict[str, list[str]] = {}
    for option, layers in named.items():
        for name in layers:
            ways.setdefault(name, []).append(option)
    for name, options in ways.items():
        if len(options) > 1:
            raise ModelError(
                f"{name} would begin in {len(options)} ways.",
                f"It is named by {' and '.join(f'initialise.{option}' for option in options)}.",
                "Name it in one of them.",
            )


def _check_whitens(name: str, layer: nn.Conv2d) -> None:
    numbers = layer.weight[0].numel()
    if layer.groups != 1 or layer.out_channels % 2 or layer.out_channels > 2 * numbers:
        raise ModelError(
            f"initialise.whiten cannot be given to {name}.",
            f"It has {layer.out_channels} filters in {layer.groups} groups, and reads patches of {numbers} numbers.",
            f"It takes one group and an even number of filters up to {2 * numbers}: pairs of opposite sign.",
        )


def _named(model: nn.Module, patterns: Sequence[str], option: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    """Layers of these kinds by name, in the model's order."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            shown = ", ".join(list(layers)[:6]) + (", ..." if len(layers) > 6 else "")
            raise ModelError(
                f"initialise.{option} names '{pattern}', and no such layer is in the model.",
                f"It has {len(layers)} that could be: {shown or 'none'}.",
                "Give patterns of their names, such as 'stem' or 'blocks.*.conv2'.",
            )
    return {name: layer for name, layer in layers.items() if any(fnmatchcase(name, p) for p in patterns)}
