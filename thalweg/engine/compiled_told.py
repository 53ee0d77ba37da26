"""What could not be compiled is told when the run begins, and not in its plan alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from thalweg.core import Decision
from thalweg.engine.compiled_measure import FAILED


def fallbacks(decisions: Sequence[Decision], asked: str, now: str) -> Iterator[str]:
    """A line for each way of compiling that was tried and failed; where a graph was asked for ("best"), for each passed over.

    Args:
        asked: the recipe's ``compile``; ``now``: what it has become.
    """
    by = "by plain operators" if now == "off" else f"with compile='{now}'"
    for made in decisions:
        if made.path != "compile":
            continue
        _, failed, why = made.reason.partition(FAILED)
        passed = str(made.value).startswith("not ")
        if failed or (passed and asked == "best"):
            how = str(made.value).removeprefix("not ") if passed else "'step'"
            yield f"compile={how} is not possible here, and the run goes on {by}: {why or made.reason}"
