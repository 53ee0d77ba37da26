"""Finding a model's repeated blocks: the layers of a transformer, the residual blocks of a convolutional net."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from thalweg.optim import plain_name

Kind = tuple[Any, ...]
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that the model is a row of, by their names in ``named_modules``; empty where it has none.

    A block is a child of an nn.ModuleList, nn.ModuleDict or nn.Sequential that has parameters and layers of its own, and
    whose class, or itself, stands in such lists at least twice. Of blocks inside blocks the outermost count; but what holds a
    row of blocks with normalization of their own is a stage, as are others of its class, and its blocks count instead.

    >>> layer = nn.TransformerEncoderLayer(8, 2)
    >>> list(repeated_blocks(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)))
    ['layers.0', 'layers.1', 'layers.2']
    """
    stages = {type(m) for m in model.modules() if not isinstance(m, _LISTS) and _is_stage(m)}
    found = list(_candidates(model, "", stages))
    times = Counter(type(module) for _, module in found)
    blocks: dict[str, nn.Module] = {}
    for name, module in found:
        if times[type(module)] > 1 and not any(module is other for other in blocks.values()):
            blocks[name] = module
    return blocks


def kind_of(block: nn.Module) -> Kind:
    """Equal for blocks that one graph fits: class, layers, shapes, and what trains."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return type(block), repr(block), tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in tensors)


def most_of_a_kind(model: nn.Module) -> int:
    """How many repeated blocks of one kind the model has, of that which it has most of."""
    return max(Counter(map(kind_of, repeated_blocks(model).values())).values(), default=0)


def _candidates(module: nn.Module, name: str, stages: set[type]) -> Iterator[tuple[str, nn.Module]]:
    """Children of lists, from the outside in; one that stands in several places comes several times."""
    in_list = isinstance(module, _LISTS)
    for key, child in module._modules.items():
        if child is None or isinstance(child, torch.jit.ScriptModule):
            continue
        path = f"{name}.{key}" if name else key
        of_stages = _is_stage(child) if isinstance(child, _LISTS) else type(child) in stages
        if in_list and _has_layers(child) and not isinstance(child, _LISTS[:2]) and not of_stages:
            yield path, child
        else:
            yield from _candidates(child, path, stages)


def _has_layers(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _is_stage(module: nn.Module) -> bool:
    """Whether it holds a row of blocks; experts and heads, which have no normalization, are no blocks."""
    for part in module.modules():
        if isinstance(part, _LISTS):
            kinds = Counter(type(child) for child in part.children() if _has_layers(child) and _has_norm(child))
            if kinds and max(kinds.values()) > 1:
                return True
    return False


def _has_norm(module: nn.Module) -> bool:
    return any("norm" in type(part).__name__.lower() for part in module.modules())


def described(blocks: dict[str, nn.Module]) -> str:
    """How many blocks of which classes, for people."""
    kinds = Counter(type(module).__name__ for module in blocks.values())
    names = [plain_name(name) for name in blocks]
    return f"{' and '.join(f'{num} {kind}' for kind, num in kinds.items())}, {names[0]} to {names[-1]}"
