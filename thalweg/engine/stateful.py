"""Metrics that add up for themselves over an evaluation, such as torchmetrics': one value over all samples of all ranks.

What is asked of one: ``update``, which the user's function calls, ``compute`` and ``reset``; on ranks torchmetrics' own table of
states besides (``_reductions``: how each is joined, and what its ``_sync_dist`` goes by too). Nothing of torchmetrics is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from thalweg.core import LossError
from thalweg.parallel import Ranks


def is_stateful(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


class Held:
    """Those that a metrics function gave, by name; between two evaluations they hold nothing."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def take(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Keep them; what is left of ``found``."""
        self.metrics |= {name: value for name, value in found.items() if is_stateful(value)}
        return {name: value for name, value in found.items() if not is_stateful(value)}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What breaks off inside has not been seen: it may come again, in smaller portions."""
        before = {name: _states(metric, copy=True) for name, metric in self.metrics.items()}
        try:
            yield
        except BaseException:
            for name, metric in self.metrics.items():
                for attribute, value in before.get(name, {}).items():
                    setattr(metric, attribute, value)
            raise

    def values(self, ranks: Ranks) -> dict[str, float]:
        """One number each, the same on all ranks.

        Raises:
            LossError: for what is no number, or cannot be joined over ranks.
        """
        if ranks.world == 1:
            return {name: _number(name, metric) for name, metric in self.metrics.items()}
        if not any(ranks.told(len(self.metrics))):
            return {}
        mine = ranks.together(lambda: {name: _told(name, metric) for name, metric in self.metrics.items()})
        told = ranks.told(mine)

        def joined() -> dict[str, float]:
            for name, metric in self.metrics.items():
                _join(metric, [theirs[name] for theirs in told if name in theirs])
            return {name: _number(name, metric) for name, metric in self.metrics.items()}

        return ranks.from_first(ranks.together(joined if ranks.is_first else dict))

    def clear(self) -> None:
        for metric in self.metrics.values():
            metric.reset()


def _states(metric: Any, *, copy: bool) -> dict[str, Any]:
    found = {attribute: getattr(metric, attribute) for attribute in getattr(metric, "_reductions", {})}
    if not copy:
        return found
    return {attribute: list(value) if isinstance(value, list) else value.clone() for attribute, value in found.items()}


def _told(name: str, metric: Any) -> dict[str, Any]:
    """The states of this rank, in the host's memory."""
    parts = list(metric.modules())[1:] if isinstance(metric, torch.nn.Module) else []
    if not getattr(metric, "_reductions", None) or any(is_stateful(part) for part in parts):
        raise LossError(
            f"The metric '{name}' cannot be joined over ranks.",
            f"{type(metric).__name__} has no states of its own that say how: it is made of others, or no torchmetrics.Metric.",
            "Return its parts, as in {**collection}; or (sum, weight) pairs.",
        )
    states = _states(metric, copy=False)
    return {a: [t.cpu() for t in v] if isinstance(v, list) else v.cpu() for a, v in states.items()}


def _join(metric: Any, told: list[dict[str, Any]]) -> None:
    """The metric has the states of all ranks, in their order."""
    device = getattr(metric, "device", None)
    for attribute, reduction in metric._reductions.items():
        values = [states[attribute] for states in told]
        if isinstance(values[0], list):
            setattr(metric, attribute, [tensor.to(device) for value in values for tensor in value])
        else:
            stacked = torch.stack(values).to(device)
            setattr(metric, attribute, stacked if reduction is None else reduction(stacked))


def _number(name: str, metric: Any) -> float:
    before = getattr(metric, "distributed_available_fn", None)
    if before is not None:  # it would ask all processes there are, and has all states by now
        metric.distributed_available_fn = lambda: False
    try:
        value = metric.compute()
    finally:
        if before is not None:
            metric.distributed_available_fn = before
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (int, float)):
        return float(value)
    told = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise LossError(
        f"The metric '{name}' is no number.",
        f"{type(metric).__name__}.compute() gives {told}.",
        "Let it average, as with average='macro', or return one metric for each number.",
    )
