"""Signals that ask a run to end, to it or to its whole group, with two data workers, at random instants."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.faults.core import Given, Row, fault
from tests.faults.runs import Ended, as_it_lies, command, lines, reference, residue, verified
from tests.faults.server import Fresh, Running, Starter, no_orphans, shared_server
from tests.faults.tasks import HANG

TASK = "tests.faults.tasks:items"
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def has_begun(folder: Path, running: Running, size: int) -> bool:
    """Wait for the first records of this process; False if it ends before."""
    file = folder / "records.jsonl"
    until = time.monotonic() + 60
    while running.poll() is None and time.monotonic() < until:
        if file.exists() and file.stat().st_size > size:
            return True
        time.sleep(0.005)
    return False


def quiet(folder: Path) -> None:
    """Wait until nothing has happened in a run folder for a second."""
    before, since = "", time.monotonic()
    while time.monotonic() - since < 1.0:
        now = str([(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*.jsonl"))]) + str(residue(folder))
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.05)


def saved_where_it_stopped(folder: Path) -> None:
    """The newest checkpoint is whole, and of the last step that was made.

    Raises:
        AssertionError: if not.
    """
    steps = [line["step"] for line in lines(folder) if line["kind"] == "step"]
    good = verified(folder)
    assert good and good[-1] == as_it_lies(folder).steps()[-1], "the newest checkpoint is damaged"
    assert good[-1] == steps[-1], f"the last step was {steps[-1]}, and the newest checkpoint is of {good[-1]}"
    assert not residue(folder), residue(folder)


def _interrupt(row: Row, given: Given, starter: Starter, number: int, span: float) -> None:
    """One run, asked to end twice, then trained to its end."""
    folder = given.folder / f"run-{number}"
    arguments, log = command(TASK, given.folder, folder.name), given.folder / f"run-{number}.log"
    size, sent, wrong = 0, [], ""
    for _ in range(2):
        which, group = draw_signal(given)
        running = starter.start(arguments, log)
        if has_begun(folder, running, size):
            time.sleep(given.draw.uniform(0, span / 3))
        if running.poll() is not None:  # it was done before
            wrong = wrong or ("" if running.code == 0 else f"exit code {running.code}: {running.text()}")
            break
        sent.append(which.name + (" to the group" if group else ""))
        running.send(which, group=group)
        try:
            _ended_by(which, running, folder, row)
        except AssertionError as err:
            wrong = wrong or f"{sent[-1]}: {err}"
        size = (folder / "records.jsonl").stat().st_size
    with row.trial(f"run {number}, {sent}", len(sent)):
        assert not wrong, wrong
        running = starter.start(arguments, log)
        assert running.ended() == 0, running.text()
        Ended.of(folder).same_as(reference(TASK)[0])
    for name in sent:
        row.count(name)


def draw_signal(given: Given) -> tuple[signal.Signals, bool]:
    return given.draw.choice(ASKING), given.draw.random() < 0.5


def _ended_by(which: signal.Signals, running: Running, folder: Path, row: Row) -> None:
    """A run that was asked to end has done so in order.

    Raises:
        AssertionError: if not.
    """
    code = running.ended()
    if code in (0, -which) and (folder / "outcome.json").exists():
        row.count("had finished")  # and, at -which, given back its signal handlers
    else:
        assert code == 128 + which, f"exit code {code}: {running.text()}"
        assert "to go on: thalweg train" in running.text()
    saved_where_it_stopped(folder)
    no_orphans(running.pid)


@fault("SIGTERM, SIGINT, SIGUSR1, SIGHUP, to process or group, two workers", times=50, quick=3)
def forked(row: Row, given: Given) -> None:
    span = reference(TASK)[1]
    number = 0
    while row.n < given.times:
        _interrupt(row, given, shared_server(), number, span)
        number += 1


@fault("SIGTERM, SIGINT, SIGUSR1, SIGHUP, fresh processes", times=12, quick=1)
def fresh(row: Row, given: Given) -> None:
    span = reference(TASK)[1]
    number = 0
    while row.n < given.times:
        _interrupt(row, given, Fresh(), number, span)
        number += 1


@fault("a signal during start-up", times=16, quick=1)
def starting(row: Row, given: Given) -> None:
    """Before the first step there is nothing to save: the process ends at once, and the next start is like the first."""
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        arguments, log = command(TASK, given.folder, folder.name), given.folder / f"run-{number}.log"
        which = ASKING[number % len(ASKING)]
        with row.trial(f"{which.name}, run {number}"):
            running = (Fresh() if number % 2 else shared_server()).start(arguments, log)
            time.sleep(given.draw.uniform(0, 2.0 if number % 2 else 0.3))
            running.send(which, group=bool(number & 2))
            code = running.ended()
            assert code in (-which, 128 + which, 1), f"exit code {code}: {running.text()}"
            if code == 1:  # Python itself was starting, and its own import broke off
                assert "KeyboardInterrupt" in running.text() and which == signal.SIGINT, running.text()
            no_orphans(running.pid)
            running = shared_server().start(arguments, log)
            assert running.ended() == 0, running.text()
            Ended.of(folder).same_as(reference(TASK)[0])


@fault("a signal while a step hangs", times=6, quick=1)
def hanging(row: Row, given: Given) -> None:
    """After ``checkpoint.grace`` the process ends with the signal's code; its last checkpoint is as it was."""
    changes = {"checkpoint.grace": 1.0}
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        arguments, log = command(TASK, given.folder, folder.name, **changes), given.folder / f"run-{number}.log"
        which = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)[number % 3]
        with row.trial(f"{which.name}, run {number}"):
            os.environ[HANG] = "30"
            try:
                running = Fresh().start(arguments, log)
            finally:
                del os.environ[HANG]
            assert has_begun(folder, running, 0), running.text()
            quiet(folder)
            before = verified(folder)
            running.send(which, group=True)
            asked = time.monotonic()
            assert running.ended(30) == 128 + which, running.text()
            assert time.monotonic() - asked < 15
            assert "reached no end of a step" in running.text()
            assert verified(folder) == before != [], "the last checkpoint was touched"
            no_orphans(running.pid)
            running = shared_server().start(arguments, log)
            assert running.ended() == 0, running.text()
            Ended.of(folder).same_as(reference(TASK)[0])
