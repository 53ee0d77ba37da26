"""What a task gives, with the recipe's arguments: its model, its loss, its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from thalweg.core import ModelError, Recipe, RecipeError, Split, Task, did_you_mean, seed_for
from thalweg.data.folder import VARIABLE, reading_from
from thalweg.engine.regularizers import TaskLoss


def split_of(task: Task, recipe: Recipe, take: Callable[[str, Any, str], Any]) -> tuple[Split, Recipe]:
    """The task's data, and the recipe with the folder that held its files; ``take`` is ``Decisions.take``."""
    named = recipe.data.folder
    with reading_from(named) as folder:
        split = _split(task, recipe)
    if folder.found is not None and str(folder.found) != named:
        why = "whole path" if folder.places[0] == (folder.found, "data.folder") else f"the environment's {VARIABLE}"
        recipe = replace(recipe, data=replace(recipe.data, folder=take("data.folder", str(folder.found), why)))
    if named is not None and not folder.asked:
        take("data.folder", named, "not used: the task reads no file of a data folder")
    return split, recipe


def _split(task: Task, recipe: Recipe) -> Split:
    data = task.data
    is_function = callable(data) and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__")
    if is_function:
        data = _with_options(data, recipe.data.options, "data.options", skip=0)()
    elif recipe.data.options:
        _no_options("data.options", recipe.data.options, "the data is an object, not a function")
    return data if isinstance(data, Split) else Split(train=data)


def made_model(task: Task, recipe: Recipe) -> nn.Module:
    model = task.model
    if isinstance(model, nn.Module):
        if recipe.model:
            _no_options("model", recipe.model, "the model is a module, not a function that makes one")
    else:
        torch.manual_seed(seed_for(recipe.seed, "init"))
        model = _with_options(model, recipe.model, "model", skip=0)()
    if not isinstance(model, nn.Module):
        raise ModelError(
            "The task's model is no nn.Module.", f"Got {type(model).__name__}.", "Return an nn.Module from it."
        )
    return model


def _no_options(table: str, given: Mapping[str, Any], why: str) -> None:
    raise RecipeError(f"[{table}] has no use here: {why}.", f"Given: {', '.join(given)}.", "Remove the table.")


def task_loss(function: Callable[..., Any], recipe: Recipe) -> TaskLoss:
    """The loss function with the recipe's arguments and penalties; their names are checked."""
    _check_arguments(function, recipe.loss, "loss", skip=2)
    return TaskLoss(function, recipe.loss, recipe.regularize.penalties)


def _with_options(function: Callable[..., Any], given: Mapping[str, Any], table: str, *, skip: int) -> Any:
    """``function`` with recipe options bound; their names are checked against its signature."""
    _check_arguments(function, given, table, skip=skip)
    if not given:
        return function
    options = dict(given)
    return lambda *args: function(*args, **options)


def _check_arguments(function: Callable[..., Any], given: Mapping[str, Any], table: str, *, skip: int) -> None:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
        for key in given:
            if key not in known:
                name = getattr(function, "__name__", str(function))
                raise RecipeError(
                    f"{table}.{key} is no argument of {name}().", f"It takes {len(known)}.", did_you_mean(key, known)
                )
