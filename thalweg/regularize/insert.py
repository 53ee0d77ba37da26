"""Stochastic depth or dropout for a model that has none: attached by hooks, so that no name of a parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from thalweg.core import ModelError
from thalweg.regularize.changes import Change
from thalweg.regularize.dropout import MODES, Dropout, StochasticDepth, check_rate
from thalweg.regularize.residual import Branch, Run, watch


def add_stochastic_depth(model: nn.Module, run: Callable[[], Any], p: float, *, mode: str = "row") -> list[Change]:
    """Put a StochasticDepth behind every residual branch of ``model``, in place; the l-th of L has the rate l/L*p.

    Parameters and their names stay as they are, and so does evaluation, to the bit. Copies and pickles keep it.

    Args:
        model: its residual additions are found by running it once, in evaluation mode. Each branch must be the output of a
            module that is called once in a forward pass.
        run: does one forward pass, such as ``lambda: model(batch)``; two samples will do. Not through torch.compile.
        p: rate of the last branch, in [0, 1).
        mode: "row" or "batch", as in StochasticDepth.

    Returns:
        What was added, in the order of the additions.

    Raises:
        ModelError: if the rate or the mode is none, the model has stochastic depth already, no branch is found, or one of
            them cannot be reached; nothing is changed then.

    References: Huang et al. 2016, arXiv:1603.09382, section 3 (the linear rule).
    """
    check_rate("StochasticDepth", p)
    if mode not in MODES:
        raise ModelError(f"mode={mode!r} is not known.", f"Modes: {', '.join(MODES)}.", "Use one of these.")
    there = [name for name, module in model.named_modules() if _is_depth(module)]
    if there:
        raise ModelError(
            "Stochastic depth was asked for, and the model has it already.",
            f"{len(there)} layers, such as '{there[0]}'.",
            "Set the rates of these; convert_dropout makes them ours.",
        )
    branches = _free(_branches(model, run), "stochastic_depth")
    share = p / len(branches)
    return [_behind(branch, StochasticDepth(share * place, mode)) for place, branch in enumerate(branches, 1)]


def add_dropout(
    model: nn.Module, run: Callable[[], Any], p: float, *, at: str | Sequence[str] = "residual"
) -> list[Change]:
    """Put Dropout into ``model``, in place. Names of parameters and evaluation stay as they are.

    Args:
        model, run: as for ``add_stochastic_depth``.
        p: rate, in [0, 1).
        at: "residual": behind every residual branch. "head": before the last nn.Linear that runs. Or patterns of module
            names (``["blocks.*.mlp"]``): behind the output of each module that matches.

    Returns:
        What was added.

    Raises:
        ModelError: if there is no such place; nothing is changed then.
    """
    check_rate("Dropout", p)
    if isinstance(at, str) and at not in ("residual", "head"):
        raise ModelError(
            f"at={at!r} is no place for dropout.", "Places: residual, head.", "Use one of these, or a list of patterns."
        )
    if at == "residual":
        return [_behind(branch, Dropout(p)) for branch in _free(_branches(model, run), "added_dropout")]
    seen = watch(model, run)
    if at == "head":
        return [_before(branch, Dropout(p)) for branch in _free([_head(seen)], "added_dropout")]
    return [_behind(branch, Dropout(p)) for branch in _free(_matching(model, seen, at), "added_dropout")]


def _is_depth(module: nn.Module) -> bool:
    names = {"StochasticDepth": "p", "DropPath": "drop_prob"}
    attribute = names.get(type(module).__name__)
    return attribute is not None and bool(getattr(module, attribute, 0))


def _branches(model: nn.Module, run: Callable[[], Any]) -> list[Branch]:
    seen = watch(model, run)
    if seen.unreachable:
        raise ModelError(
            "Not every residual branch of the model can be reached.",
            f"{len(seen.branches)} of {len(seen.branches) + seen.unreachable} are the output of a module that is called once.",
            "End each branch with a module of its own (nn.Identity will do), or put the layers into the model's code.",
        )
    if not seen.branches:
        raise ModelError(
            "The model has no residual branches.",
            f"{len(seen.calls)} calls of modules were seen, and no sum of a value and of what was computed from it.",
            "Check that run() calls the model itself, not compiled; use add_dropout at='head' or with patterns.",
        )
    return seen.branches


def _head(seen: Run) -> Branch:
    linear = [Branch(name, module) for name, module in seen.calls if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(
            "Dropout was asked for before the last nn.Linear, and none runs.",
            f"{len(seen.calls)} calls of modules were seen.",
            "Name the places by patterns: at=['*.classifier'].",
        )
    return linear[-1]


def _matching(model: nn.Module, seen: Run, patterns: Sequence[str]) -> list[Branch]:
    named = dict(model.named_modules())
    found: dict[str, Branch] = {}
    for pattern in patterns:
        names = [name for name in named if name and fnmatchcase(name, pattern)]
        if not names:
            raise ModelError(
                f"No module matches '{pattern}'.",
                f"{len(named) - 1} modules, such as {', '.join(list(named)[1:6])}.",
                "Use names from model.named_modules(); * stands for any text.",
            )
        for name in names:
            if named[name] not in seen.tensors:
                raise ModelError(
                    f"'{name}' matches '{pattern}', and dropout has no place behind it.",
                    f"It is a {type(named[name]).__name__} that does not return one tensor in a forward pass.",
                    "Name modules that run and return a tensor.",
                )
            found[name] = Branch(name, named[name])
    return list(found.values())


def _free(branches: list[Branch], name: str) -> list[Branch]:
    """The same, if none has a layer of this name yet."""
    for branch in branches:
        if hasattr(branch.module, name):
            raise ModelError(
                f"'{branch.name}' has a '{name}' already.", f"It is {getattr(branch.module, name)}.", "Set its rate."
            )
    return branches


def _behind(branch: Branch, layer: Dropout | StochasticDepth) -> Change:
    if isinstance(layer, StochasticDepth):
        name, hook = "stochastic_depth", _dropped_depth
    else:
        name, hook = "added_dropout", _dropped
    change = _added(branch, name, layer, f"then {layer}")
    if type(branch.module).forward is not nn.Sequential.forward:  # that one runs all its children by itself
        branch.module.register_forward_hook(hook)
    return change


def _before(branch: Branch, layer: Dropout) -> Change:
    change = _added(branch, "added_dropout", layer, f"after {layer}")
    branch.module.register_forward_pre_hook(_dropped_input)
    return change


def _added(branch: Branch, name: str, layer: nn.Module, what: str) -> Change:
    kind = type(branch.module).__name__
    branch.module.add_module(name, layer.train(branch.module.training))
    return Change(branch.name, kind, f"{kind}, {what}")


# Functions of the module, not closures: copies and pickles of the model call them too.
def _dropped(module: nn.Module, args: Any, output: Any) -> Any:
    return module.get_submodule("added_dropout")(output)


def _dropped_depth(module: nn.Module, args: Any, output: Any) -> Any:
    return module.get_submodule("stochastic_depth")(output)


def _dropped_input(module: nn.Module, args: Any) -> Any:
    return (module.get_submodule("added_dropout")(args[0]), *args[1:])
