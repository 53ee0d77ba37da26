"""The training step whose gradients are released: the update happens in the backward pass (``engine/release.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.engine.backward import backward
from thalweg.engine.portions import go_through
from thalweg.engine.release import Release, check_window
from thalweg.engine.step import Step


class ReleasedStep(Step):
    """A step over windows of one micro-batch, whose arenas have no gradients.

    Args:
        release: of the arenas of the state; the rest is as for ``Step``.
    """

    def __init__(self, *args: Any, release: Release) -> None:
        super().__init__(*args)
        self.release = release

    def _move(self, window: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As for ``Step``, the update being done in the backward pass."""
        check_window(window)
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def one(index: int, first: int, batch: Any, last: bool) -> int:
            found.append(self._released(batch))
            return 0

        with self.policy.around(self.state.device):
            go_through(window, one, self.state.limit, self.undo, moved=self.state.moved)
        return found[0]

    def _released(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same for its one micro-batch; from ``state.moved()`` on it cannot be tried again."""
        state, release = self.state, self.release
        if release.two_pass:
            with release.measuring():
                self._passes(0, 0, batch, True)
            with torch.no_grad():
                mass = self._mass()
                norm = release.norm() / mass
                ok = self._allowed(norm)
                state.updating = state.history is not None  # which takes in the norm now
                given = self._numbers(mass, norm, ok)
            if state.statistics.layers:
                state.statistics.pause()
            with release.updating(given, due=state.step):
                self._passes_again(0, 0, batch, True)
            state.updating = True
            return norm, ok, given["skipped"]
        self._seed(0, 0, batch)
        total, weight = self._forward(batch)
        self._count(total, weight)
        with torch.no_grad():
            mass = self._mass()
            ok = torch.isfinite(self.sum_of_losses / mass)
            given = self._numbers(mass, None, ok)
        with release.updating(given, due=state.step):
            backward(total, self._backward_seed(total))
        state.updating = True
        if state.statistics.layers:
            state.statistics.collect(last=True)
        with torch.no_grad():
            return release.norm() / mass, ok, given["skipped"]
