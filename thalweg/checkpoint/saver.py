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

    While one is written, one more waits, and whoever brings a third waits for a moment. If it takes longer, the third takes the
    waiting one's place, unless that must be kept. So a slow store delays a run only by what it must keep, and there are never
    more than two copies of the state.

    Args:
        store: where they go.
        before: called in the thread before each save, as to make durable what the checkpoint counts on; what it raises
            makes the save fail, and an ``Unfit`` is final.
        retain: removes what need not be kept, told the job that has just been saved.
        hurry: whether the run is to end soon: then a store that hangs is waited for no longer than ``finish`` says.
        patience: seconds that a run waits for room before a checkpoint that need not be kept is left out.

    Attributes:
        news: what became of saves, oldest first; whoever reads it removes it. Empty nearly always, and then free to ask.
        failures: saves that have failed in a row.
    """

    def __init__(
        self,
        store: Store,
        *,
        before: Callable[[Job], None] = lambda job: None,
        retain: Callable[[Job], None],
        hurry: Callable[[], bool] = lambda: False,
        patience: float = 5.0,
    ) -> None:
        self.store, self.before, self.retain, self.hurry, self.patience = store, before, retain, hurry, patience
        self.news: deque[Outcome] = deque()
        self.failures = 0
        self._unsaved: Job | None = None  # the newest that failed
        self._change = threading.Condition()
        self._waiting: Job | None = None
        self._closed = False
        self._writing: Job | None = None
        self._began = 0.0
        self._told_slow = False
        self._thread: threading.Thread | None = None

    def put(self, make: Callable[[], Job]) -> None:
        """Take over a checkpoint.

        Args:
            make: copies the state; called once there is room for another copy.
        """
        with self._change:
            until = time.monotonic() + self.patience
            while self._waiting is not None:
                over = time.monotonic() > until
                if over and (not self._waiting.must or self.hurry()):
                    text = "it was still waiting for the one before when the next came"
                    self.news.append(Outcome(self._waiting.step, text=f"left out: {text}"))
                    self._waiting = None
                    break
                self._change.wait(max(0.05, min(1.0, until - time.monotonic())))
            self._unsaved = None  # there is a newer one
        job = make()
        with self._change:
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
            if not self._idle(seconds):
                return False
            again = self._unsaved
            left = until - time.monotonic()
            if again is None or left <= 0:
                return again is None
            time.sleep(min(pause, left))
            pause = min(2 * pause, 2.0)
            self.put(lambda again=again: again)  # type: ignore[misc]

    def _idle(self, seconds: float) -> bool:
        """Wait until nothing is written; False where that is in a hurry, and takes longer than ``seconds``."""
        hurried_at: float | None = None
        with self._change:
            while self._waiting is not None or self._writing is not None:
                if hurried_at is None and self.hurry():
                    hurried_at = time.monotonic()
                if hurried_at is not None and time.monotonic() - hurried_at > seconds:
                    return False
                self._change.wait(0.25)
        return True

    def close(self) -> None:
        """The thread ends when it has written what it was given; it holds nothing of the run any more."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None and self._writing is None and self._waiting is None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                while self._waiting is None and not self._closed:
                    self._change.wait()
                if self._waiting is None:
                    return
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
            del job  # it is a copy of the whole state

    def _save(self, job: Job) -> Outcome:
        try:
            self.before(job)
            self.store.save(job.step, job.snapshot)
        except (ThalwegError, OSError, MemoryError) as err:
            return Outcome(job.step, str(err) or type(err).__name__, unfit=isinstance(err, Unfit))
        except BaseException as err:  # a store's own error, whatever it is called, must not end the thread
            return Outcome(job.step, f"{type(err).__name__}: {err}")
        return Outcome(job.step)

    def _retain(self, job: Job) -> None:
        try:
            self.retain(job)
        except BaseException as err:
            self.news.append(Outcome(job.step, text=f"older ones could not be removed: {err}"))
