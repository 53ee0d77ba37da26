"""The one door for maths on whole matrices inside a rule: a product, an orthogonalization.

Called through ``on_matrices``, such a step stands out when the rule is recorded: a compiler leaves it alone and makes one kernel of
what comes before and one of what comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Function = Callable[..., Tensor]
_recorders: list[Callable[[Function, Tensor, dict[str, Any]], Tensor]] = []


def on_matrices(function: Function, x: Tensor, **words: Any) -> Tensor:
    """``function(x, **words)``, a tensor of the shape and dtype of ``x``."""
    return _recorders[-1](function, x, words) if _recorders else function(x, **words)


@contextmanager
def recorded_by(recorder: Callable[[Function, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    """Inside, calls are handed to ``recorder`` instead."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()
