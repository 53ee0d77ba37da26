"""Records as JSON Lines: one line a step, append-only, readable after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from thalweg.core import Evaluation, Event, Plan, Record, StopReason


class JsonLines:
    """Writes the values of a run to a file.

    Args:
        path: the file; created if it is not there.
        keep_bytes: what stands beyond is cut off when the run starts: steps after the checkpoint that is resumed from,
            and a line that a kill tore.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self.path, self.keep_bytes = path, keep_bytes
        self._file: IO[bytes] | None = None

    def start(self, plan: Plan, step: int) -> None:
        self.path.touch()
        os.truncate(self.path, self.keep_bytes)
        self._file = open(self.path, "ab")  # noqa: SIM115 - open as long as the run

    def durable_bytes(self) -> int:
        """Length of the file, once all of it is on the disk."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def steps(self, records: list[Record]) -> None:
        self._write(records)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._write([evaluation])

    def event(self, event: Event) -> None:
        self._write([event])

    def stop(self, reason: StopReason) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, lines: Sequence[Record | Evaluation | Event]) -> None:
        if self._file is not None:
            self._file.write(b"".join(json.dumps(line.to_dict()).encode() + b"\n" for line in lines))
            self._file.flush()


class Memory:
    """Keeps the values of a run in lists, for programs that want them."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.evaluations: list[Evaluation] = []
        self.events: list[Event] = []

    def start(self, plan: Plan, step: int) -> None:
        self.records = [r for r in self.records if r.step <= step]

    def steps(self, records: list[Record]) -> None:
        self.records.extend(records)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def stop(self, reason: StopReason) -> None:
        """Nothing to close."""
