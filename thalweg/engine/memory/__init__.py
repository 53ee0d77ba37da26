"""Memory: what training takes, predicted before step 0, and what is chosen so that it fits."""

from thalweg.engine.memory.bench import Bench, predicted
from thalweg.engine.memory.budget import fit
from thalweg.engine.memory.measured import STEPS, PeakWatch
from thalweg.engine.memory.predict import begun, predict
from thalweg.engine.memory.settle import settle_memory
from thalweg.engine.memory.trace import CannotFake, Line, Trace, trace_line

__all__ = [
    "STEPS",
    "Bench",
    "CannotFake",
    "Line",
    "PeakWatch",
    "Trace",
    "begun",
    "fit",
    "predict",
    "predicted",
    "settle_memory",
    "trace_line",
]
