"""Weights that a new run begins with, from a file of any kind that ``thalweg.checkpoint.convert`` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.checkpoint.convert import Weights, listed, read_weights, renamed, suggestion
from thalweg.checkpoint.files import digest
from thalweg.checkpoint.tensors import raw
from thalweg.core import ModelError, Plan, Recipe, RecipeError
from thalweg.optim import plain_name


def take_weights(model: nn.Module, recipe: Recipe, take: Callable[[str, Any, str], Any], saved: Plan | None) -> None:
    """Put the weights that a recipe names into the model, and say which they were.

    Args:
        take: notes a decision: path, value, reason.
        saved: the plan of a run that begins again: the file must be the one that it tells of.

    Raises:
        ThalwegError: if they cannot be read, or are not those of this model; the model is as it was then.
    """
    if recipe.weights is None:
        return
    weights = renamed(read_weights(recipe.weights), recipe.weights_rename)
    pairs = _matched(model, weights, recipe.weights)
    sha = sha256_of(weights)
    if saved is not None and not any(d.path == "weights" and sha in d.reason for d in saved.decisions):
        raise RecipeError(
            f"{recipe.weights} is not what this run began with.",
            f"Its sha256 is {sha} now; plan.json has the one of then.",
            "Put the old file back, or start a new run with --name.",
        )
    cast: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for mine, theirs in pairs.values():
        if mine.dtype != theirs.dtype:
            cast[theirs.dtype, mine.dtype] = cast.get((theirs.dtype, mine.dtype), 0) + 1
    with torch.no_grad():
        for mine, theirs in pairs.values():
            mine.copy_(theirs.to(mine.dtype))
    told = [f"{weights.kind}, sha256 {sha}; {len(pairs)} tensors taken"]
    told += [f"{count} cast from {_word(a)} to {_word(b)}" for (a, b), count in cast.items()]
    told += [text.rstrip(".") for text in weights.told]
    take("weights", recipe.weights, "; ".join(told))


def sha256_of(weights: Weights) -> str:
    """Of the file; of several, of their names and digests in order."""
    if not weights.files:  # from a store elsewhere: their own bytes
        whole = hashlib.sha256()
        for name in sorted(weights.tensors):
            whole.update(name.encode() + b"\0")
            whole.update(raw(weights.tensors[name].contiguous()))
        return whole.hexdigest()
    if len(weights.files) == 1:
        return digest(weights.files[0])
    lines = "".join(f"{digest(file)}  {file.name}\n" for file in weights.files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _matched(model: nn.Module, weights: Weights, source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(model's, file's) tensors by name; every tensor of the model once, whichever of its names the file has."""
    theirs = weights.named()
    mine = {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    found = {id(tensor) for name, tensor in mine.items() if name in theirs}
    missing = [name for name, tensor in mine.items() if name not in theirs and id(tensor) not in found]
    unexpected = [name for name in theirs if name not in mine]
    others = [
        f"{name} {_form(theirs[name])} there, {_form(tensor)} here"
        for name, tensor in mine.items()
        if name in theirs and _form(theirs[name]) != _form(tensor)
    ]
    if missing or unexpected or others:
        numbers = f"Missing: {listed(missing)}. Not known: {listed(unexpected)}."
        hint = suggestion(missing, unexpected)
        raise ModelError(
            f"The weights in {source} are not those of this model.",
            numbers + (f" Of another shape: {listed(others)}." if others else ""),
            f"The names fit with {hint}, in a recipe weights_rename = ['{hint.removeprefix('--rename ')}']."
            if hint
            else "Name the weights of this model, or make the names fit by --rename OLD=NEW (NAME= leaves one out).",
        )
    once = {id(tensor): name for name, tensor in mine.items() if name in theirs}
    _check_tied(mine, theirs, once, source)
    return {name: (mine[name].detach(), theirs[name]) for name in once.values()}


def _check_tied(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], once: Mapping[int, str], source: str) -> None:
    """A tensor that has two names in the model must be the same under both in the file."""
    for name, tensor in mine.items():
        first = once[id(tensor)]
        if name in theirs and not torch.equal(_bytes(theirs[name]), _bytes(theirs[first])):
            raise ModelError(
                f"The weights in {source} are not those of this model.",
                f"{first} and {name} are one tensor in the model, and differ in the file.",
                f"Leave one out: --rename {name}=.",
            )


def _bytes(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    )


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}{' complex' if tensor.is_complex() else ''}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
