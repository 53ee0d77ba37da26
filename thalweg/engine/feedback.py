"""Schedules that listen to the run: what they have heard is a few numbers on the device, part of the run's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.schedules import Listening

#: What is remembered of each piece, in this order.
HEARD = ("factor", "best", "bad", "resting", "mean", "heard")


def listen(heard: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
    """What a piece remembers after one more value. Smaller is better; NaN is never better, and counts.

    After ``patience`` values in a row that are not better than the best by more than ``min_delta``, the factor falls by
    ``factor``, to no less than ``least``; the next ``rest`` values are not counted.

    Args:
        heard: (6,), as in ``HEARD``.
        value: 0-dim.
    """
    factor, best, bad, resting, mean, count = heard.unbind()
    if "smooth" in options:
        smooth = options["smooth"]
        mean, count = smooth * mean + (1 - smooth) * value, count + 1
        value = mean / (1 - smooth**count)
    better = value < best - options["min_delta"]
    bad = torch.where(better | (resting > 0), torch.zeros_like(bad), bad + 1)
    falls = bad >= options["patience"]
    lower = torch.minimum(factor, (factor * options["factor"]).clamp(min=options["least"]))
    return torch.stack(
        [
            torch.where(falls, lower, factor),
            torch.where(better, value, best),
            torch.where(falls, torch.zeros_like(bad), bad),
            torch.where(falls, torch.full_like(resting, options["rest"]), (resting - 1).clamp(min=0)),
            mean,
            count,
        ]
    )


class Feedback:
    """The listening pieces of a run.

    Attributes:
        values: (pieces, 6), as in ``HEARD``; what a checkpoint keeps.
    """

    def __init__(self, pieces: Sequence[tuple[str, Listening]], device: torch.device, exact: torch.dtype) -> None:
        self.pieces = list(pieces)
        start = [1.0, float("inf"), 0.0, 0.0, 0.0, 0.0]
        self.values = torch.tensor([start] * len(self.pieces), dtype=exact, device=device).reshape(-1, len(HEARD))
        self._rows = list(self.values)

    def hear(self, kind: str, value: Tensor, applied: Tensor, ok: Tensor | None = None) -> None:
        """Hand a value to the pieces that listen for it, while they last.

        Args:
            kind: "evaluation" or "loss".
            value: 0-dim; smaller is better.
            applied: updates applied so far, (1,).
            ok: 0-dim bool; where false nothing is heard.
        """
        for (_, piece), row in zip(self.pieces, self._rows):
            if piece.kind == kind:
                lasts = (applied[0] >= piece.first) & (applied[0] < piece.stop)
                lasts = lasts if ok is None else lasts & ok
                row.copy_(torch.where(lasts, listen(row, value.to(row.dtype), piece.options), row))

    def apply(self, now: Mapping[str, Tensor]) -> None:
        """Multiply the scheduled values by what has been heard."""
        for (name, _), row in zip(self.pieces, self._rows):
            now[name].mul_(row[0])

    def forget(self, kind: str) -> None:
        """What was best counts no more, where other values are heard from here on; what has fallen stays fallen."""
        for (_, piece), row in zip(self.pieces, self._rows):
            if piece.kind == kind:
                row[1], row[2] = float("inf"), 0.0

    def hears(self, kind: str) -> bool:
        return any(piece.kind == kind for _, piece in self.pieces)
