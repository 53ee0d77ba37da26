"""The one engine that runs rules: the parameter table, programs, the ways of running them, and torch's optimizer face."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thalweg.core.recipe import WAYS
from thalweg.optim.arena import Arena, make_arenas
from thalweg.optim.lower import Update, lower
from thalweg.optim.program import Program
from thalweg.optim.table import named_trainable, parameter_table, plain_name
from thalweg.schedules import FOREIGN

if TYPE_CHECKING:
    from thalweg.optim.convert import from_torch, to_torch
    from thalweg.optim.face import face_of, scheduler
    from thalweg.optim.lr_schedulers import Scheduler
    from thalweg.optim.optimizer import RuleOptimizer

__all__ = [
    "WAYS",
    "Arena",
    "Program",
    "RuleOptimizer",
    "Scheduler",
    "Update",
    "face_of",
    "from_torch",
    "lower",
    "make_arenas",
    "named_trainable",
    "parameter_table",
    "plain_name",
    "scheduler",
    "to_torch",
]


def _by_torch(name: str, options: Mapping[str, Any], steps: int) -> list[float]:
    from thalweg.optim.lr_schedulers import by_torch

    return by_torch(name, options, steps)


FOREIGN["torch"] = _by_torch


def __getattr__(name: str) -> Any:
    """torch.optim costs a second at start-up, and training here does not need it: the face is imported when named."""
    if name in ("from_torch", "to_torch"):
        return getattr(importlib.import_module("thalweg.optim.convert"), name)
    if not name.startswith("_") and name != "face":
        face = importlib.import_module("thalweg.optim.face")
        if hasattr(face, name):
            return getattr(face, name)
    raise AttributeError(f"module 'thalweg.optim' has no attribute '{name}'")
