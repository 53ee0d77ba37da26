"""thalweg trains PyTorch models: everything between the model and the result, right together.

``import thalweg`` does not import torch; what needs it is imported when it is named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thalweg.core import VERSION, Loss, Recipe, Split, StopReason, Task, ThalwegError

__version__ = VERSION

if TYPE_CHECKING:
    from thalweg import memory, optim, regularize, schedules
    from thalweg.branch import continue_run
    from thalweg.data import TokenWindows
    from thalweg.engine import TrainStep
    from thalweg.run import Result, train, train_task

_LAZY = {
    "TokenWindows": "thalweg.data",
    "TrainStep": "thalweg.engine",
    "Result": "thalweg.run",
    "continue_run": "thalweg.branch",
    "train": "thalweg.run",
    "train_task": "thalweg.run",
}
_ROOMS = ("memory", "optim", "parallel", "regularize", "schedules", "watch", "data", "checkpoint", "rules")

__all__ = [
    "Loss",
    "Recipe",
    "Result",
    "Split",
    "StopReason",
    "Task",
    "ThalwegError",
    "TokenWindows",
    "TrainStep",
    "__version__",
    "continue_run",
    "memory",
    "optim",
    "regularize",
    "schedules",
    "train",
    "train_task",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"thalweg.{name}")
    raise AttributeError(f"module 'thalweg' has no attribute '{name}'")
