"""Whether short micro-batches can be filled up with samples of weight 0: tried on the model and its loss before step 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import Recipe
from thalweg.data import batch_size, tree_map
from thalweg.data.padded import Padding, padded, targets_of
from thalweg.device import Device
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.preflight import ModelLoss, as_written, in_evaluation_mode, untouched
from thalweg.regularize import FrozenBatchNorm

Take = Callable[[str, Any, str], Any]

#: How far sums may be apart, in units of their dtype's rounding: they are added up in another order.
_APART = 256


def settle_padding(
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    recipe: Recipe,
    samples: int,
    device: Device,
    take: Take,
    *,
    targets: str | int,
    changing: bool,
) -> Padding | None:
    """How short micro-batches are filled up; None where there are none, or where they cannot be.

    Args:
        batch: a micro-batch.
        samples: in an epoch; 0: not known.
        targets: what the task calls its targets.
        changing: whether windows have other sizes on purpose.
    """
    size = recipe.train.micro_batch
    if not device.static_shapes or not isinstance(size, int) or not has_short(recipe, samples, changing):
        return None
    name = targets_of(batch, targets)
    reason = why_not(model, loss, batch, device, recipe.seed, name)
    if reason or name is None:
        take("padding", "none", f"{reason}; a short micro-batch has a graph of its own")
        return None
    told = f"short micro-batches get samples of weight 0 ('{name}'), and need no graph of their own; tried, with the same loss"
    take("padding", size, told)
    return Padding(size, name)


def has_short(recipe: Recipe, samples: int, changing: bool) -> bool:
    """Whether a window may have a micro-batch that is shorter than the others."""
    batch, micro = recipe.train.batch, recipe.train.micro_batch
    if changing or not isinstance(micro, int) or batch % micro or not samples:
        return True
    return recipe.train.last == "keep" and bool(samples % batch % micro)


def why_not(model: nn.Module, loss: ModelLoss, batch: Any, device: Device, seed: int, name: str | None) -> str:
    """Why a sample of weight 0 would change the loss of others, or count itself; "" where it does not.

    Args:
        name: of the targets, or None.
    """
    if name is None:
        return "the batch has no targets that can be marked as not counting"
    coupled = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and not isinstance(layer, FrozenBatchNorm)
    ]
    if coupled:
        return f"{len(coupled)} layers normalise by the batch, such as '{coupled[0]}', and would see the added samples"
    num = batch_size(batch)
    if num < 2:
        return ""
    short = tree_map(lambda t: t[: num - 1] if t.ndim and t.shape[0] == num else t, batch)
    with untouched(model, device, seed), as_written(), in_evaluation_mode(model), torch.no_grad():
        here, longer = sum_and_weight(loss(model, short), short), padded(short, Padding(num, name))
        try:
            found = [here, sum_and_weight(loss(model, longer), longer)]
        except Exception as err:  # a target of -100 is looked up, or counted
            return f"the model or its loss cannot take a target that does not count ({type(err).__name__})"
    (total, weight), (more, heavier) = [(float(value), float(heavy)) for value, heavy in found]
    if weight != heavier:
        return f"{num - 1} samples weigh {weight:g}, and {heavier:g} with one that is not to count"
    eps = max(torch.finfo(t.dtype).eps for t in (found[0][0], *model.parameters()) if t.is_floating_point())
    if abs(total - more) > _APART * eps * max(abs(total), 1e-30):
        return f"the loss of {num - 1} samples is {total:g}, and {more:g} with one that is not to count"
    return ""
