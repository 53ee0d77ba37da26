"""DropConnect: weights are left out, not values."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.core import ModelError
from thalweg.regularize.changes import Change
from thalweg.regularize.dropout import Drop, check_rate


class DropConnect(Drop):
    """Each weight is left out with probability p; the others are divided by 1 - p. ``drop_connect`` puts it into a layer.

    One mask serves all samples and all micro-batches of a step: it is a function of (seed, step, layer).

    Args:
        p: in [0, 1).

    Departures: the paper draws a mask for each sample and evaluates with a Gaussian; one mask a step and the mean weights
    are what fits a matrix product.

    References: Wan et al. 2013, ICML.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """weight of any shape."""
        if not self.training or self.p == 0:
            return weight
        return self._kept(weight, self.step_bits(weight, weight.shape, by_call=False))


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.get_submodule("drop_connect")(self.weight)
        return F.linear(input, weight, self.bias)


class _Conv:
    def forward(self: Any, input: Tensor) -> Tensor:
        weight: Tensor = self.get_submodule("drop_connect")(self.weight)
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


class _Conv1d(_Conv, nn.Conv1d):
    pass


class _Conv2d(_Conv, nn.Conv2d):
    pass


class _Conv3d(_Conv, nn.Conv3d):
    pass


_WITH: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _Conv1d,
    nn.Conv2d: _Conv2d,
    nn.Conv3d: _Conv3d,
}


def drop_connect(module: nn.Module, p: float) -> Change:
    """Put DropConnect on the weight of one layer, in place. Parameters, their names and evaluation stay as they are.

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d.
        p: in [0, 1).

    Raises:
        ModelError: for any other module, or a rate outside [0, 1).
    """
    check_rate("DropConnect", p)
    kind = type(module)
    if kind not in _WITH:
        raise ModelError(
            f"DropConnect was asked for on a {kind.__name__}.",
            f"It knows {', '.join(known.__name__ for known in _WITH)}, and one of them only once.",
            "Give such a layer of the model, or write DropConnect into your own: DropConnect(p)(weight).",
        )
    module.__class__ = _WITH[kind]
    module.add_module("drop_connect", DropConnect(p).train(module.training))
    return Change("", kind.__name__, f"{kind.__name__} with DropConnect(p={p:g})")
