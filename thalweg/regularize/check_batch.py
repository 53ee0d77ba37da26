"""A micro-batch that batch normalization cannot train on is found before step 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import DataError
from thalweg.regularize.ghost import GhostBatchNorm
from thalweg.regularize.moments import num_ranks
from thalweg.regularize.synced import SyncedBatchNorm


@contextmanager
def watch_batch(model: nn.Module, num: int) -> Iterator[dict[str, float]]:
    """While it is open, forward passes tell how many values a channel each layer gets from one sample.

    Args:
        num: samples of the micro-batch that is run, at least 1.

    Yields:
        Values a channel and sample by layer name, the least of all passes; filled by the passes.

    Raises:
        DataError: from a pass that would normalise one value a channel.
    """
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else named["input"]
            values = x.numel() // x.shape[1] / num
            found[name] = min(values, found.get(name, values))
            check_batch(model, num, {name: values})

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    hooks = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_batch(model: nn.Module, num: int, values: Mapping[str, float] | None = None, told: str = "") -> None:
    """Refuse a micro-batch of which some layer would normalise a single value a channel.

    Args:
        num: samples of the smallest micro-batch.
        values: values a channel and sample of each layer that is used, from ``watch_batch``; None: one of each layer.
        told: the settings that led to ``num``, for the error's numbers.

    Raises:
        DataError: naming the layers.
    """
    wrong = []
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (values is None or name in values) and _by_batch(layer):
            each = 1.0 if values is None else values[name]
            samples = min(num, layer.size) if isinstance(layer, GhostBatchNorm) else num
            if 0 < samples * each < 2:
                wrong.append(name)
    if wrong:
        raise DataError(
            f"A micro-batch would hold {num} sample{'s' * (num != 1)}, too few for batch normalization.",
            f"{len(wrong)} layer{'s' * (len(wrong) != 1)}, such as '{wrong[0]}'{'; ' + told if told else ''}.",
            "Use train.last='drop', or micro-batches and ghost batches of 2 or more samples.",
        )


def _by_batch(layer: Any) -> bool:
    """Whether a layer normalises by the batch of this rank alone."""
    if isinstance(layer, SyncedBatchNorm) and num_ranks(layer.group) > 1:
        return False
    return bool(layer.training or layer.running_mean is None)
