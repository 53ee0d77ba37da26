"""Islands: modules that compute in float32 whatever the precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from thalweg.core import RecipeError, did_you_mean
from thalweg.precision.functions import converted, widened

#: Words that a recipe's ``islands`` may have, besides patterns of modules' names.
WORDS = ("norm", "softmax", "logits")
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")


def island_modules(model: nn.Module, islands: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that a recipe's ``islands`` mean, by name; one that lies inside another is left out.

    Raises:
        RecipeError: for a pattern that no module's name matches.
    """
    named = {_plain(name): module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for word in islands:
        if word in WORDS:
            kind = {"norm": _normalizes, "softmax": _is_softmax}.get(word)
            found |= {name: m for name, m in named.items() if kind is not None and kind(m)}
            continue
        matching = {name: module for name, module in named.items() if fnmatchcase(name, word)}
        if not matching:
            raise RecipeError(
                f"islands='{word}' matches no module.",
                f"The model has {len(named)}.",
                did_you_mean(word, [*WORDS, *_few(named)]),
            )
        found |= matching
    return {n: m for n, m in found.items() if not any(n.startswith(f"{outer}.") for outer in found)}


def keeps_float32(module: nn.Module) -> bool:
    """Whether a layer's parameters and statistics stay float32 though all others are stored in half precision."""
    return isinstance(module, _NormBase) and (module.running_mean is not None or module.weight is not None)


def owned_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a module and what lies inside it."""
    yield from module.parameters()
    yield from module.buffers()


class Float32Forward:
    """Takes the place of a module's ``forward``: inputs cast up, autocast off.

    Args:
        kind: kind of device.
        back: the dtype that float32 results are given back in, or None: they stay.
    """

    def __init__(self, module: nn.Module, kind: str, back: torch.dtype | None) -> None:
        self.module, self.kind, self.back = module, kind, back
        self.before = module.__dict__.get("forward")
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before or type(self.module).forward.__get__(self.module)
        if not self.on:
            return forward(*args, **kwargs)
        with torch.autocast(self.kind, enabled=False):
            out = forward(*widened(args), **widened(kwargs))
        return out if self.back is None else converted(out, (torch.float32,), self.back)

    def put(self) -> None:
        self.module.__dict__["forward"] = self

    def take_off(self) -> None:
        """The module is as it was; where another stands around this one, this one does nothing from now on."""
        self.on = False
        if self.module.__dict__.get("forward") is self:
            if self.before is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.before


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _normalizes(module: nn.Module) -> bool:
    """A normalization layer, by its name or a base's: RMSNorm and the like of any library."""
    named = any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
    return named and not any(True for _ in module.children())


def _is_softmax(module: nn.Module) -> bool:
    return isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.MultiheadAttention))


def _few(named: dict[str, nn.Module]) -> list[str]:
    return list(named)[:40]
