"""The engine: resolve, preflight, build, step, loop, evaluate."""

from thalweg.engine.build import average_times, build, run_span
from thalweg.engine.evaluate import evaluate, evaluated_weights
from thalweg.engine.loop import Loop
from thalweg.engine.preflight import preflight
from thalweg.engine.resolve import Resolved, resolve
from thalweg.engine.state import State
from thalweg.engine.step import Step, StepOptions
from thalweg.engine.trainstep import TrainStep

__all__ = [
    "Loop",
    "Resolved",
    "State",
    "Step",
    "StepOptions",
    "TrainStep",
    "average_times",
    "build",
    "evaluate",
    "evaluated_weights",
    "preflight",
    "resolve",
    "run_span",
]
