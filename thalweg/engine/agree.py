"""Ranks go through the same samples once, before step 1: a model that does other things on other ranks is found out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from thalweg.core import ModelError
from thalweg.data import batch_size, split
from thalweg.engine.diagnose import as_it_was
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.step import Step
from thalweg.engine.together import has_shards
from thalweg.optim import named_trainable
from thalweg.parallel import Ranks
from thalweg.regularize.moments import alone

_CLOSE, _CLOSE_IN_HALF = 1e-4, 2e-2  # ranks on other chips round otherwise


def check_forward(step: Step, batch: Any, ranks: Ranks) -> str:
    """Every rank makes the forward pass of the same samples, with the same weights and the same random streams.

    What is compared is which operations made the loss, which parameters they reached, of which shapes, and the loss itself. A
    rank that waits for the others inside its forward pass is found by the time limit, and named.

    Args:
        batch: the first samples of the run; ranks may have cut them otherwise.

    Returns:
        What a person should know: that losses cannot be compared, because one rank by itself gives another each time.

    Raises:
        ModelError: on all ranks, naming what is other where.
    """
    if has_shards(step.state.model) and step.state.fully is None:  # another's parts
        return ""
    with step.state.whole():  # where weights lie in parts, all ranks gather them once
        return _compared(step, batch, ranks)


def _compared(step: Step, batch: Any, ranks: Ranks) -> str:
    num = min(ranks.told(batch_size(batch)))
    batch = split(batch, num)[0]
    value, made = ranks.together(lambda: _forward(step, batch))
    told = ranks.told((value, made))
    for rank, (_, theirs) in enumerate(told):
        if theirs != told[0][1]:
            raise _other(rank, "goes another way", _differing(rank, told[0][1], theirs))
    close = _CLOSE_IN_HALF if step.policy.name not in ("fp32", "tf32") else _CLOSE
    apart = [rank for rank, (theirs, _) in enumerate(told) if not _is_close(theirs, told[0][0], close)]
    if not apart:
        return ""
    again = ranks.told(_is_close(ranks.together(lambda: _forward(step, batch))[0], value, close))
    if all(again):
        rank = apart[0]
        numbers = f"With the same weights and samples its loss is {told[rank][0]:.7g}, and rank 0's {told[0][0]:.7g}."
        raise _other(rank, "gives another loss", numbers)
    where = ", ".join(str(rank) for rank, same in enumerate(again) if not same)
    return (
        f"The same samples give another loss each time, on ranks {where}: something draws from no generator of torch's, and "
        "what ranks do cannot be compared."
    )


def _other(rank: int, what: str, numbers: str) -> ModelError:
    return ModelError(
        f"The forward pass of rank {rank} {what} than that of rank 0.",
        numbers,
        "Let the model and the loss not ask which rank they are on.",
    )


def _is_close(a: float, b: float, close: float) -> bool:
    return a == b or abs(a - b) <= close * max(abs(a), abs(b))


def _forward(step: Step, batch: Any) -> tuple[float, dict[str, int]]:
    """(loss, how often each operation and parameter stands in its graph)."""
    place, step.place = step.place, None  # under the names of the first micro-batch, on every rank
    try:
        with as_it_was(step, 1), alone():
            step.state.model.train()
            step._seed(0, 0, batch)
            with step.policy.around(step.state.device), step.policy.forward(step.state.device):
                total, _ = sum_and_weight(step.loss(step.state.model, batch), batch)
            return float(total.detach()), _graph(step, total)
    finally:
        step.place = place


def _graph(step: Step, total: Tensor) -> dict[str, int]:
    names = {id(p): f"{name} {list(p.shape)}" for name, p in named_trainable(step.state.model)}
    found: Counter[str] = Counter()
    seen, todo = set(), [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        found[node.name() if variable is None else names.get(id(variable), "another tensor")] += 1
        todo += [following for following, _ in node.next_functions]
    return dict(found)


def _differing(rank: int, first: dict[str, int], other: dict[str, int]) -> str:
    names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
    shown = [f"{name}: {first.get(name, 0)} times on rank 0, {other.get(name, 0)} on rank {rank}" for name in names[:4]]
    return "; ".join(shown) + (f"; and {len(names) - 4} more." if len(names) > 4 else ".")
