"""Early stopping: a rule over evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class EarlyStop:
    """Ends a run after ``patience`` evaluations in a row that were not better than the best by more than ``min_delta``.

    NaN is never better, and counts as one that is not (Prechelt 1998, "Early stopping, but when?", the UP criterion with
    a best value instead of the last).

    >>> stop = EarlyStop(patience=2, goal="min")
    >>> [stop.tell(loss) for loss in (1.0, 0.9, float("nan"), 0.9, 0.5)]
    [False, False, False, True, False]
    """

    patience: int
    goal: str
    min_delta: float = 0.0
    best: float = math.inf
    bad: int = 0

    def tell(self, value: float) -> bool:
        """Take note of an evaluation; whether the run should end now."""
        value = value if self.goal == "min" else -value
        if value < self.best - self.min_delta:
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        return self.is_over()

    def is_over(self) -> bool:
        """Whether the run has ended by this rule."""
        return 0 < self.patience <= self.bad

    def facts(self) -> list[float]:
        """What a checkpoint keeps; infinity as a text, for JSON has none."""
        return [self.best if math.isfinite(self.best) else 1e308, float(self.bad)]

    def restore(self, facts: list[float]) -> None:
        self.best = facts[0] if facts[0] < 1e308 else math.inf
        self.bad = int(facts[1])
