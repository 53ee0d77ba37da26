"""Each rank says now and then how far it is, so that one that hangs or has died can be named."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST = 5.0  # seconds that a store may take to answer: it may lie on the rank that hangs


@dataclass(frozen=True)
class Beat:
    """What a rank said of itself.

    Attributes:
        count: how many times it has said something.
        calls: how many exchanges with the others it has begun.
        step: the last step that it has made.
        doing: what it waits for, or does.
        host, pid: where it is.
        last: the error that it ended with, or "".
    """

    count: int
    calls: int
    step: int
    doing: str
    host: str
    pid: int
    last: str = ""

    @property
    def is_gone(self) -> bool:
        """Whether it was on this machine and is there no more."""
        return self.host == socket.gethostname() and not _state(self.pid)[0]

    def __str__(self) -> str:
        return f"step {self.step} made, {self.doing}; process {self.pid} on {self.host}"


class Beats:
    """Written by a thread of its own, off the path of the steps.

    Args:
        store: seen by all ranks.
        now: gives (calls, step, doing) of this moment.
        every: seconds between two.
    """

    def __init__(
        self, store: Any, rank: int, world: int, now: Callable[[], tuple[int, int, str]], every: float
    ) -> None:
        self.rank, self.world, self.now, self.every = rank, world, now, every
        self._store = store.clone() if hasattr(store, "clone") else store  # another connection: nobody waits for it
        self._count, self._last = 0, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True, name="beats")
        self._thread.start()

    def end(self, last: str = "") -> None:
        """This rank says no more but ``last``, the error that it ends with."""
        self._ended.set()
        self._thread.join(1.0)  # Python ends, and it must not be in the middle of something then
        if last:
            self._last = last
            within(_LONGEST, self._say)

    def behind(self) -> dict[int, tuple[Beat, str]]:
        """The ranks that the others wait for: what each said last, and what is wrong, in words. Takes up to two beats."""
        first = within(_LONGEST, self._read) or {}
        others = {rank: beat for rank, beat in first.items() if rank != self.rank}
        gone = {
            rank: (b, "ended with an error" if b.last else "is gone")
            for rank, b in others.items()
            if b.last or b.is_gone
        }
        if gone:
            return gone
        time.sleep(2 * self.every)
        second = within(_LONGEST, self._read) or {}
        still = {r: (b, "stands still") for r, b in others.items() if r in second and second[r].count == b.count}
        if still:
            return {rank: (b, "is gone" if b.is_gone else why) for rank, (b, why) in still.items()}
        most = max((beat.calls for beat in second.values()), default=0)
        return {rank: (beat, "is behind the others") for rank, beat in second.items() if beat.calls < most}

    def _go_on(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(Exception):  # a store that is gone is told of by whoever needs it
                self._say()
            self._ended.wait(self.every)

    def _say(self) -> None:
        self._count += 1
        calls, step, doing = self.now()
        told = [self._count, calls, step, doing, socket.gethostname(), os.getpid(), self._last]
        self._store.set(f"beats/{self.rank}", json.dumps(told))

    def _read(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self.world):
            if self._store.check([f"beats/{rank}"]):
                found[rank] = Beat(*json.loads(self._store.get(f"beats/{rank}")))
        return found


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """What ``act`` gives, or None where it fails or takes longer."""
    found: list[Any] = [None]

    def run() -> None:
        with contextlib.suppress(Exception):
            found[0] = act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def end_sibling(beat: Beat) -> bool:
    """Kill a rank that hangs, where this process's launcher started it too and would wait half a minute before it did so itself."""
    if beat.host != socket.gethostname() or beat.pid == os.getpid() or _state(beat.pid)[1] != os.getppid():
        return False
    with contextlib.suppress(OSError):
        os.kill(beat.pid, signal.SIGKILL)
        return True
    return False


def _state(pid: int) -> tuple[bool, int]:
    """(whether a process of this machine is alive, its parent); (True, 0) where that cannot be known."""
    if not Path("/proc/self/stat").exists():
        return True, 0
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return False, 0
    return state not in "ZX", int(parent)
