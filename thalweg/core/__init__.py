"""The words: Recipe, Plan, Record, errors, seeds, the protocols where rooms meet. Imports neither torch nor numpy."""

from thalweg.core.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    LossError,
    MissingExtra,
    ModelError,
    OutOfMemoryError,
    RanksError,
    RecipeError,
    RunFolderError,
    TaskError,
    ThalwegError,
    did_you_mean,
)
from thalweg.core.groups import ParameterGroup, parameter_groups
from thalweg.core.guard import Guard
from thalweg.core.ledger import Change, Forecast, Form, Ledger, ModuleBytes
from thalweg.core.parallel import Layout
from thalweg.core.plan import Decision, ParameterRow, Plan
from thalweg.core.protocols import Feed, FeedState, Gather, LastingDraw, Loss, Sink, Split, Task, Tell
from thalweg.core.recipe import Recipe, divisors
from thalweg.core.record import Evaluation, Event, Record, StopReason, read_lines
from thalweg.core.registry import Registry
from thalweg.core.streams import seed_for
from thalweg.core.units import human_bytes, human_count, human_seconds, to_bytes
from thalweg.core.use import flops_use, told_use, training_times
from thalweg.core.version import VERSION

__all__ = [
    "Change",
    "CheckpointError",
    "DataError",
    "Decision",
    "DeviceError",
    "Evaluation",
    "Event",
    "Feed",
    "FeedState",
    "Forecast",
    "Form",
    "Gather",
    "Guard",
    "Layout",
    "Ledger",
    "LastingDraw",
    "Loss",
    "LossError",
    "MissingExtra",
    "ModelError",
    "ModuleBytes",
    "OutOfMemoryError",
    "ParameterRow",
    "Plan",
    "RanksError",
    "Recipe",
    "RecipeError",
    "Record",
    "Registry",
    "RunFolderError",
    "Sink",
    "Split",
    "StopReason",
    "Task",
    "Tell",
    "TaskError",
    "ThalwegError",
    "VERSION",
    "ParameterGroup",
    "did_you_mean",
    "divisors",
    "flops_use",
    "human_bytes",
    "human_count",
    "human_seconds",
    "read_lines",
    "seed_for",
    "parameter_groups",
    "to_bytes",
    "told_use",
    "training_times",
]
