"""Every sample once an epoch, over interruptions and workers: counted where samples are read and where the loss sees them."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

from tests.faults.core import Given, Row, fault
from tests.faults.counted import BATCH, NUM, STEPS
from tests.faults.runs import verified
from tests.faults.server import shared_server

PARTS = 2  # micro-batches of a step


class Ledger:
    """What a run wrote down, over all its processes.

    Attributes:
        seen: by step from 0: the samples that the loss saw, of the last process that made that step.
        asked: how often the data set was asked for each sample while steps were made.
    """

    def __init__(self, path: Path) -> None:
        self.seen: dict[int, list[int]] = {}
        self.asked: Counter[int] = Counter()
        self.begun: list[int] = []
        self.calls = 0
        for line in path.read_text().splitlines():
            word, *rest = line.split()
            if word == "begin":
                self._begin(int(rest[0]))
            elif word == "saw" and self.begun:
                self._saw([int(one) for one in rest])
            elif word == "asked":
                self.asked[int(rest[0])] += 1
            elif word == "end":
                self.calls = -(10**9)  # what comes after belongs to no step, until the next begins

    def _begin(self, step: int) -> None:
        self.begun.append(step)
        self.calls = 0
        self.seen = {at: ids for at, ids in self.seen.items() if at < step}  # made again

    def _saw(self, ids: list[int]) -> None:
        if self.calls >= 0:
            self.seen.setdefault(self.begun[-1] + self.calls // PARTS, []).extend(ids)
            self.calls += 1

    def check(self) -> None:
        """
        Raises:
            AssertionError: naming a sample that was missed or came twice in an epoch.
        """
        assert sorted(self.seen) == list(range(STEPS)), f"steps {sorted(self.seen)}"
        a_pass = NUM // BATCH
        orders = []
        for epoch in range(STEPS // a_pass):
            ids = [one for step in range(epoch * a_pass, (epoch + 1) * a_pass) for one in self.seen[step]]
            wrong = {one: count for one, count in Counter([*ids, *range(NUM)]).items() if count != 2}
            assert not wrong, f"epoch {epoch}: {wrong} (2 is right)"
            orders.append(tuple(ids))
        assert len(set(orders)) == len(orders), "two epochs had one order"


def count(row: Row, given: Given, kind: str, workers: int, kills: bool, number: int) -> Ledger:
    """One run, ended several times, to its end."""
    folder = given.folder / f"{kind}-{workers}-{kills}-{number}"
    order, log = [str(folder), str(workers), kind], given.folder / f"{folder.name}.log"
    ends = 0
    while ends < 40:
        running = shared_server().start(order, log, "tests.faults.counted:main")
        if ends < 4:
            before = max(verified(folder), default=0)
            until = time.monotonic() + 20
            while running.poll() is None and max(verified(folder), default=0) <= before and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(given.draw.uniform(0, 0.15))
            running.send(signal.SIGKILL if kills else signal.SIGTERM)
        code = running.ended()
        ends += 1
        if code == 0:
            break
        assert code in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM), running.text()
    row.count("processes", ends)
    return Ledger(given.folder / f"{folder.name}.ledger")


def go(row: Row, given: Given, kinds: tuple[tuple[str, int], ...], kills: bool) -> None:
    number = 0
    while row.n < given.times:
        kind, workers = kinds[number % len(kinds)]
        with row.trial(f"{kind}, {workers} workers, run {number}"):
            ledger = count(row, given, kind, workers, kills, number)
            ledger.check()
            if kind == "dataset":
                assert min(ledger.asked[one] for one in range(NUM)) >= STEPS * BATCH // NUM, ledger.asked
        number += 1


KINDS = (("dataset", 2), ("dataset", 0), ("memory", 0))


@fault("every sample once an epoch, over SIGTERM, 0 and 2 workers", times=20, quick=1)
def asked(row: Row, given: Given) -> None:
    go(row, given, KINDS, kills=False)


@fault("every sample once an epoch, over SIGKILL, 0 and 2 workers", times=20, quick=1)
def killed(row: Row, given: Given) -> None:
    go(row, given, KINDS, kills=True)
