"""What training takes in memory and time, before it begins: ``thalweg plan`` as functions.

>>> import thalweg
>>> from thalweg.recipes import find_task, recipe_for
>>> ledger = thalweg.memory.estimate(find_task("digits"), on="h100-80gb")
>>> ledger.peak == sum(size for _, size in ledger.rows())
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.core import Change, Forecast, Form, Ledger, ModuleBytes, Recipe, Task, to_bytes
from thalweg.device.chips import CHIPS, Chip

__all__ = ["CHIPS", "Change", "Chip", "Forecast", "Form", "Ledger", "ModuleBytes", "estimate", "forecast"]


def forecast(
    task: Task,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    on: str | None = None,
    devices: int = 1,
    sharded: bool = False,
    device_memory: str | int | None = None,
) -> Forecast:
    """What a run will take, in bytes and seconds, and what would make it smaller.

    Args:
        task: model, loss and data; ``Task(model=..., loss=..., data=...)`` makes one.
        recipe: a ``Recipe``, or what differs from the task's own, by dotted path.
        on: a chip that need not be here, of ``CHIPS``: the model is not allocated. None: this machine, where steps are
            timed on copies.
        devices: how many such chips, or how many ranks here.
        sharded: whether parameters, gradients and slots are spread over them, whatever the recipe's ``parallel``.
        device_memory: bytes to plan with, such as "16GiB"; None: what is there.

    Raises:
        ThalwegError: for what training would refuse, and for a chip that is not known.
    """
    return _planned(task, recipe, on, devices, sharded, device_memory, timed=True)


def _planned(
    task: Task,
    recipe: Recipe | Mapping[str, Any] | None,
    on: str | None,
    devices: int,
    sharded: bool,
    device_memory: str | int | None,
    *,
    timed: bool,
) -> Forecast:
    from thalweg.engine.memory.here import plan_here
    from thalweg.engine.memory.planner import plan_there

    own = Recipe().override(task.recipe)
    given = recipe if isinstance(recipe, Recipe) else own.override(recipe or {})
    most = None if device_memory is None else to_bytes(device_memory, "device_memory")
    if on is None:
        if sharded:
            given = given.override({"parallel": "fsdp"})
        return plan_here(task, given, most=most, timed=timed, ranks=devices)
    return plan_there(task, given, on, devices=devices, sharded=sharded, most=most, timed=timed)


def estimate(
    task: Task,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    on: str | None = None,
    devices: int = 1,
    sharded: bool = False,
) -> Ledger:
    """The bytes of ``forecast`` alone: the ledger that ``thalweg plan`` prints.

    Raises:
        ThalwegError: as for ``forecast``.
    """
    return _planned(task, recipe, on, devices, sharded, None, timed=False).ledger
