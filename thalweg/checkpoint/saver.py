"""Saving beside training: the step waits for a copy out of the device, and for nothing else."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from thalweg.checkpoint.store import Snapshot, Store
from thalweg.core import CheckpointError, ThalwegError

_SLOW = 30.0  # seconds after which a person should know that a save is still under way


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written.

    Attributes:
        snapshot: in the CPU's memory; nobody else changes it.
        must: whether a later one cannot take its place, as for the best so far.
        best: steps whose checkpoints are kept for their metric.
    """

    step: int
    snapshot: Snapshot
    must: bool = False
    best: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of a save: ``failed`` is an error's text, or empty.

    Attributes:
        unfit: whether it was the state that is not fit to be kept, and not the store that failed.
        text: what else a person should know.
    """

    step: int
    failed: str = ""
    unfit: bool = False
    text: str = ""


class Unfit(CheckpointError):
    """A state that is not worth keeping, such as one with NaN in its weights. Trying again would not help."""


class Saver:
    """Writes checkpoints in a thread of its own, one at a time, in order.

    While one is written, one more waits. A third takes the waiting one's place, unless that must be kept: then whoever brings
    the third waits. So a slow store delays a run only by what it must keep.

    Args:
        store: where they go.
        before: called in the thread before each save, as to make durable what the checkpoint counts on; what it raises
            makes the save fail, and an ``Unfit`` is final.
        retain: removes what need not be kept, told the job that has just been saved.

    Attributes:
        news: what became of saves, oldest first; whoever reads it removes it. Empty nearly always, and then free to ask.
        failures: saves that have failed in a row.
    """

    def __init__(
        self, store: Store, *, before: Callable[[Job], None] = lambda job: None, retain: Callable[[Job], None]
    ) -> None:
        self.store, self.before, self.retain = store, before, retain
        self.news: deque[Outcome] = deque()
        self.failures = 0
        self._unsaved: Job | None = None  # the newest that failed
        self._change = threading.Condition()
        self._waiting: Job | None = None
        self._writing: Job | None = None
        self._began = 0.0
        self._told_slow = False
        self._thread: threading.Thread | None = None

    def put(self, job: Job) -> None:
        """Take over a checkpoint; waits only where one that must be kept is waiting already."""
        with self._change:
            while self._waiting is not None and self._waiting.must:
                self._change.wait()
            if self._waiting is not None:
                text = "it was still waiting for the one before when the next came"
                self.news.append(Outcome(self._waiting.step, text=f"left out: {text}"))
            self._waiting = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="thalweg-saver", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def is_slow(self) -> bool:
        """Whether a save has been under way for long; True once for each."""
        slow = self._writing is not None and time.monotonic() - self._began > _SLOW and not self._told_slow
        self._told_slow = self._told_slow or slow
        return slow

    def finish(self, seconds: float) -> bool:
        """Wait until all that was put is written; what failed last is tried again for so long.

        Returns:
            Whether the newest checkpoint that was put is saved.
        """
        until = time.monotonic() + seconds
        pause = 0.25
        while True:
            with self._change:
                while self._waiting is not None or self._writing is not None:
                    self._change.wait()
                again = self._unsaved
            left = until - time.monotonic()
            if again is None or left <= 0:
                return again is None
            time.sleep(min(pause, left))
            pause = min(2 * pause, 2.0)
            self.put(again)

    def _work(self) -> None:
        while True:
            with self._change:
                while self._waiting is None:
                    self._change.wait()
                job, self._waiting = self._waiting, None
                self._writing, self._began, self._told_slow = job, time.monotonic(), False
                self._change.notify_all()
            outcome = self._save(job)
            if not outcome.failed:
                self._retain(job)
            with self._change:
                self._writing = None
                self._unsaved = job if outcome.failed and not outcome.unfit else None
                self.failures = self.failures + 1 if outcome.failed else 0
                self.news.append(outcome)
                self._change.notify_all()

    def _save(self, job: Job) -> Outcome:
        try:
            self.before(job)
            self.store.save(job.step, job.snapshot)
        except (ThalwegError, OSError, MemoryError) as err:
            return Outcome(job.step, str(err) or type(err).__name__, unfit=isinstance(err, Unfit))
        except Exception as err:  # a store's own error, whatever it is called, must not end the thread
            return Outcome(job.step, f"{type(err).__name__}: {err}")
        return Outcome(job.step)

    def _retain(self, job: Job) -> None:
        try:
            self.retain(job)
        except Exception as err:
            self.news.append(Outcome(job.step, text=f"older ones could not be removed: {err}"))
