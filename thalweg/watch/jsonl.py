"""Records as JSON Lines: one line a step, append-only, readable after a kill."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from thalweg.core import Evaluation, Event, Plan, Record, RunFolderError, StopReason, human_bytes

#: Lines that could not be written wait in memory, up to so many bytes.
MOST_WAITING = 64 << 20


class JsonLines:
    """Writes the values of a run to a file. What the disk does not take waits in memory, and is tried again with what comes next.

    Args:
        path: the file; created if it is not there.
        keep_bytes: what stands beyond is cut off when the run starts: steps after the checkpoint that is resumed from,
            and a line that a kill tore.

    Attributes:
        trouble: why the last lines could not be written; empty while all is well.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self.path, self.keep_bytes = path, keep_bytes
        self.trouble = ""
        self._file: int | None = None
        self._written = 0  # bytes of whole lines and of what may have been written of the next
        self._waiting = bytearray()

    def start(self, plan: Plan, step: int) -> None:
        # A pipe that nobody reads is refused, not waited for; a link could lead anywhere.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW
        self._file = os.open(self.path, flags, 0o666)
        self._written = min(self.keep_bytes, os.fstat(self._file).st_size)
        os.ftruncate(self._file, self._written)
        _sync(self.path.parent)  # or, after a power cut, its name could be gone, whatever stands in it

    @property
    def length(self) -> int:
        """Bytes of the file once all lines so far are in it."""
        return self._written + len(self._waiting)

    def make_durable(self, length: int) -> None:
        """Have the first ``length`` bytes on the disk; may be called from another thread.

        Raises:
            OSError: where some of them wait in memory, or the disk fails.
        """
        if self._written < length:
            raise OSError(f"{self.path.name} cannot be written: {self.trouble}")
        _sync(self.path)

    def steps(self, records: list[Record]) -> None:
        self._write(records)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._write([evaluation])

    def event(self, event: Event) -> None:
        self._write([event])

    def stop(self, reason: StopReason) -> None:
        if self._file is not None:
            self._try()
            os.close(self._file)
            self._file = None

    def _write(self, lines: Sequence[Record | Evaluation | Event]) -> None:
        if self._file is None:
            return
        self._waiting += "".join([f"{line.to_json()}\n" for line in lines]).encode()
        self._try()
        if len(self._waiting) > MOST_WAITING:
            raise RunFolderError(
                f"{self.path} cannot be written, and too many records wait in memory.",
                f"{self.trouble}: {human_bytes(len(self._waiting))} wait, at most {human_bytes(MOST_WAITING)} may.",
                "Make room, then --resume.",
            )

    def _try(self) -> None:
        assert self._file is not None
        try:
            while self._waiting:
                num = os.write(self._file, self._waiting)
                self._written += num
                del self._waiting[:num]
            self.trouble = ""
        except OSError as err:
            self.trouble = err.strerror or str(err)


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
