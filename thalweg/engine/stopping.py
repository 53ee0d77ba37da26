"""Rules over evaluations that end a run: nothing becomes better any more, or what was wanted is reached."""

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


@dataclass
class Target:
    """Ends a run at the first evaluation that is as good as ``value``.

    >>> target = Target(value=0.9, goal="max")
    >>> target.tell(0.8), target.tell(float("nan")), target.tell(0.9), target.is_reached()
    (False, False, True, True)

    Attributes:
        by: the evaluation that was.
    """

    value: float | None
    goal: str
    by: float | None = None

    def tell(self, value: float) -> bool:
        """Take note of an evaluation; whether the run should end now."""
        if not self.is_reached() and self._is_met(value):
            self.by = value
        return self.is_reached()

    def is_reached(self) -> bool:
        """Whether the run has ended by this rule; another target, accepted on resuming, may be further off."""
        return self.by is not None and self._is_met(self.by)

    def _is_met(self, value: float) -> bool:
        if self.value is None:
            return False
        return value <= self.value if self.goal == "min" else value >= self.value
