"""Slow float64 transcriptions of the papers' formulas: the oracle of every rule, and the option sets that change its maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests import oracles_element, oracles_matrix, oracles_tensor
from tests.oracles_element import Array, Gradients, Starts, _each, sophia


def sgd(ps: Starts, gs: Gradients, *, lr: float, momentum: float = 0.0, nesterov: bool = False) -> list[Array]:
    """Sutskever et al. 2013 with the rate kept out of the velocity: v = mu v + g; p -= lr (v or g + mu v)."""
    ends = []
    for x, mine in _each(ps, gs):
        v = np.zeros_like(x)
        for g in mine:
            v = momentum * v + g
            x = x - lr * ((g + momentum * v) if nesterov else v)
        ends.append(x)
    return ends


def adam(
    ps: Starts,
    gs: Gradients,
    *,
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    amsgrad: bool = False,
) -> list[Array]:
    """Kingma and Ba 2014, algorithm 1, line by line; the largest v so far, before its correction, as torch has it."""
    ends = []
    for x, mine in _each(ps, gs):
        m, v, most = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        for t, g in enumerate(mine, start=1):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            most = np.maximum(most, v)
            m_hat, v_hat = m / (1 - b1**t), (most if amsgrad else v) / (1 - b2**t)
            x = x - lr * m_hat / (np.sqrt(v_hat) + eps)
        ends.append(x)
    return ends


def _sophia(ps: Starts, gs: Gradients, *, lr: float, curvature: Gradients, **options: Any) -> list[Array]:
    return sophia(ps, gs, lr=lr, curvatures=curvature, **options)


ORACLES: dict[str, Callable[..., list[Array]]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adam,
    "sophia": _sophia,
    **oracles_element.ORACLES,
    **oracles_tensor.ORACLES,
    **oracles_matrix.ORACLES,
}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"amsgrad": True, "b2": 0.5}),
    ("adamw", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    ("sophia", {"frequency": 3, "b1": 0.8, "gamma": 0.5}),
    *oracles_element.CASES,
    *oracles_tensor.CASES,
    *oracles_matrix.CASES,
]
