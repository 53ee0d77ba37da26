"""Slow float64 transcriptions of the papers' formulas, in plain Python numbers: the oracles of the rules.

Each is a generator: it is sent gradients, one scalar parameter at a time, and yields the parameter after each update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def sgd(p: float, gs: Sequence[float], *, lr: float, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Sutskever et al. 2013 with the rate kept out of the velocity: v = mu v + g; p -= lr (v or g + mu v)."""
    v = 0.0
    for g in gs:
        v = momentum * v + g
        p -= lr * ((g + momentum * v) if nesterov else v)
    return p


def adam(p: float, gs: Sequence[float], *, lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> float:
    """Kingma and Ba 2014, algorithm 1, line by line."""
    m = v = 0.0
    for t, g in enumerate(gs, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        p -= lr * m_hat / (math.sqrt(v_hat) + eps)
    return p


ORACLES: dict[str, Callable[..., float]] = {"sgd": sgd, "adam": adam, "adamw": adam}
