"""Linear layers that multiply in 8 bits, by torchao."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from torch import nn

_MULTIPLE = 16  # what the chip's 8-bit products need of both sizes of a weight


def float8_layers(model: nn.Module, islands: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The linear layers that can be in 8 bits, by name: sizes that are multiples of 16, no islands, not the output layer.

    The output layer is the last linear layer of the model, in the order in which modules were made.
    """
    away = {id(m) for island in islands for m in island.modules()}
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    last = next(reversed(linear), None)
    return {
        name: m
        for name, m in linear.items()
        if name != last and name and id(m) not in away and not (m.in_features % _MULTIPLE or m.out_features % _MULTIPLE)
    }


def to_float8(
    model: nn.Module, islands: Sequence[nn.Module], *, emulate: bool = False
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put torchao's 8-bit layers in the place of linear ones; parameters are the same objects, and so are their names.

    Returns:
        (parent, name, the layer that stood there), to put back.
    """
    found = float8_layers(model, islands)
    if not found:
        return []
    places = [(_parent(model, name), name.rpartition(".")[2], module) for name, module in found.items()]
    with contextlib.redirect_stderr(io.StringIO()):  # it tells of libraries for other chips that it did not load
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    convert_to_float8_training(
        model, module_filter_fn=lambda module, name: name in found, config=Float8LinearConfig(emulate=emulate)
    )
    return places


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
