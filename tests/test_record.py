"""A record's line: what a fast way writes is what JSON's own writes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from thalweg.core import Record

_NUMBER = st.floats() | st.floats(width=32) | st.integers(-(2**40), 2**40).map(float)


@given(
    st.builds(
        Record,
        step=st.integers(1, 2**40),
        epoch=st.integers(0, 2**20),
        loss=_NUMBER,
        weight=_NUMBER,
        grad_norm=_NUMBER,
        lr=_NUMBER,
        applied=st.integers(0, 2**40),
        skipped=st.booleans(),
        scale=_NUMBER,
        seconds=st.floats(0, 1e9),
        values=st.just({}) | st.dictionaries(st.text(max_size=3), _NUMBER, max_size=2),
        waited=st.just(0.0) | st.floats(0, 1e9),
    )
)
@example(Record(1, 0, 1.0, 64, 0.5, 1e-3, 1, False, 1.0, 0.1))  # a whole number where most have a float
@example(Record(1, 0, np.float64(1.5), 64.0, 0.5, 1e-3, 1, False, 1.0, 0.1))
@example(Record(1, 0, math.nan, 64.0, math.inf, 1e-3, 0, True, 1.0, 0.1))
def test_a_line_is_what_json_makes_of_the_record(record: Any) -> None:
    assert record.to_json() == json.dumps(record.to_dict())
