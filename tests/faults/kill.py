"""SIGKILL at random instants, and the same command again, until it says that it is done."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.faults.core import Given, Row, fault
from tests.faults.runs import KEEP, Ended, command, lines, reference, residue, verified
from tests.faults.server import Fresh, Running, Starter, no_orphans, session_of, shared_server

WAYS = ("any time", "any time", "start-up", "save", "prune", "evaluation")
_ASIDE = re.compile(r"\.step-([0-9]+)\.[0-9a-f]{8}\.tmp")
_CHAIN = 5  # kills of one run


@dataclass
class Victim:
    """A run folder, and what has been seen in it.

    Attributes:
        made: steps whose checkpoint has stood under its name: each of them was reported as saved, or about to be.
        lost: steps that each kill took back.
    """

    folder: Path
    made: set[int] = field(default_factory=set)
    lost: list[int] = field(default_factory=list)

    def look(self) -> list[int]:
        """Steps that stand there now; those of half-written or half-removed folders are given back."""
        place, aside = self.folder / "checkpoints", []
        for name in [path.name for path in place.iterdir()] if place.is_dir() else []:
            if name.startswith("step-") and name[5:].isdecimal():
                self.made.add(int(name[5:]))
            elif match := _ASIDE.fullmatch(name):
                aside.append(int(match.group(1)))
        return aside

    def size(self) -> int:
        """Bytes of the records: as many as before, and a process has not come as far as a step."""
        file = self.folder / "records.jsonl"
        return file.stat().st_size if file.exists() else 0

    def phase(self, size: int = 0) -> str:
        """What a kill has broken off, as far as its traces say."""
        told = lines(self.folder)
        aside = self.look()
        if any(step not in self.made for step in aside):
            return "save"
        if aside:
            return "prune"
        if not told or self.size() == size:
            return "start-up"
        return "evaluation" if told[-1]["kind"] == "step" and self._is_due(told[-1]["step"]) else "step"

    def _is_due(self, step: int) -> bool:
        return step % (5 if "digits" in self.folder.name else 8) == 0

    def check(self, before: set[int]) -> None:
        """What must hold of the folder right after a kill.

        Raises:
            AssertionError: if it does not.
        """
        good = verified(self.folder)
        newest = max(before, default=0)
        assert max(good, default=0) >= newest, f"step {newest} was saved, and is gone; left: {good}"
        least = min(KEEP, len(before))
        assert len(good) >= least, f"{len(good)} verified checkpoints, and {len(before)} had been made"
        steps = [line["step"] for line in lines(self.folder) if line["kind"] == "step"]
        if steps:
            self.lost.append(max(0, steps[-1] - max(good, default=0)))


def instant(victim: Victim, running: Running, way: str, draw: Random, span: float) -> None:
    """Wait for a moment to kill at; of a phase only where it comes."""
    until = time.monotonic() + draw.uniform(0, span / 4 if way == "start-up" else span)
    while running.poll() is None and time.monotonic() < until:
        victim.look()
        time.sleep(0.004)
    until = time.monotonic() + 2.0
    while way in ("save", "prune", "evaluation") and running.poll() is None and time.monotonic() < until:
        aside = victim.look()
        if way == "save" and any(step not in victim.made for step in aside):
            break
        if way == "prune" and any(step in victim.made for step in aside):
            break
        if way == "evaluation" and victim.phase() == "evaluation":
            break
        time.sleep(0.0005)
    if way in ("save", "prune"):
        time.sleep(draw.uniform(0, 0.004))


def chain(row: Row, given: Given, starter: Starter, task: str, span: float, number: int, most: int) -> None:
    """One run, killed several times, to its end."""
    victim = Victim(given.folder / f"{task}-{number}")
    arguments = command(task, given.folder, victim.folder.name)
    arguments += ["--ranks", str(given.ranks)] if given.ranks > 1 else []
    log = given.folder / f"{task}-{number}.log"
    ways, pids = [given.draw.choice(WAYS) for _ in range(most)], []
    killed, told = 0, ""
    while killed < most:
        way = ways[killed]
        size = victim.size()
        running = starter.start(arguments, log)
        pids.append(running.pid)
        instant(victim, running, way, given.draw, span)
        before = set(victim.made)
        family = session_of(running.pid) if given.ranks > 1 else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(given.draw.choice(family or [running.pid]), signal.SIGKILL)
        code = running.ended()
        if given.ranks > 1:
            no_orphans(running.pid, 60.0)
            code = -signal.SIGKILL if code else 0  # the others say that one of them was lost
        if code != -signal.SIGKILL:  # it was done before
            told = told or ("" if code == 0 else f"exit code {code}: {running.text()}")
            break
        killed += 1
        row.count(f"during {victim.phase(size)}")
        try:
            victim.check(before)
        except AssertionError as err:
            told = told or f"after kill {killed} ({way}): {err}"
    with row.trial(f"{task} run {number}, {killed} kills", killed):
        assert not told, told
        running = starter.start(arguments, log)
        assert running.ended() == 0, running.text()
        Ended.of(victim.folder).same_as(reference(task, given.ranks)[0])
        assert not residue(victim.folder), f"left over: {residue(victim.folder)}"
        for pid in [*pids, running.pid]:
            no_orphans(pid)
    row.count("runs")
    row.notes["most steps lost"] = max(row.notes.get("most steps lost", 0), *victim.lost, 0)


def kill(row: Row, given: Given, starter: Starter, startup: float) -> None:
    number = 0
    while row.n < given.times and number < 4 * given.times:
        task = ("digits", "pycode")[number % 2]
        span = startup + reference(task, given.ranks)[1]
        chain(row, given, starter, task, span, number, min(_CHAIN, given.times - row.n))
        number += 1


@fault("SIGKILL, one of two ranks or the process that started them", times=40, quick=1)
def ranks(row: Row, given: Given) -> None:
    """Whichever is killed, all of them end, and the same command goes on."""
    kill(row, replace(given, ranks=max(2, given.ranks)), Fresh(), startup=0.0)


@fault("SIGKILL, children of a fork server", times=100, quick=3)
def forked(row: Row, given: Given) -> None:
    kill(row, replace(given, ranks=1), shared_server(), startup=0.0)


@fault("SIGKILL, fresh processes", times=100, quick=1)
def fresh(row: Row, given: Given) -> None:
    kill(row, replace(given, ranks=1), Fresh(), startup=3.0)
