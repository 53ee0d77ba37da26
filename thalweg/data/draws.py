"""Random numbers of a data set's own code: named streams of the global generators, which stay the caller's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

#: Of Python's, numpy's and torch's global generator.
States = tuple[Any, Any, torch.Tensor]


class OwnRandom:
    """Python's, numpy's and torch's generators as a named stream: ours inside ``with``, the caller's outside."""

    def __init__(self, name: int) -> None:
        self._name = name
        self._mine: States | None = None
        self._theirs: States | None = None

    def __enter__(self) -> None:
        self._theirs = _states()
        try:
            self._begin()
        except BaseException:  # such as for states of another kind; __exit__ is not called then
            _set(self._theirs)
            raise

    def _begin(self) -> None:
        if self._mine is not None:
            _set(self._mine)
        else:
            random.seed(self._name)
            np.random.seed([self._name & 0xFFFFFFFF, self._name >> 32])
            torch.default_generator.manual_seed(self._name)

    def __exit__(self, *_: object) -> None:
        self._mine = _states()
        if self._theirs is not None:
            _set(self._theirs)

    def states(self) -> States | None:
        """Where the stream stands; None before its first use."""
        return self._mine

    def go_on(self, states: States) -> None:
        """The next use goes on from there."""
        self._mine = states


def _states() -> States:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set(states: States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
