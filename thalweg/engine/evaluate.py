"""Metrics over held-out data, with the averaged weights where there is an average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from thalweg.core import LossError
from thalweg.data import Source, held_out
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.portions import each
from thalweg.engine.preflight import ModelLoss, in_evaluation_mode
from thalweg.engine.state import State
from thalweg.engine.stateful import Held
from thalweg.parallel import ALONE, Ranks
from thalweg.precision import Policy
from thalweg.regularize import PreciseStatistics


class Interrupted(Exception):
    """Somebody asked the run to end while it was evaluating."""


@contextmanager
def evaluated_weights(state: State, precise: PreciseStatistics | None) -> Iterator[None]:
    """The model holds what is evaluated and shipped: averaged weights, with statistics of their own where they are measured."""
    measured = nullcontext() if precise is None else precise.put_in(version=state.step)
    with state.averaged(), state.whole(), measured:
        yield


def evaluate(
    state: State,
    source: Source,
    loss: ModelLoss,
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None,
    policy: Policy,
    *,
    batch: int,
    precise: PreciseStatistics | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Exactly weighted means over all of ``source``, read from the device once, at the end.

    Args:
        precise: measures the statistics of batch normalization for the averaged weights.
        metrics: gives further (sum, weight) pairs by name, or metrics that add up for themselves (``engine/stateful.py``).
        batch: samples a batch; the result does not depend on it but for rounding.
        stop: asked before each batch: whether to break off. Not on ranks, which would wait for one another.
        ranks: each evaluates its share of the batches; all get the same figures.

    Raises:
        Interrupted: where it is; the model is as it was.
    """
    model = state.model

    def pairs(samples: Any) -> dict[str, list[Tensor]]:
        """(sum, weight) by name, as 0-dim tensors that are exact to add up."""
        with policy.context(state.device):
            found = {"loss": sum_and_weight(loss(model, samples), samples)}
            if metrics is not None:
                with held.whole():
                    more = held.take(metrics(model, samples))
                found |= {name: sum_and_weight(pair, samples) for name, pair in more.items()}
        exact, device = state.device.exact, state.device.torch_device
        return {
            name: [torch.as_tensor(v, dtype=exact, device=device).reshape(()) for v in pair]
            for name, pair in found.items()
        }

    held = Held()
    batches: list[dict[str, list[Tensor]]] = []  # one after the other: sums do not hang on who evaluates what
    try:
        with evaluated_weights(state, precise), in_evaluation_mode(model), torch.no_grad():
            for samples in held_out(source, batch, state.device.torch_device, (ranks.rank, ranks.world)):
                if stop():
                    raise Interrupted
                batches.append(_added(each(samples, pairs, state.evaluation_limit)))
        sums = _added(batches if ranks.world == 1 else _over_ranks(batches, ranks))
        if not sums:
            raise LossError("Nothing was evaluated.", "The held-out data gave no batch.", "Give at least one sample.")
        return {name: float(total / weight) for name, (total, weight) in sums.items()} | held.values(ranks)
    finally:
        held.clear()


def _added(found: Iterable[Mapping[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Sums by name, added in this order."""
    sums: dict[str, list[Tensor]] = {}
    for pairs in found:
        for name, pair in pairs.items():
            before = sums.get(name)
            sums[name] = pair if before is None else [a + b for a, b in zip(before, pair)]
    return sums


def _over_ranks(batches: Sequence[Mapping[str, list[Tensor]]], ranks: Ranks) -> Iterator[dict[str, list[Tensor]]]:
    """The batches of all ranks in the order of the data: they go round. A rank may have had none."""
    mine = [{name: [float(v) for v in pair] for name, pair in pairs.items()} for pairs in batches]
    told = ranks.told(mine)
    for turn in range(max(map(len, told))):
        for theirs in told:
            if turn < len(theirs):
                yield {n: [torch.tensor(v, dtype=torch.float64) for v in pair] for n, pair in theirs[turn].items()}
