"""Several processes of one command on this machine, through torch's own launcher of processes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from thalweg.core import RecipeError

LAUNCHER = "THALWEG_LAUNCHER"  # its process id, for the ranks to end with it
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_GRACE = 30.0  # seconds that a rank has to save when its launcher is gone


def launch(arguments: Sequence[str], num: int) -> int:
    """Run ``python -m thalweg ARGUMENTS`` as ``num`` ranks; signals are passed on to them.

    Returns:
        The exit code of the rank that failed first, 128 and the number of a signal that ended it; 0 where none did.

    Raises:
        RecipeError: for fewer than one.
    """
    if num < 1:
        raise RecipeError(f"--ranks {num} is no number of processes.", "It must be 1 or more.", "Give --ranks 2.")
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    shared = {
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here: no rank makes one, and no port is guessed
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num))),
        LAUNCHER: str(os.getpid()),
    }
    with tempfile.TemporaryDirectory(prefix="thalweg-ranks-") as logs, _handlers_kept():
        result = None
        try:
            ranks = start_processes(
                name="thalweg",
                entrypoint=sys.executable,
                args=dict.fromkeys(range(num), ("-m", "thalweg", *arguments)),
                envs={rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)},
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
        except SignalException as err:  # those that were started end with this process
            return 128 + err.sigval
        while result is None:
            try:
                result = ranks.wait(period=0.1)
            except SignalException as err:
                for pid in ranks.pids().values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, err.sigval)
    codes = [failure.exitcode for failure in result.failures.values()]  # in the order in which they were found
    return 0 if not codes else codes[0] if codes[0] > 0 else 128 - codes[0]


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Torch's launcher takes the signals that end a process; afterwards they are whose they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_the_launcher() -> None:
    """A rank whose launcher is gone is asked to end as by SIGTERM, and ends by itself a while later."""
    launcher = int(os.environ.get(LAUNCHER, "0"))
    if not launcher:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()
