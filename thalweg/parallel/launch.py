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
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from thalweg.core import RecipeError

LAUNCHER = "THALWEG_LAUNCHER"  # its process id, for the ranks to end with it
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_GRACE = 30.0  # seconds that a rank has to save when its launcher is gone


def launch(arguments: Sequence[str], num: int, restarts: int = 0) -> int:
    """Run ``python -m thalweg ARGUMENTS`` as ``num`` ranks; signals are passed on to them.

    Args:
        restarts: how often all of them are started again when one is lost.

    Returns:
        The exit code of the rank that failed first, 128 and the number of a signal that ended it; 0 where none did.

    Raises:
        RecipeError: for fewer than one.
    """
    if num < 1:
        raise RecipeError(f"--ranks {num} is no number of processes.", "It must be 1 or more.", "Give --ranks 2.")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num)))
    with tempfile.TemporaryDirectory(prefix="thalweg-ranks-") as logs, _handlers_kept():
        codes = _again(arguments, num, restarts, logs) if restarts else _once(arguments, num, logs)
    return next((code if code > 0 else 128 - code for code in codes), 0)


def _again(arguments: Sequence[str], num: int, restarts: int, logs: str) -> list[int]:
    """The same under torchrun's own agent, which starts a group again."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "thalweg", *arguments)
    except SignalException as err:  # passed on; the ranks have ended by now
        return [-err.sigval]
    except ChildFailedError as err:
        return [failure.exitcode for failure in sorted(err.failures.values(), key=lambda one: one.timestamp)]
    finally:
        del os.environ[LAUNCHER]
    return []


def _once(arguments: Sequence[str], num: int, logs: str) -> list[int]:
    """The exit codes of those that failed, in the order in which they were found."""
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
        "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        LAUNCHER: str(os.getpid()),
    }
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
        return [-err.sigval]
    while result is None:
        try:
            result = ranks.wait(period=0.1)
        except SignalException as err:
            for pid in ranks.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, err.sigval)
    return [failure.exitcode for failure in result.failures.values()]


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
