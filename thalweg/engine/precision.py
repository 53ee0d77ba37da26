"""Precision before step 0: what it is where a recipe says "auto", what it does to the model, and what cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from thalweg.core import ModelError, Recipe, RecipeError, ThalwegError
from thalweg.device import Device, matmul_rates
from thalweg.engine.losses import check_float32, sum_and_weight
from thalweg.engine.preflight import ModelLoss, as_written, gain_of, untouched
from thalweg.optim import named_trainable
from thalweg.precision import POLICIES, Policy, Prepared, policy_for
from thalweg.precision.functions import FUNCTIONS, InFloat32

Take = Callable[[str, Any, str], Any]  # (path, value, reason) -> value

GAIN = 1.1  # another precision than fp32 is taken where it is at least this much faster
ISLANDS = ("logits",)  # of every policy in half precision
_NAMES = {"tf32": "tf32", "bf16": "bfloat16"}


def check_dtypes(recipe: Recipe, model: nn.Module) -> None:
    """Refuse trained parameters of a dtype that the precision does not train.

    Raises:
        ModelError: for float16 without Kahan parameters, and for half-precision parameters under a precision that says otherwise.
    """
    name, rounding = recipe.precision, recipe.optimizer.rounding
    named = named_trainable(model)
    for dtype in (torch.float16, torch.bfloat16):
        mine = [n for n, p in named if p.dtype == dtype]
        if not mine:
            continue
        short = str(dtype).removeprefix("torch.")
        numbers = f"{len(mine)} of {len(named)} are {short}, such as '{mine[0]}'"
        if dtype == torch.float16 and not (name == "fp16" and rounding == "kahan"):
            raise ModelError(
                "The model's trained parameters are float16, without masters in float32.",
                f"{numbers}; an update under 1/2048 of a weight would be lost, and precision='{name}' keeps no masters.",
                "Call model.float() and give precision='fp16'; or, to train them as they are, precision='fp16' with "
                "optimizer.rounding='kahan'.",
            )
        if dtype == torch.bfloat16 and name not in ("auto", "bf16", "bf16-pure"):
            raise ModelError(
                f"precision='{name}' does not fit trained parameters in bfloat16.",
                f"{numbers}.",
                "Give precision='bf16-pure', or call model.float() first.",
            )


def begin_precision(recipe: Recipe, model: nn.Module, device: Device, take: Take) -> tuple[Recipe, Prepared | None]:
    """What the model's own dtype decides, before its first pass: one stored in half precision cannot run otherwise.

    Returns:
        The recipe, its precision perhaps settled, and the model prepared, where that was needed.
    """
    check_dtypes(recipe, model)
    if recipe.precision == "auto":
        dtypes = {p.dtype for _, p in named_trainable(model)}
        told = f"the parameters are {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
        if dtypes == {torch.bfloat16}:
            recipe = replace(recipe, precision=take("precision", "bf16-pure", f"{told} already"))
        elif torch.bfloat16 in dtypes:
            recipe = replace(
                recipe, precision=take("precision", "bf16", f"{told}, left as they are; autocast joins them")
            )
        elif dtypes != {torch.float32}:
            recipe = replace(recipe, precision=take("precision", "fp32", f"{told}, left as they are"))
    if recipe.precision == "auto":
        return recipe, None
    policy = policy_for(recipe.precision, device)
    if not any(p.dtype in (torch.bfloat16, torch.float16) for _, p in named_trainable(model)):
        return recipe, None
    if policy.stored is None:  # autocast joins the dtypes in the passes that come; the checks have none
        return recipe, None
    return recipe, Prepared(model, policy, device, ISLANDS if recipe.islands is None else recipe.islands)


def joined(recipe: Recipe, model: nn.Module, device: Device) -> contextlib.AbstractContextManager[object]:
    """Around passes before the precision is settled: a model that mixes half precision and float32 needs autocast to run at all."""
    dtypes = {p.dtype for _, p in named_trainable(model)}
    if recipe.precision == "auto" or len(dtypes) < 2 or not dtypes & {torch.bfloat16, torch.float16}:
        return contextlib.nullcontext()
    return policy_for(recipe.precision, device).forward(device)


def settle_precision(
    recipe: Recipe,
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    take: Take,
    early: Prepared | None = None,
) -> tuple[Recipe, Policy, Prepared]:
    """Fill precision and islands, prepare the model for them, and try one forward and backward pass as a step will do it.

    Args:
        batch: the first micro-batch.
        early: what ``begin_precision`` prepared.

    Raises:
        ThalwegError: for a device, islands, a model or a loss that the precision is not possible with; the model is as before.

    Returns:
        The recipe, the policy, and what was done to the model: ``keep`` it when nothing can be refused any more.
    """
    if early is not None:
        early.keep()
        early.undo()
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=_measured(model, loss, batch, device, recipe.seed, take))
    narrow = POLICIES[recipe.precision].autocast or POLICIES[recipe.precision].stored
    if recipe.islands is None:
        own: tuple[str, ...] = ISLANDS if narrow else ()
        why = "the loss needs them; torch's norms and softmax add up in float32 inside" if narrow else "all is float32"
        recipe = replace(recipe, islands=take("islands", own, why))
    elif not narrow and recipe.islands:
        take("islands", recipe.islands, f"not used: precision='{recipe.precision}' computes all in float32")
    islands = recipe.islands or ()
    policy = policy_for(recipe.precision, device, islands)
    prepared = Prepared(model, policy, device, islands)
    if narrow is not None:
        try:
            _try(model, loss, batch, device, policy, islands, recipe)
        except BaseException:
            prepared.undo()
            raise
    for what, num in prepared.told:
        take("precision", recipe.precision, f"{num} {what}")
    if policy.stored is not None and recipe.optimizer.rounding == "auto":
        take(
            "optimizer.rounding", "stochastic", "updates smaller than half a unit of a bfloat16 weight count on average"
        )
    return recipe, policy, prepared


def gradient_dtype(recipe: Recipe) -> torch.dtype | None:
    """What the gradients of parameters in half precision are added up in: float32 where a step has several micro-batches.

    None: in the parameters' own dtype, as one micro-batch's gradient has no more bits than that.
    """
    micro = recipe.train.micro_batch
    several = isinstance(micro, int) and micro < recipe.train.batch
    return torch.float32 if recipe.precision == "bf16-pure" and several else None


def tell_gradients(recipe: Recipe, take: Take) -> None:
    """Say what gradients are added up in, where that is not the parameters' own dtype."""
    if gradient_dtype(recipe) is not None and recipe.optimizer.release_gradients in (None, "off"):
        take("gradients", "float32", "bfloat16 sums of several micro-batches lose bits; one alone needs none of that")


