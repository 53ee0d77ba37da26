"""What a policy changes in a model: its dtype, its entrance and exit, its islands, its 8-bit layers; and how that is undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from thalweg.core import ModelError, RecipeError
from thalweg.device import Device
from thalweg.precision.float8 import to_float8
from thalweg.precision.functions import converted, widened
from thalweg.precision.islands import Float32Forward, island_modules, keeps_float32, owned_tensors
from thalweg.precision.policy import Policy

_WIDE = (torch.float32, torch.float64)


class Prepared:
    """A model made ready for a policy. Names of modules, parameters and buffers stay as they are.

    Args:
        islands: words and patterns, as in a recipe.
        emulate: 8-bit layers compute on any device, in float32 with 8-bit roundings; for tests.

    Attributes:
        told: what was done, for people: (what, how many).

    Raises:
        RecipeError: for islands that match nothing, or that share weights with what is none.
        ModelError: for fp8 where no layer can be in 8 bits.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, device: Device, islands: Sequence[str], *, emulate: bool = False
    ) -> None:
        self.model, self.policy = model, policy
        self.told: list[tuple[str, int]] = []
        self._hooks: list[Any] = []
        self._casts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._forwards: list[Float32Forward] = []
        self._float8: list[tuple[nn.Module, str, nn.Module]] = []
        _check_plain(model)
        inside = island_modules(model, islands)
        narrow = policy.autocast or policy.stored
        if narrow is None:
            return
        if policy.stored is not None:
            self._store(policy.stored, inside)
            self._hooks.append(model.register_forward_pre_hook(Entrance(policy.stored), with_kwargs=True))
        for module in inside.values():
            forward = Float32Forward(module, device.kind, policy.stored)
            forward.put()
            self._forwards.append(forward)
        if inside:
            self.told.append((f"island modules, such as '{next(iter(inside))}'", len(inside)))
        if "logits" in islands:
            self._hooks.append(model.register_forward_hook(exit_in_float32))
        if policy.float8:
            self._float8 = to_float8(model, [*inside.values()], emulate=emulate)
            if not self._float8:
                self.undo()
                raise ModelError(
                    "precision='fp8' finds no layer to compute in 8 bits.",
                    "Linear layers count whose sizes are multiples of 16, but for islands and the last one.",
                    "Use precision='bf16', or widths that are multiples of 16.",
                )
            self.told.append(("linear layers in 8 bits", len(self._float8)))

    def _store(self, dtype: torch.dtype, inside: dict[str, nn.Module]) -> None:
        """Cast what lies in the model; islands and batch normalization get float32."""
        _check_shared(self.model, inside, dtype)
        keeping = [*inside.values(), *(m for m in self.model.modules() if keeps_float32(m))]
        wide = {id(x) for module in keeping for x in owned_tensors(module)}
        for x in {id(x): x for x in owned_tensors(self.model)}.values():
            to = torch.float32 if id(x) in wide else dtype
            if x.is_floating_point() and x.dtype != to:
                self._casts.append((x, x.data))
                x.data = x.data.to(to)
        num = sum(1 for p in self.model.parameters() if p.dtype == dtype)
        short = str(dtype).removeprefix("torch.")
        self.told.append((f"parameters in {short}", num))
        buffers = [name for name, x in self.model.named_buffers() if x.dtype == dtype]
        if buffers:
            self.told.append(
                (f"buffers in {short}, such as '{buffers[0]}'; islands keep what must not be rounded", len(buffers))
            )

    @property
    def held(self) -> int:
        """Bytes of what the tensors were before, until ``keep``."""
        return sum(before.nbytes for _, before in self._casts)

    def keep(self) -> None:
        """The cast is for good: what the tensors were before is let go."""
        self._casts = []

    def undo(self) -> None:
        """The model is plain again: what was put around and into it is taken off; after ``keep`` its dtypes stay."""
        for x, before in self._casts:
            x.data = before
        self._casts = []
        for hook in self._hooks:
            hook.remove()
        for forward in reversed(self._forwards):
            forward.take_off()
        for parent, name, module in self._float8:
            parent._modules[name] = module
        self._hooks, self._forwards, self._float8 = [], [], []


class Entrance:
    """A hook: floating inputs of the model in the dtype of its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return converted(args, _WIDE, self.dtype), converted(kwargs, _WIDE, self.dtype)


def exit_in_float32(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook: half-precision outputs of the model in float32."""
    return widened(output)


def _check_plain(model: nn.Module) -> None:
    """Refuse a model that another run or step still has."""
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    num = sum(hook is exit_in_float32 or isinstance(hook, Entrance) for hook in hooks)
    if num:
        raise ModelError(
            "The model is still prepared for another precision.",
            f"{num} hooks of a TrainStep are on it.",
            "Call finish() of that TrainStep first, or give a fresh model.",
        )


def _check_shared(model: nn.Module, inside: dict[str, nn.Module], dtype: torch.dtype) -> None:
    """Refuse an island that shares a weight with what is none."""
    island_of = {id(m): name for name, island in inside.items() for m in island.modules()}
    owners: dict[int, list[tuple[str, str | None]]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append((name or "the model", island_of.get(id(module))))
    for mine in owners.values():
        within, without = [name for _, name in mine if name], [owner for owner, name in mine if not name]
        if within and without:
            raise RecipeError(
                f"The island '{within[0]}' shares a weight with '{without[0]}', which is none.",
                f"It cannot be float32 in one and {str(dtype).removeprefix('torch.')} in the other.",
                "Name both in islands, or neither.",
            )
