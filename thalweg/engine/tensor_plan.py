"""Which layers of a model are cut over ranks that compute them together, by the model's own plan or the recipe's.

A plan is a table of patterns of modules' names. "colwise" cuts the rows of a linear layer's weight, so that each rank has some of
its outputs; "colwise:3" cuts each of three equal runs of rows, for queries, keys and values in one layer; "rowwise" cuts columns,
takes what a colwise layer left on each rank, and adds up. Between the two, activations are parts; everywhere else they are whole.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import ModelError, Recipe, RecipeError, did_you_mean

#: Of a plan's styles: what is cut and gathered again at once, and may as well stay whole.
BY_THEMSELVES = ("colwise_gather_output", "colwise_rep", "embedding_rowwise")
STYLES = ("colwise", "rowwise", *BY_THEMSELVES)
_HEADS = ("heads", "num_heads", "n_head", "n_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
_WAY_OUT = (
    'Give tensor_plan = {"blocks.*.up" = "colwise", "blocks.*.down" = "rowwise"} in the recipe, or another parallel.'
)


@dataclass(frozen=True)
class Cut:
    """How one linear layer is cut.

    Attributes:
        name: of the module; dim: of its weight, 0 or 1; packs: equal runs of rows that are each cut; gathers: whether its
            outputs are put together again at once.
    """

    name: str
    dim: int
    packs: int = 1
    gathers: bool = False


@dataclass(frozen=True)
class CutPiece:
    """A parameter that is cut along one dimension, in equal parts.

    >>> piece = CutPiece((6, 4), 2, dim=0, packs=3)
    >>> import torch
    >>> whole = torch.arange(6)[:, None].expand(6, 4)
    >>> piece.mine(whole, 1)[:, 0].tolist(), piece.size
    ([1, 3, 5], (3, 4))
    """

    shape: tuple[int, ...]
    world: int
    dim: int
    packs: int = 1

    @property
    def size(self) -> tuple[int, ...]:
        """Of every rank's part."""
        return tuple(n // self.world if i == self.dim else n for i, n in enumerate(self.shape))

    def mine(self, whole: Tensor, rank: int) -> Tensor:
        part: Tensor = self._laid(whole).chunk(self.world, self.dim + 1)[rank].movedim(0, self.dim).reshape(self.size)
        return part

    def together(self, parts: list[Tensor]) -> Tensor:
        """The whole, from all parts."""
        whole: Tensor = torch.cat(list(map(self._laid, parts)), self.dim + 1).movedim(0, self.dim).reshape(self.shape)
        return whole

    def _laid(self, whole: Tensor) -> Tensor:
        laid: Tensor = whole.unflatten(self.dim, (self.packs, -1)).movedim(self.dim, 0)
        return laid


def tensor_cuts(
    model: nn.Module, recipe: Recipe, world: int, take: Callable[[str, Any, str], object] = lambda *told: None
) -> list[Cut]:
    """The layers that are cut in ``world`` parts, in the model's order.

    Args:
        take: is told what a plan names and stays whole.

    Raises:
        ModelError, RecipeError: for a model without a plan, and a plan that does not go with it.
    """
    plan, whose = _plan_of(model, recipe)
    modules = dict(model.named_modules())
    uses = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    cuts: dict[str, Cut] = {}
    for pattern, style in plan.items():
        dim, packs, alone = _read(pattern, style, whose)
        named = fnmatch.filter(modules, pattern)
        if not named and whose == "tensor_plan":
            raise RecipeError(
                f"tensor_plan names '{pattern}', and no module is called so.",
                f"{len(modules)} modules.",
                did_you_mean(pattern, [name for name, module in modules.items() if isinstance(module, nn.Linear)]),
            )
        for name in named:
            why = _why_whole(modules[name], dim, packs, world, uses)
            if alone and (why or style == "embedding_rowwise"):
                take("tensor_plan", name, f"stays whole: {why or 'a lookup costs less than its sum would'}")
            elif why:
                raise ModelError(
                    f"'{name}' cannot be cut in {world} parts, as {whose} says ('{pattern}': '{style}').",
                    f"{why[0].upper()}{why[1:]}.",
                    f"Give parallel.tensor a number that divides it, or leave the layer out. {_WAY_OUT}",
                )
            else:
                cuts[name] = Cut(name, dim, packs, gathers=alone)
    if not cuts:
        raise ModelError(f"The plan for tensor={world} cuts no layer.", f"{whose} has {len(plan)} patterns.", _WAY_OUT)
    _check_heads(model, cuts, world)
    return [cuts[name] for name in modules if name in cuts]


def _plan_of(model: nn.Module, recipe: Recipe) -> tuple[Mapping[str, str], str]:
    """(the plan, whose it is)."""
    if recipe.tensor_plan:
        return recipe.tensor_plan, "tensor_plan"
    for name in ("tp_plan", "_tp_plan"):
        found = getattr(model, name, None)
        if isinstance(found, Mapping) and found:
            return found, f"{type(model).__name__}.{name}"
    raise ModelError(
        "The model does not say which of its layers could be cut (parallel.tensor).",
        f"{type(model).__name__} has no tp_plan, and the recipe no tensor_plan.",
        _WAY_OUT,
    )


def _read(pattern: str, style: Any, whose: str) -> tuple[int, int, bool]:
    """(dimension of the weight, packs, whether its outputs are gathered at once)."""
    word, _, packs = str(style).partition(":")
    if word not in STYLES or (packs and (word != "colwise" or not packs.isdecimal() or int(packs) < 1)):
        raise RecipeError(
            f"{whose}: '{pattern}' = '{style}' is not known.",
            f"It is one of {', '.join(STYLES)}, or such as colwise:3.",
            "Write a plan of linear layers alone, in the recipe's tensor_plan.",
        )
    return int(word == "rowwise"), int(packs or 1), word in BY_THEMSELVES


def _why_whole(module: nn.Module, dim: int, packs: int, world: int, uses: Counter[int]) -> str:
    """Why a module cannot be cut; "" where it can."""
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, and linear layers are cut"
    if uses[id(module.weight)] > 1:
        return "its weight is another layer's too"
    num = module.weight.shape[dim]
    if num % (packs * world):
        what = "features that it takes" if dim else "features that it gives"
        return f"{num} {what}{f', in {packs} runs,' if packs > 1 else ''} are no multiple of {packs * world}"
    return ""


def _check_heads(model: nn.Module, cuts: Mapping[str, Cut], world: int) -> None:
    """Layers that give heads of attention give whole ones."""
    for where, name, num in _heads(model, cuts):
        if num % world:
            raise ModelError(
                f"parallel.tensor={world} does not divide the heads of attention.",
                f"{where or type(model).__name__} has {name}={num}; {num} / {world} = {num / world:.2f}.",
                f"Use a number that divides {num}, or a tensor_plan without these layers.",
            )


def _heads(model: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, str, int]]:
    parents = {name.rpartition(".")[0] for name in cuts}
    holders = [(where, module) for where, module in model.named_modules() if where in parents]
    holders += [("config", model.config)] if hasattr(model, "config") else []
    for where, holder in holders:
        for name in _HEADS:
            num = getattr(holder, name, None)
            if type(num) is int and num > 0:
                yield where, name, num
