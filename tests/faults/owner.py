"""Two owners of a folder, clocks that step, folders that cannot be written, slow stores."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.core import Given, Row, fault
from tests.faults.full import Trouble, go, refusing, went_on
from tests.faults.powercut import sh
from tests.faults.runs import Ended, command, reference, verified
from tests.faults.samples import same, snapshot
from tests.faults.server import Fresh, no_orphans, shared_server
from tests.faults.signals import TASK, has_begun
from thalweg.checkpoint import LocalPlace, Saver, Store
from thalweg.checkpoint.saver import Job
from thalweg.core import StopReason


@fault("two processes in one folder", times=6, quick=1)
def two(row: Row, given: Given) -> None:
    """The second is refused, exit code 2, and the first ends with the bits of one that was alone."""
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        arguments, log = command(TASK, given.folder, folder.name), given.folder / f"run-{number}.log"
        with row.trial(f"run {number}"):
            first = shared_server().start(arguments, log)
            assert has_begun(folder, first, 0), first.text()
            first.send(signal.SIGSTOP)  # or it could have ended before the second comes so far
            second = Fresh().start(arguments, given.folder / f"second-{number}.log")
            assert second.ended() == 2, second.text()
            assert f"Another process is training in {folder}." in second.text(), second.text()
            assert f"Its process id is {first.pid}." in second.text(), second.text()
            first.send(signal.SIGCONT)
            assert first.ended() == 0, first.text()
            Ended.of(folder).same_as(reference(TASK)[0])


@fault("SIGKILL while data workers live, started again at once", times=10, quick=1)
def lock(row: Row, given: Given) -> None:
    """The lock dies with its process, though its children live on for a while."""
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        arguments, log = command(TASK, given.folder, folder.name), given.folder / f"run-{number}.log"
        with row.trial(f"run {number}"):
            first = shared_server().start(arguments, log)
            assert has_begun(folder, first, 0), first.text()
            time.sleep(given.draw.uniform(0, 0.5))
            first.send(signal.SIGKILL)
            first.ended()
            again = shared_server().start(arguments, log)
            assert again.ended() == 0, again.text()
            Ended.of(folder).same_as(reference(TASK)[0])
            no_orphans(first.pid)
            no_orphans(again.pid)


class _Clock:
    """A clock that steps back and forth by up to a year, each time it is read."""

    def __init__(self, given: Given) -> None:
        self.draw, self.real = given.draw, time.time

    def __call__(self) -> float:
        return self.real() + self.draw.uniform(-3e7, 3e7)


@fault("clock steps back and forth; folders with any date", times=40, quick=6)
def clock(row: Row, given: Given) -> None:
    """Retention goes by step: the newest stay, whatever their dates."""
    time.time, real = _Clock(given), time.time  # type: ignore[assignment]
    try:
        for number in range(given.times):
            store = Store(given.folder / f"store-{number}")
            with row.trial(f"store {number}"):
                for step in range(1, 9):
                    store.save(step, snapshot(step))
                    for path in [store.path(step), *store.path(step).iterdir()]:
                        date = real() + given.draw.uniform(-3e7, 3e7)
                        os.utime(path, (date, date))
                    store.retain(last=2, every=0, best=[1])
                assert store.steps() == [1, 7, 8], store.steps()
                found, faults = Store(store.folder).load_newest()
                assert found is not None and same(found, snapshot(8)) and not faults
    finally:
        time.time = real


@contextmanager
def _no_writing(folder: Path) -> Iterator[tuple[Any, Any]]:
    """(what makes a run's checkpoints read-only, what undoes it): a read-only mount over them, or refused operations."""
    where = folder / "checkpoints"
    if os.geteuid() == 0:
        undo = partial(subprocess.run, ["umount", "-l", str(where)], check=False, capture_output=True)
        try:
            yield partial(sh, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", where), undo
        finally:
            undo()
    else:
        says = [0]
        with refusing(where, lambda name: says[0]):
            yield partial(says.__setitem__, 0, errno.EROFS), partial(says.__setitem__, 0, 0)


@fault("checkpoints become read-only, or their mount vanishes, in the middle of a run", times=10, quick=1)
def readonly(row: Row, given: Given) -> None:
    """It says so and goes on in memory; when the folder can be written again it saves; the bits are the same."""
    go(given.folder / "whole")
    whole = Ended.of(given.folder / "whole")
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        start, later = given.draw.randrange(4, 26), given.draw.randrange(40)
        with row.trial(f"from step {start}"), _no_writing(folder) as (begin, end):
            went_on(folder, Trouble(start, begin, end, later), whole, ("Read-only file system", "No such file"))


@fault("checkpoints stay read-only", times=4, quick=1)
def readonly_for_good(row: Row, given: Given) -> None:
    """The run ends as unsaved, exit code 4; what was saved before is there when the folder is back."""
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        with row.trial(f"run {number}"):
            more = {"checkpoint.failures": 2, "checkpoint.grace": 0.2}
            with _no_writing(folder) as (begin, _):
                result, _ = go(folder, {12: begin}, **more)
            assert result.reason is StopReason.UNSAVED and result.exit_code == 4
            before = verified(folder)
            assert before, "what was saved before is gone"
            again, _ = go(folder, resume="auto", **more)
            assert again.reason is StopReason.FINISHED and again.records[0].step > before[0]


class _Slow(LocalPlace):
    """A store that takes its time, or fails, as often as it is asked for a new folder.

    Args:
        answers: seconds to wait, or an error to raise, one for each save; afterwards it is quick.
    """

    def __init__(self, root: Path, answers: list[float | OSError]) -> None:
        super().__init__(root)
        self.answers = answers

    @contextmanager
    def new(self, folder: str) -> Iterator[Any]:
        answer = self.answers.pop(0) if self.answers else 0.0
        if isinstance(answer, OSError):
            raise answer
        time.sleep(answer)
        with super().new(folder) as writing:
            yield writing


@fault("a slow store, and one that fails at times", times=20, quick=3)
def slow(row: Row, given: Given) -> None:
    """Handing over waits for nothing but what must be kept; what must be kept and the last one are saved."""
    for number in range(given.times):
        gone = OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        answers: list[float | OSError] = [given.draw.choice((0.2, 0.3, gone)) for _ in range(6)]
        store = Store(_Slow(given.folder / f"store-{number}", answers))
        saver = Saver(store, retain=lambda job: None, patience=0.02)
        with row.trial(f"store {number}"):
            longest = 0.0
            for step in range(1, 41):
                began = time.perf_counter()
                saver.put(lambda step=step: Job(step, snapshot(step, 4), must=step == 20))
                longest = max(longest, time.perf_counter() - began) if not 20 <= step <= 23 else longest
                time.sleep(0.002)
            assert saver.finish(10.0), "the last one was not saved"
            assert longest < 0.15, f"a step waited {longest:.2f} s"
            assert store.steps()[-1] == 40, store.steps()
            failed = {news.step for news in saver.news if news.failed}
            assert 20 in {*store.steps(), *failed}, "one that must be kept was left out"
            left = {news.step for news in saver.news if news.text.startswith("left out")}
            assert {*store.steps(), *left, *failed} == set(range(1, 41)), "one was neither saved nor told of"
    row.notes["threads"] = threading.active_count()
