"""The one engine that runs rules: the parameter table, the flat layout, the lowering, and torch's optimizer face."""

from typing import TYPE_CHECKING, Any

from thalweg.optim.arena import Arena, make_arenas
from thalweg.optim.lower import Update, eager, lower
from thalweg.optim.table import named_trainable, parameter_table, plain_name

if TYPE_CHECKING:
    from thalweg.optim.face import SGD, Adam, AdamW, RuleOptimizer, scheduler

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Arena",
    "RuleOptimizer",
    "Update",
    "eager",
    "lower",
    "make_arenas",
    "named_trainable",
    "parameter_table",
    "plain_name",
    "scheduler",
]


def __getattr__(name: str) -> Any:
    """torch.optim costs a second at start-up, and training here does not need it: the face is imported when named."""
    if name in ("SGD", "Adam", "AdamW", "RuleOptimizer", "scheduler"):
        from thalweg.optim import face

        return getattr(face, name)
    raise AttributeError(f"module 'thalweg.optim' has no attribute '{name}'")
