"""The weights of the best evaluation so far."""

from __future__ import annotations

from typing import Any

from thalweg.engine import evaluated_weights
from thalweg.regularize import PreciseStatistics


class BestWeights:
    """The weights of the best evaluation so far, as they were evaluated: averaged where there is an average.

    Attributes:
        values: by name, as in the model's state dict; empty before the first.
    """

    def __init__(self, state: Any, precise: PreciseStatistics | None) -> None:
        self.state, self.precise = state, precise
        self.values: dict[str, Any] = {}

    def keep(self) -> None:
        with evaluated_weights(self.state, self.precise):
            self.values = {name: tensor.clone() for name, tensor in self.state.weights().items()}

    def adopt(self) -> None:
        """Leave them in the model."""
        live = self.state.weights()
        for name, tensor in self.values.items():
            live[name].copy_(tensor)
