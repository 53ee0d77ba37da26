"""What the recipe's ``compile`` becomes: refused where it cannot be, passed over with the reason, or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from thalweg.core import ParameterRow, Recipe, RecipeError
from thalweg.device import Device
from thalweg.engine.compiled_backend import compile_backend, traces_autograd
from thalweg.rules import RULES

Take = Callable[[str, Any, str], Any]

WHOLE = ("step", "captured")  # values of ``compile`` that make one graph of a step


def why_not(recipe: Recipe, rows: Sequence[ParameterRow], device: Device, how: str, against: str = "") -> str:
    """Why a complete recipe cannot be compiled so on a device; "" where it can.

    Args:
        rows: the parameter table.
        how: "model", "step" or "captured".
        against: what is against graphs of this model there, if anything is.
    """
    if how == "off":
        return ""
    if against:
        return against
    if not compile_backend(device):
        return f"torch.compile has no backend for {device.kind}"
    if how == "model":
        return ""
    if how == "captured" and not captures(device):
        return f"launches cannot be recorded on {device.kind}"
    optimizer = recipe.optimizer
    if optimizer.release_gradients not in (None, "off"):
        return "optimizer.release_gradients updates inside the backward pass, which a graph has no place for"
    if optimizer.offload:
        return "optimizer.offload moves slots between memories while the update runs"
    if recipe.recompute not in (None, "none"):
        return f"recompute='{recipe.recompute}' runs blocks again, and in one graph the compiler decides what is kept"
    if recipe.regularize.sharpness:
        return "regularize.sharpness goes through the window twice"
    noisy = sorted({row.rule for row in rows if "noise" in RULES[row.rule].needs})
    if noisy:
        return f"{noisy[0]} draws noise from a generator of its own at every step"
    return ""


def captures(device: Device) -> bool:
    """Whether the device can record what is launched, and play it again."""
    return device.kind == "cuda"


def settle_compile(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    device: Device,
    take: Take,
    measure: Callable[[Recipe, Sequence[str], Take], str] | None = None,
    against: str = "",
) -> Recipe:
    """The recipe with ``compile`` decided.

    Args:
        recipe: complete but for it.
        measure: tries ways of a recipe, and tells the fastest; None: nothing can be tried.
        against: as for ``why_not``.

    Raises:
        RecipeError: for what was asked for and cannot be.
    """
    asked = recipe.compile
    if asked == "auto":
        return replace(recipe, compile=_auto(recipe, rows, device, take, measure, against))
    if asked in WHOLE and not traces_autograd():
        older = "this torch cannot trace a backward pass into the graph of its forward pass; torch 2.13 can"
        return replace(recipe, compile=take("compile", "model", f"'{asked}' was asked for: {older}"))
    if reason := why_not(recipe, rows, device, asked, against):
        raise RecipeError(
            f"compile='{asked}' is not possible in this run.",
            f"{reason[0].upper()}{reason[1:]}.",
            "Leave compile out: what is possible is chosen, with its reason; or use compile='model' or 'off'.",
        )
    return recipe


def _auto(
    recipe: Recipe,
    rows: Sequence[ParameterRow],
    device: Device,
    take: Take,
    measure: Callable[[Recipe, Sequence[str], Take], str] | None,
    against: str,
) -> str:
    if device.kind == "cpu":
        return "off"
    able = ["off"]
    for how in ("model", "step", "captured"):
        reason = why_not(recipe, rows, device, how, against)
        if how in WHOLE and not reason and not traces_autograd():
            reason = "this torch cannot trace a backward pass into the graph of its forward pass; torch 2.13 can"
        if reason:
            if how != "captured":
                take("compile", f"not '{how}'", reason)
        else:
            able.append(how)
    if device.graph_kind == "graph" and "step" in able:
        return str(take("compile", "step", f"{device.kind} compiles whatever it runs, and one graph a step is the least"))
    if measure is None or len(able) == 1:
        return "off"
    return measure(recipe, able, take)


def check_model(model: nn.Module, how: str) -> None:
    """Refuse a model that a whole step cannot be made of.

    Raises:
        RecipeError: for one that is spread over ranks.
    """
    if how in WHOLE and any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise RecipeError(
            f"compile='{how}' is not possible for parameters that are spread over ranks.",
            "They are gathered block by block while a pass runs.",
            "Use compile='model' or 'off', or parallel='ddp'.",
        )
