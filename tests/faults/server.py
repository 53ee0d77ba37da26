"""Processes to do harm to: fresh ones, or children of one that has imported torch already.

A fork server saves the seconds that importing torch takes; its children run the same command, in a session of their own. Killed
while they start up they have less to do than a fresh process, so that the harness uses both.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent.parent
CLI = "thalweg.cli.main:main"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


class Running:
    """A process that leads a session of its own.

    Attributes:
        pid: of the process, which is its session's and its group's number too.
        code: how it ended, as in ``subprocess``: negative for a signal; None while it runs.
    """

    def __init__(self, pid: int, wait: Any, log: Path) -> None:
        self.pid, self._wait, self.log = pid, wait, log
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, seconds: float = 120.0) -> int | None:
        """Its exit code, or None if it still runs after so long."""
        if self.code is None:
            self.code = self._wait(seconds)
        return self.code

    def send(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number) if group else os.kill(self.pid, number)

    def ended(self, seconds: float = 120.0) -> int:
        """Its exit code; one that does not end is ended, and that is a failure."""
        code = self.wait(seconds)
        if code is None:
            self.send(signal.SIGKILL, group=True)
            self.wait()
            raise AssertionError(f"it did not end within {seconds} s:\n{self.text()}")
        return code

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


class Starter(Protocol):
    """What can start a process."""

    def start(self, arguments: list[str], log: Path, call: str = CLI) -> Running: ...


class Fresh:
    """A new interpreter each time, as a person or a cluster starts one."""

    def start(self, arguments: list[str], log: Path, call: str = CLI) -> Running:
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", _CALL, call, *arguments],
                stdout=out,
                stderr=out,
                env=environment(),
                start_new_session=True,
            )

        def wait(seconds: float) -> int | None:
            try:
                return process.wait(seconds) if seconds else process.poll()
            except subprocess.TimeoutExpired:
                return None

        return Running(process.pid, wait, log)


_CALL = """
import importlib, sys
module, _, name = sys.argv[1].partition(":")
sys.exit(getattr(importlib.import_module(module), name)(sys.argv[2:]))
"""


class Server:
    """One process that has imported all that a run needs, and forks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def start(
        self,
        arguments: list[str],
        log: Path,
        call: str = CLI,
        *,
        errors: Path | None = None,
        cwd: Path | None = None,
        environ: dict[str, str] | None = None,
    ) -> Running:
        """``errors``: where stderr goes, if not into the log as well; ``cwd`` is where modules are looked for first, as with -m."""
        assert self.process.stdin is not None
        order = {"arguments": arguments, "log": str(log), "call": call, "errors": str(errors or log)}
        order |= {"cwd": str(cwd) if cwd else None, "environ": environ}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Running(int(self._line(60.0) or 0), self._code, log)

    def _code(self, seconds: float) -> int | None:
        line = self._line(seconds)
        return None if line is None else int(line)

    def _line(self, seconds: float) -> str | None:
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            return None
        line = out.readline()
        assert line, f"the fork server has ended with {self.process.wait(30)}"
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended before
            self.process.stdin.close()
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


shared_servers: list[Server] = []


def shared_server() -> Server:
    """One for all faults of this process, and another where it has ended: what harms processes may have met it too."""
    if shared_servers and (code := shared_servers[0].process.poll()) is not None:
        print(f"the fork server has ended with {code}; another takes its place", file=sys.stderr)
        close_shared_server()
    if not shared_servers:
        shared_servers.append(Server())
    return shared_servers[0]


def close_shared_server() -> None:
    while shared_servers:
        shared_servers.pop().close()


def session_of(pid: int) -> list[int]:
    """Processes of a session that are alive, by ``/proc``."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == pid and state != "Z":
                    found.append(int(path.name))
    return found


def no_orphans(pid: int, seconds: float = 20.0) -> None:
    """All of a process's session ends within so long: a worker looks for its parent every five seconds.

    Raises:
        AssertionError: if not; they are ended then.
    """
    until = time.monotonic() + seconds
    while left := session_of(pid):
        if time.monotonic() > until:
            for one in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes of session {pid} are alive {seconds} s after it ended")
        time.sleep(0.05)


@contextlib.contextmanager
def _child(order: dict[str, Any]) -> Iterator[None]:
    os.setsid()
    out, errors = (os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) for name in ("log", "errors"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, number in ((nothing, 0), (out, 1), (errors, 2)):
        os.dup2(target, number)
    if order["cwd"]:
        os.chdir(order["cwd"])
        sys.path.insert(0, order["cwd"])
    if order["environ"]:
        os.environ.clear()
        os.environ.update(order["environ"])
    yield


def _run(order: dict[str, Any]) -> int:
    """In a child: the command, with its exit code as an interpreter would give it."""
    import traceback

    with _child(order):
        module, _, name = order["call"].partition(":")
        try:
            return int(getattr(importlib.import_module(module), name)(order["arguments"]) or 0)
        except SystemExit as err:
            return err.code if isinstance(err.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1


PRELOADED = (
    "tests.faults.tasks",
    "thalweg.cli.main",
    "thalweg.recipes.digits",
    "thalweg.recipes.pycode",
    "thalweg.run",
    "thalweg.watch.console",
)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each child's first collection looks at all that was imported, and copies its pages
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = _run(order)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
