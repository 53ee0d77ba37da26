"""Where a run's time goes is written beside its records: they are cut back when it goes on, and this is not."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from thalweg.core.goodput import Goodput, goodput, times_of

TIMES = "times.jsonl"
_TAIL = 1 << 16  # bytes of the records that are looked through for the last step


class Clock:
    """Writes the lines of ``goodput``. What cannot be written is left out: it is no part of the run.

    Args:
        folder: of the run; None: nothing is written.
        called: when the run was asked for.
        again: whether a launcher did so, after an earlier group.
    """

    def __init__(self, folder: Path | None, called: float, *, again: bool = False) -> None:
        self.on, self.called, self.again = folder is not None, called, again
        self.file, self._records = (folder or Path()) / TIMES, (folder or Path()) / "records.jsonl"
        self._before: dict[str, Any] = {"made": [0, 0.0], "kept": [0, 0.0]}

    def look(self, keep_bytes: int, *, new: bool) -> None:
        """Before the records are cut to ``keep_bytes``: how far they had come. ``new``: what is there is not of this run."""
        if not self.on:
            return
        if new:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)
        if not self._records.is_file():  # to open a pipe would wait for its other end
            return
        size = self._records.stat().st_size
        self._before = {"made": _last_step(self._records, size), "kept": _last_step(self._records, keep_bytes)}

    def start(self, step: int, ranks: int) -> None:
        known = {"called": self.called, "begun": time.time(), "again": self.again}
        self._write(kind="start", step=step, ranks=ranks, **known, **self._before)

    def saved(self, step: int, spent: dict[str, float]) -> None:
        self._write(kind="saved", time=time.time(), step=step, spent=_rounded(spent))

    def end(self, step: int, spent: dict[str, float]) -> None:
        self._write(kind="end", time=time.time(), step=step, spent=_rounded(spent))

    def told(self) -> Goodput | None:
        """All in all; None where the lines cannot be read."""
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            return goodput(times_of(self.file)) if self.on else None
        return None

    def _write(self, **line: Any) -> None:
        if not self.on:
            return
        with suppress(OSError):
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
            try:
                os.write(handle, json.dumps(line).encode() + b"\n")
            finally:
                os.close(handle)


def _rounded(spent: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 4) for name, number in spent.items()}


def _last_step(file: Path, until: int) -> list[float]:
    """(step, seconds) of the last step in the first bytes of a record file; zeros where there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open(file, "rb") as records:
            records.seek(max(0, until - _TAIL))
            lines = records.read(min(until, _TAIL)).split(b"\n")[:-1]
        for line in reversed(lines[1:] if until > _TAIL else lines):
            told = json.loads(line)
            if told["kind"] == "step":
                return [int(told["step"]), float(told["seconds"])]
    return [0, 0.0]