def _measured(model: nn.Module, loss: ModelLoss, batch: Any, device: Device, seed: int, take: Take) -> str:
    """The precision that "auto" is: the fastest, if it is worth it. On the host ``settle_levers`` has settled it before."""
    candidates = [name for name in ("tf32", "bf16") if name in device.precisions]
    if not candidates:
        return str(take("precision", "fp32", f"{device.torch_device} has {', '.join(device.precisions)}"))
    rates = matmul_rates(device, names=("float32", *(_NAMES[name] for name in candidates)))
    gains, told = {"fp32": 1.0}, []
    for name in candidates:
        gains[name], pairs = gain_of(name, model, loss, batch, device, seed, GAIN)
        product = rates.get(_NAMES[name], 0.0) / rates["float32"]
        told.append(
            f"{name} multiplies matrices at {product:.2f} times the speed of fp32, and runs this model's forward and "
            f"backward pass at {gains[name]:.2f} times ({pairs} pairs)"
        )
    best = max(gains, key=lambda name: gains[name])
    chosen = best if gains[best] >= GAIN else "fp32"
    return str(take("precision", chosen, f"measured here: {'; '.join(told)}; taken from {GAIN:g} on"))


def _try(
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    policy: Policy,
    islands: tuple[str, ...],
    recipe: Recipe,
) -> None:
    watch = InFloat32(policy.islands, device.kind, back=policy.stored is not None)
    plain = replace(policy, islands=frozenset())
    params = [p for _, p in named_trainable(model)]
    with untouched(model, device, recipe.seed), as_written(), plain.around(device):
        try:
            with plain.forward(device), watch:
                total, _ = sum_and_weight(loss(model, batch), batch)
            check_float32(total, f"precision='{policy.name}'")
            with watch:
                torch.autograd.backward(total, torch.ones_like(total))
        except (ThalwegError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError) as err:
            raise ModelError(
                f"The model does not run with precision='{policy.name}', and does in float32.",
                f"{str(err).splitlines()[0]}",
                "Name modules that need float32 in islands, cast where the model mixes dtypes (x.to(weight.dtype)), or use "
                "precision='bf16' or 'fp32'.",
            ) from err
        finally:
            for p in params:
                p.grad = None
    _check_met(model, islands, watch)


def _check_met(model: nn.Module, islands: tuple[str, ...], watch: InFloat32) -> None:
    from thalweg.precision import island_modules

    for word in FUNCTIONS.keys() & set(islands):
        if word not in watch.met and not island_modules(model, [word]):
            raise RecipeError(
                f"islands='{word}' matches nothing in this model.",
                "Its forward pass has no such module, and calls no such function of torch.",
                "Leave it out, or name modules by pattern.",
            )
