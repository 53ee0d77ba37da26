"""What the recipe's ``compile`` becomes: refused where it cannot be, passed over with the reason, or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.core import ParameterRow, Recipe, RecipeError
from thalweg.device import Device
from thalweg.engine.blocks import most_of_a_kind, repeated_blocks
from thalweg.engine.compiled_backend import traces_autograd
from thalweg.regularize import FrozenBatchNorm
from thalweg.rules import RULES

Take = Callable[[str, Any, str], Any]

OLDER = "this torch cannot trace a backward pass into the graph of its forward pass; torch 2.13 can"

#: Against any graph of a model whose parameters are spread over ranks.
IN_PARTS = "parameters are spread over ranks, and gathered block by block while a pass runs"
WHOLE = ("step", "captured")  # values of ``compile`` that make one graph of a step
#: Blocks of one kind from which on ``auto`` tries them: a graph is compiled for each kind.
ENOUGH = 3


def why_not(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    device: Device,
    how: str,
    against: str = "",
    model: nn.Module | None = None,
) -> str:
    """Why a complete recipe cannot be compiled so on a device; "" where it can.

    Args:
        rows: the parameter table.
        how: "model", "blocks", "step" or "captured".
        against: what is against graphs of this model there, if anything is.
        model: whose blocks are looked for; None: of one that has none.
    """
    if how == "off":
        return ""
    if against:
        return against
    if not device.compile_backend:
        return f"torch.compile has no backend for {device.kind}"
    if how == "model":
        return ""
    if how == "blocks":
        return _why_no_blocks(recipe, model)
    if how == "captured" and not device.captures_graphs:
        return f"launches cannot be recorded on {device.kind}"
    optimizer = recipe.optimizer
    if optimizer.release_gradients not in (None, "off"):
        return "optimizer.release_gradients updates inside the backward pass, which a graph has no place for"
    if optimizer.offload:
        return "optimizer.offload moves slots between memories while the update runs"
    if recipe.recompute not in (None, "none"):
        return f"recompute='{recipe.recompute}' runs blocks again, and in one graph the compiler decides what is kept"
    if recipe.exact_reduce:
        return "exact_reduce adds up gradients micro-batch by micro-batch, between the passes"
    if recipe.regularize.sharpness:
        return "regularize.sharpness goes through the window twice"
    noisy = sorted({row.rule for row in rows if "noise" in RULES[row.rule].needs})
    if noisy:
        return f"{noisy[0]} draws noise from a generator of its own at every step"
    return ""


def _why_no_blocks(recipe: Recipe, model: nn.Module | None) -> str:
    if recipe.recompute not in (None, "none"):
        return f"recompute='{recipe.recompute}' runs blocks again, each by a function of its own, and they would share no graph"
    blocks = {} if model is None else repeated_blocks(model)
    if not blocks:
        return (
            "the model has no repeated blocks: two or more modules of one class, with layers of their own, in an "
            "nn.ModuleList, nn.ModuleDict or nn.Sequential"
        )
    for name, block in blocks.items():
        if any(isinstance(m, _BatchNorm) and not isinstance(m, FrozenBatchNorm) for m in block.modules()):
            return (
                f"'{name}' holds batch normalization, which is counted by layer: each block would be a graph of its own"
            )
    return ""


def settle_compile(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    device: Device,
    take: Take,
    measure: Callable[[Recipe, Sequence[str], Take], str] | None = None,
    against: str = "",
    model: nn.Module | None = None,
) -> Recipe:
    """The recipe with ``compile`` decided.

    Args:
        recipe: complete but for it.
        measure: tries ways of a recipe, and tells the fastest; None: nothing can be tried.
        against, model: as for ``why_not``.

    Raises:
        RecipeError: for what was asked for and cannot be.
    """
    asked = recipe.compile
    if asked == "auto":
        return replace(recipe, compile=_auto(recipe, rows, device, take, measure, against, model))
    if asked == "best":
        return replace(recipe, compile=_best(recipe, rows, device, take, measure, against, model))
    if asked in WHOLE and not traces_autograd():
        return replace(recipe, compile=take("compile", "model", f"'{asked}' was asked for, but {OLDER}"))
    if reason := why_not(recipe, rows, device, asked, against, model):
        raise RecipeError(
            f"compile='{asked}' is not possible in this run.",
            f"The reason: {reason}.",
            "Leave compile out: what is possible is chosen, with its reason; or use "
            + ("compile='off'." if against or asked == "model" else "compile='model' or 'off'."),
        )
    return recipe


def _auto(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    device: Device,
    take: Take,
    measure: Callable[[Recipe, Sequence[str], Take], str] | None,
    against: str,
    model: nn.Module | None,
) -> str:
    if device.graph_kind == "cpu":
        # Whether this torch can is asked where a graph is worth it: to ask imports its compiler.
        able = [how for how in ("step", "blocks") if not why_not(recipe, rows, device, how, against, model)]
        if "blocks" in able and not _enough(model):
            able.remove("blocks")
        return measure(recipe, able, take) if able and measure is not None else "off"
    reasons = _reasons(recipe, rows, device, against, model)
    if device.graph_kind == "graph":
        if reasons["step"]:
            return str(take("compile", "off", f"not 'step': {reasons['step']}"))
        return str(take("compile", "step", f"{device.kind} runs whole graphs, compiled before they run"))
    if not reasons["blocks"] and not _enough(model):
        reasons["blocks"] = f"fewer than {ENOUGH} of its blocks are of one kind, and each kind is a graph"
    _pass_over(reasons, ("model", "blocks", "step"), take)
    able = ["off", *(how for how, reason in reasons.items() if not reason)]
    if measure is None or len(able) == 1:
        return str(take("compile", "off", "nothing is measured here" if len(able) > 1 else "nothing else is possible"))
    return measure(recipe, able, take)


def _enough(model: nn.Module | None) -> bool:
    return model is not None and most_of_a_kind(model) >= ENOUGH


def _reasons(
    recipe: Recipe, rows: Sequence[ParameterRow], device: Device, against: str, model: nn.Module | None
) -> dict[str, str]:
    """Why each way is not possible, or ""."""
    reasons = {how: why_not(recipe, rows, device, how, against, model) for how in ("model", "blocks", *WHOLE)}
    older = "" if traces_autograd() else OLDER
    return {how: reason or (older if how in WHOLE else "") for how, reason in reasons.items()}


def _pass_over(reasons: dict[str, str], ways: Sequence[str], take: Take) -> None:
    """Say of those ways that are not possible why."""
    for how in ways:
        if reasons[how]:
            take("compile", f"not '{how}'", reasons[how])


def _best(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    device: Device,
    take: Take,
    measure: Callable[[Recipe, Sequence[str], Take], str] | None,
    against: str,
    model: nn.Module | None,
) -> str:
    """What was asked for by ``true``: the first way that works, and what does not by name."""
    reasons = _reasons(recipe, rows, device, against, model)
    _pass_over(reasons, ("step", "model"), take)
    able = [how for how in ("step", "model", "blocks") if not reasons[how]]
    if not able:
        return str(take("compile", "off", "nothing else is possible"))
    return measure(recipe, able, take) if measure is not None else str(take("compile", able[0], "asked for"))


def settle_several(recipe: Recipe, stream: bool, take: Take) -> Recipe:
    """The recipe with ``steps_per_call`` as it will be, and by name what has no use for it.

    Args:
        stream: whether the data is one, whose place is known between two calls alone.
    """
    asked = recipe.steps_per_call
    why = "not used: steps are several a call in a graph of a whole step alone (compile='step')"
    if recipe.compile == "step":
        if not stream or asked == 1:
            return recipe
        why = "1 is used: the place of a stream is known between two windows that are both read alone"
    if asked not in ("auto", 1):
        take("steps_per_call", asked, why)
    return replace(recipe, steps_per_call=1)


def check_model(model: nn.Module, how: str) -> None:
    """Refuse a model that cannot be compiled.

    Raises:
        RecipeError: for one that is spread over ranks.
    """
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise RecipeError(
            f"compile='{how}' is not possible for parameters that are spread over ranks.",
            "They are gathered block by block while a pass runs.",
            "Use compile='off', or parallel='ddp'.",
        )
