"""Processes that read micro-batches: one that is killed or hangs is started again, and none outlives its parent.

A worker is told a place (step, part) and reads what lies there. What lies there is a pure function, so a worker that is lost
costs time and nothing else. Torch's ``DataLoader`` is not used here: it tells of a killed worker by raising wherever the main
process happens to be, in the middle of an update too, and its workers share one pipe, on which a message cut short by SIGKILL
blocks the reader for ever. Here each worker has a socket of its own, and batches are its parent's once sent (``parcels``).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data._utils import worker as torch_worker

from thalweg.core import DataError, Tell
from thalweg.data import parcels

#: (step, micro-batch of its window)
Place = tuple[int, int]
STARTS = 3  # in a row of one worker that was killed, without a micro-batch between them
_AHEAD = 2  # places that a worker is told ahead of what it has read
_POLL_SECONDS = 0.1  # how soon a wish to stop is heard while data is waited for
_WATCH_SECONDS = 5.0
_GRACE_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_PLACE = struct.Struct("<qq")
_NO_PLACE = (-1, -1)
_FORKS = sys.platform == "linux"
# A data set need not be picklable where workers are forked, whatever else the program starts in other ways.
_context: Any = multiprocessing.get_context("fork" if _FORKS else None)
_links: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # the parent's ends, of all workers


class Stopped(Exception):
    """Someone wants the run to end, and data is still waited for."""


@dataclass
class Failed:
    """An error on its way from a worker."""

    error: BaseException
    cause: BaseException | None
    trace: str


class Workers:
    """Processes that read places in turn; results come in the order of the places.

    Args:
        read: gives what lies at a place; runs in the workers.
        dataset: what ``torch.utils.data.get_worker_info()`` names in the workers.
        name: what lies at a place, for people.
        timeout: seconds after which a worker that is waited for counts as hung; 0: never.

    Raises:
        DataError: where no process can be started.
    """

    def __init__(
        self,
        read: Callable[[Place], Any],
        num: int,
        *,
        dataset: Any,
        name: Callable[[Place], str],
        timeout: float,
        tell: Tell,
        stop: Callable[[], bool],
    ) -> None:
        self.name, self.timeout, self.tell, self.stop = name, timeout, tell, stop
        if multiprocessing.current_process().daemon:
            raise DataError(
                "Data workers cannot be started here.",
                f"This process ({multiprocessing.current_process().name}) is daemonic, and may have no children.",
                "Use data.workers=0, or start this process with daemon=False.",
            )
        self._over = _context.RawValue(ctypes.c_bool, False)  # without a lock, which a killed worker might hold
        self._owner = os.getpid()
        self._workers: list[_Worker] = []
        # Before multiprocessing waits for its children, which do not listen to SIGTERM. In its own processes atexit is not heeded.
        self._at_exit = Finalize(None, self.close, exitpriority=100)
        try:
            for number in range(num):
                worker = _Worker(read, dataset, number, num, self._over)
                self._workers.append(worker)
                worker.start()
        except BaseException:
            self.close()
            raise

    def results(self, places: Iterator[Place]) -> Iterator[Any]:
        """What lies at the places, in their order.

        Raises:
            Stopped: if ``stop()`` is true while a result is waited for.
            DataError: if a worker is killed or hangs again and again.
        """
        turn = 0
        for worker in self._workers * _AHEAD:
            if (place := next(places, None)) is not None:
                worker.put(place)
        while (worker := self._workers[turn % len(self._workers)]).told:
            result = self._take(worker)
            if (place := next(places, None)) is not None:
                worker.put(place)
            yield result
            turn += 1

    def close(self) -> None:
        """End the workers: those that do not end by themselves at once are killed."""
        if os.getpid() != self._owner:  # a forked child inherits the call at exit, not the workers
            return
        self._at_exit.cancel()
        self._over.value = True
        for worker in self._workers:
            worker.tell(_NO_PLACE)
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in self._workers:
            worker.end(max(0.0, deadline - time.monotonic()))
        self._workers = []

    def _take(self, worker: _Worker) -> Any:
        while True:
            try:
                result = worker.get(self.timeout, self.stop)
            except _Lost as lost:
                self._start_again(worker, lost)
                continue
            worker.deaths = worker.hangs = 0
            if isinstance(result, Failed):
                result.error.add_note(result.trace)
                raise result.error from result.cause
            return result

    def _start_again(self, worker: _Worker, lost: _Lost) -> None:
        place = worker.told[0]
        worker.deaths += not lost.hung
        worker.hangs += lost.hung
        pid, ended = worker.process.pid, worker.end()
        how = f"gave nothing for {self.timeout:g} seconds" if lost.hung else f"was ended by {_spoken(ended)}"
        detail = {"worker": worker.number, "pid": pid, "at_step": place[0], "hung": lost.hung}
        if worker.hangs > 1:
            raise DataError(
                "The data set hangs.",
                f"A worker {how}, twice, while it read {self.name(place)}.",
                "See what __getitem__ waits for there, or give a longer data.timeout (seconds; 0 waits for ever).",
            ) from lost.__cause__
        if worker.deaths > STARTS:
            raise DataError(
                "Data workers are killed again and again.",
                f"A worker {how}, {worker.deaths} times in a row, while it read {self.name(place)}.",
                _remedy(ended),
            ) from lost.__cause__
        self.tell("data worker", f"Data worker {worker.number} {how} and is started again.", detail)
        worker.start()


class _Lost(Exception):
    """A worker that will give nothing more."""

    def __init__(self, *, hung: bool) -> None:
        super().__init__(hung)
        self.hung = hung


class _Worker:
    """One process and the places that it has been told and has not answered; it can be started again."""

    def __init__(self, read: Callable[[Place], Any], dataset: Any, number: int, num: int, over: Any) -> None:
        self.read, self.dataset, self.number, self.num, self.over = read, dataset, number, num, over
        self.told: deque[Place] = deque()
        self.deaths = self.hangs = 0
        self.link: socket.socket | None = None
        self.process: Any = None

    def start(self) -> None:
        try:
            self._start()
        except OSError as err:
            self.end()
            raise DataError(
                "A data worker cannot be started.",
                f"Worker {self.number} of {self.num}: {err.strerror or err}.",
                "Use fewer data.workers, or raise the limit that is reached (ulimit -u processes, ulimit -n open files, memory).",
            ) from err
        for place in self.told:
            self.tell(place)

    def _start(self) -> None:
        self.process = None
        self.link, theirs = socket.socketpair()
        _links.add(self.link)
        with theirs:  # closed here, so that the end of the worker is the end of the link
            by_kernel = threading.get_native_id() == os.getpid()
            arguments = (theirs, self.read, self.dataset, self.over, os.getpid(), by_kernel, self.number, self.num)
            process = _context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self.process = process

    def put(self, place: Place) -> None:
        self.told.append(place)
        self.tell(place)

    def tell(self, place: Place) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is noticed where its result is waited for
            assert self.link is not None
            self.link.sendall(_PLACE.pack(*place))

    def get(self, timeout: float, stop: Callable[[], bool]) -> Any:
        """The result of the first place it was told."""
        assert self.link is not None
        since = time.monotonic()
        while not wait([self.link], 0):  # what it has sent counts, even if it has ended since
            if stop():
                raise Stopped
            ready = wait([self.link, self.process.sentinel], _POLL_SECONDS)
            if ready and self.link not in ready and not wait([self.link], 0):
                raise _Lost(hung=False)
            if timeout and time.monotonic() - since > timeout:
                raise _Lost(hung=True)
        try:
            result = parcels.receive(self.link)
        except (EOFError, ConnectionError) as err:
            raise _Lost(hung=False) from err
        self.told.popleft()
        return result

    def end(self, grace: float = 0.0) -> int | None:
        """No more of this process; how it ended, as ``Process.exitcode`` has it. None: it never began.

        Args:
            grace: seconds after which it is killed.
        """
        if self.link is not None and self.process is None:
            self.link.close()
        if self.process is None:
            return None
        self.process.join(grace)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.link is not None
        self.link.close()
        code: int | None = self.process.exitcode
        return code


def _spoken(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"its own code, with exit code {code}"


def _remedy(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "The kernel does so when memory is short (see its log): use fewer data.workers, or a smaller train.micro_batch."
    if code == -signal.SIGBUS:
        return "Memory that files are mapped to is full, often /dev/shm: give it more room, or use fewer data.workers."
    return "Read these samples with data.workers=0, where the data set's own error is seen."


# --- in the worker ---------------------------------------------------------------------------------------------------


def _work(
    link: socket.socket,
    read: Callable[[Place], Any],
    dataset: Any,
    over: Any,
    parent: int,
    by_kernel: bool,
    number: int,
    num: int,
) -> None:
    for inherited in list(_links):  # with a copy of the parent's end here, the end of the parent would not be seen
        inherited.close()
    leave_signals_to_the_parent()
    die_with_the_parent(parent, by_kernel=by_kernel)
    torch.set_num_threads(1)
    # what torch.utils.data.get_worker_info() tells a data set
    torch_worker._worker_info = torch_worker.WorkerInfo(id=number, num_workers=num, seed=number, dataset=dataset)
    while not over.value:
        if not wait([link], _WATCH_SECONDS):
            if is_gone(parent):
                return
            continue
        told = link.recv(_PLACE.size, socket.MSG_WAITALL)
        if len(told) < _PLACE.size or over.value:
            return
        _answer(link, read, _PLACE.unpack(told))


def _answer(link: socket.socket, read: Callable[[Place], Any], place: Place) -> None:
    try:
        batch = read(place)
    except Exception as err:
        parcels.send(link, _failed(err, err.__cause__))
        return
    try:
        parcels.send(link, batch)
    except OSError:
        raise
    except Exception as err:
        unsendable = DataError(
            "A worker cannot send what the collate function gave.",
            f"{type(err).__name__}: {err}",
            "Give batches of tensors and plain objects, or read with data.workers=0.",
        )
        parcels.send(link, _failed(unsendable, err))


def _failed(error: BaseException, cause: BaseException | None) -> Failed:
    trace = "In a data worker: " + traceback.format_exc()
    return Failed(_travelling(error), None if cause is None else _travelling(cause), trace)


def _travelling(err: BaseException) -> BaseException:
    """The error, or its text where it cannot be pickled or cannot be made again."""
    try:
        pickle.loads(pickle.dumps(err))
    except Exception:
        return RuntimeError(f"{type(err).__name__}: {err}")
    return err


@contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, torch does not know that this is a worker: its collate function would fill shared memory of its own."""
    info, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = info


def leave_signals_to_the_parent() -> None:
    """Signals reach a whole process group; workers must outlive them for the run to save and stop in order."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def die_with_the_parent(parent: int, *, by_kernel: bool) -> None:
    """The kernel kills this process when its parent ends, however it ends.

    Args:
        by_kernel: false where a thread beside the main one has forked: its end would be taken for the parent's. Then the end
            of the link is heeded, between two places.
    """
    if _FORKS and by_kernel:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if is_gone(parent):  # it had ended before we asked
        os._exit(1)


def is_gone(parent: int) -> bool:
    """Whether the process that wanted this one has ended; where it is not forked, a server may stand between."""
    if _FORKS:
        return os.getppid() != parent
    known = multiprocessing.parent_process()
    return known is not None and not known.is_alive()
