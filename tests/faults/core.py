"""A fault, how often it is made, and what came of it."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TOLD = 5  # failures whose text is kept


class Skip(Exception):
    """This fault cannot be made here; the text says why."""


@dataclass
class Row:
    """What came of a fault.

    Attributes:
        n: how often it was made; passed: how often all that is promised held.
        failures: what did not hold, for the first few.
        skipped: why it could not be made at all.
        notes: further counts, as by phase.
    """

    family: str
    fault: str
    n: int = 0
    passed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def trial(self, label: str, count: int = 1) -> Iterator[None]:
        """One try, or ``count`` that stand or fall together."""
        self.n += count
        try:
            yield
        except Skip:
            raise
        except Exception as err:  # whatever goes wrong counts against us, and the next try is made
            if len(self.failures) < _TOLD:
                self.failures.append(f"{label}: {type(err).__name__}: {err}"[:3000])
        else:
            self.passed += count

    def count(self, what: str, by: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + by

    @property
    def good(self) -> bool:
        return self.passed == self.n and (self.n > 0 or bool(self.skipped))


@dataclass(frozen=True)
class Given:
    """What a fault is made with.

    Attributes:
        times: how often.
        folder: an empty one.
        draw: where instants and places come from.
        ranks: processes of a run.
        quick: whether this is the short form.
    """

    times: int
    folder: Path
    draw: random.Random
    ranks: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Fault:
    """One row of the table: the function that makes the fault, and how often in the long and in the short form."""

    family: str
    name: str
    make: Callable[[Row, Given], None]
    times: int
    quick: int

    def run(self, *, times: int | None = None, quick: bool = False, ranks: int = 1, seed: int = 0) -> Row:
        row = Row(self.family, self.name)
        number = times or (self.quick if quick else self.times)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
            draw = random.Random(f"{self.family} {self.name} {seed}")
            try:
                self.make(row, Given(number, Path(folder), draw, ranks, quick))
            except Skip as reason:
                row.skipped = str(reason)
        row.seconds = round(time.perf_counter() - began, 1)
        return row


FAULTS: list[Fault] = []


def fault(
    name: str, *, times: int, quick: int
) -> Callable[[Callable[[Row, Given], None]], Callable[[Row, Given], None]]:
    """Add a function to the table; its family is the module's name."""

    def added(make: Callable[[Row, Given], None]) -> Callable[[Row, Given], None]:
        FAULTS.append(Fault(make.__module__.rpartition(".")[2], name, make, times, quick))
        return make

    return added


def needs_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Skip(f"{what} needs root")
