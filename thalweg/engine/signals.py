"""Signals that ask a run to end: noted at once, obeyed between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C; what clusters send before they kill; a terminal that closes; SLURM's --signal=USR1@60.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Asked:
    """Whether somebody has asked this process to end, by which signal.

    Asking costs a look at an attribute; no device is waited for.

    Args:
        grace: seconds within which a run that was asked to end must reach the end of a step. A cluster kills what does not
            end in time: a run that hangs ends by itself before, its last checkpoint as it was, its children with it.

    Attributes:
        number: of the signal; 0: nobody has asked.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.number = 0
        self._resting = False
        self._timer: threading.Timer | None = None

    def __call__(self) -> bool:
        return self.number != 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: remembers, and does nothing else. A second Ctrl-C ends the process at once."""
        if self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if number != signal.SIGINT and not self._resting:  # at a terminal a person decides how long to wait
            self._timer = threading.Timer(self.grace, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def heard(self) -> None:
        """The run has reached a place where it can be saved: it has all the time that it needs."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def rest(self) -> None:
        """No step follows: what is left is to write what there is, and a signal need not hurry it."""
        self._resting = True
        self.heard()

    def _give_up(self) -> None:
        name = signal.Signals(self.number).name
        print(
            f"error: {name} asked the run to end, and it reached no end of a step.\n"
            f"  {self.grace:g} seconds have passed (checkpoint.grace).\n"
            f"  The last checkpoint is as it was; --resume goes on from there.",
            file=sys.stderr,
            flush=True,
        )
        end_children()
        os._exit(exit_code(self.number))


def exit_code(number: int) -> int:
    """What a process that ended for a signal says, as a shell would: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + number


def end_children() -> None:
    """Kill this process's children that multiprocessing started: nobody is left to read from them."""
    from multiprocessing import active_children

    for child in active_children():
        child.kill()


@contextmanager
def asked_to_end(grace: float) -> Iterator[Asked]:
    """Inside, signals are noted; afterwards they are what they were. In another thread than the main one none arrives.

    What was ignored from the start, as SIGHUP is under nohup, stays ignored.
    """
    asked = Asked(grace)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    heard = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, asked.note) for number in heard}
    try:
        yield asked
    finally:
        asked.rest()
        for number, handler in before.items():
            # None: it was installed by another than Python, who cannot be given it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
