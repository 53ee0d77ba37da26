"""A number for a step: shapes, put in a row with ``>>``. Imports neither torch nor numpy."""

from thalweg.schedules.language import (
    Schedule,
    constant,
    cosine,
    hold,
    inverse_sqrt,
    linear,
    parse,
    piece,
    polynomial,
    warmup,
)
from thalweg.schedules.shapes import SHAPES, Place, Shape, shape

__all__ = [
    "SHAPES",
    "Place",
    "Schedule",
    "Shape",
    "constant",
    "cosine",
    "hold",
    "inverse_sqrt",
    "linear",
    "parse",
    "piece",
    "polynomial",
    "shape",
    "warmup",
]
