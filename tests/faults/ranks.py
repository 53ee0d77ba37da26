"""Ranks under torchrun's agent: killed, hung, cut off from one another; started again, they go on with the same run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import free_port
from tests.faults import ranked
from tests.faults.core import Given, Row, Skip, fault, needs_root
from tests.faults.runs import Ended, residue
from tests.faults.server import Fresh, Running, environment, no_orphans, session_of

TASK = "tests.faults.ranked:task"
TIMEOUT = 10  # seconds after which a rank is given up
BAR = 30.0  # seconds after that within which the run goes on
_CHAIN = 5  # faults in one run
_MOST = 300.0  # seconds that a run may take


def command(runs: Path, name: str, *more: str) -> list[str]:
    return ["train", TASK, "--runs", str(runs), "--name", name, "--quiet", "--ranks-timeout", str(TIMEOUT), *more]


@contextlib.contextmanager
def ledger(folder: Path) -> Iterator[Path]:
    """Processes that are started inside write down what their steps saw."""
    folder.mkdir()
    os.environ[ranked.LEDGER] = str(folder)
    try:
        yield folder
    finally:
        del os.environ[ranked.LEDGER]


@cache
def whole(*more: str) -> Ended:
    """How the run ends that nothing happens to."""
    import tempfile

    with tempfile.TemporaryDirectory() as runs:
        running = Fresh().start(command(Path(runs), "whole", *more), Path(runs, "log"))
        assert running.ended(_MOST) == 0, running.text()
        return Ended.of(Path(runs, "whole"))


def newest(folder: Path) -> float:
    """When a step was made last, by any rank."""
    return max((file.stat().st_mtime for file in folder.glob("rank-*")), default=0.0)


def goes_on(folder: Path, running: Running, since: float, seconds: float) -> float | None:
    """The seconds from ``since`` to the next step, made after a start of all ranks; None: the run had ended before."""
    before = {file.name for file in folder.glob("rank-*")}
    until = time.time() + seconds
    while time.time() < until:
        if {file.name for file in folder.glob("rank-*")} - before:
            return time.time() - since
        if running.poll() is not None:
            return None
        time.sleep(0.02)
    raise AssertionError(f"no step within {seconds:.0f} s:\n{running.text()}")


def pids_of(folder: Path, known: set[str]) -> dict[int, int]:
    """Process ids by rank, of those that have made a step since ``known``."""
    names = [file.name.split("-") for file in folder.glob("rank-*") if file.name not in known]
    return {int(rank): int(pid) for _, rank, pid in names}


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for(true: Callable[[], Any], running: Running, seconds: float = 120.0) -> bool:
    """False where the run ends before."""
    until = time.monotonic() + seconds
    while not true():
        if running.poll() is not None:
            return False
        assert time.monotonic() < until, f"it did not come to that:\n{running.text()}"
        time.sleep(0.02)
    return True


def struck(row: Row, given: Given, number: int, most: int, how: Callable[[int], None], allowed: float) -> None:
    """A run on four ranks, one of which is struck several times at random instants, to its end.

    Args:
        how: strikes a process.
        allowed: seconds from there to the next step.
    """
    runs, ranks = given.folder, 4
    slowest, times, wrong = 0.0, 0, ""
    with ledger(given.folder / f"ledger-{number}") as seen:
        more = ["--ranks", str(ranks), "--restarts", str(2 * most)]  # one that comes to nothing is told by the time
        running = Fresh().start(command(runs, f"run-{number}", *more), given.folder / f"run-{number}.log")
        known: set[str] = set()
        while times < most and not wrong:
            if not wait_for(lambda known=known: len(pids_of(seen, known)) == ranks, running):
                break
            time.sleep(given.draw.uniform(0, 1.2))
            victim = given.draw.randrange(ranks)
            pids, known = pids_of(seen, known), {file.name for file in seen.glob("rank-*")}
            at = time.time()
            how(pids[victim])
            try:
                took = goes_on(seen, running, at, allowed)
            except AssertionError as err:
                wrong = f"strike {times + 1}, rank {victim}: {err}"
                break
            if took is None:
                break
            times, slowest = times + 1, max(slowest, took)
            if f"Rank {victim} " not in running.log.read_text(errors="replace"):
                wrong = f"rank {victim} was not named: {running.text()}"
        with row.trial(f"run {number}, {times} times", max(times, 1)):
            assert not wrong, wrong
            assert running.ended(_MOST) == 0, running.text()
            Ended.of(runs / f"run-{number}").same_as(whole("--ranks", str(ranks)))
            ranked.each_once(seen, int(ranked.task.recipe["train.steps"]))
            assert not residue(runs / f"run-{number}")
            assert "went into steps that count" in running.text()
            no_orphans(running.pid)
        _send(signal.SIGKILL, session_of(running.pid))
    row.notes["processors for each process that wants one"] = round(
        (os.cpu_count() or 1) / max(1.0, os.getloadavg()[1]), 2
    )
    row.notes["slowest, s"] = round(max(row.notes.get("slowest, s", 0.0), slowest), 1)
    row.count("runs")


def _many(row: Row, given: Given, how: Callable[[int], None], allowed: float) -> None:
    number = 0
    while row.n < given.times:
        struck(row, given, number, min(_CHAIN, given.times - row.n), how, allowed)
        number += 1


@fault("SIGKILL, one of four ranks, started again by torchrun's agent", times=20, quick=1)
def killed(row: Row, given: Given) -> None:
    """The others notice at once; the next group goes on with the bits of a run that nobody killed."""
    _many(row, given, lambda pid: os.kill(pid, signal.SIGKILL), BAR)


@fault("SIGSTOP, one of four ranks", times=8, quick=1)
def hung(row: Row, given: Given) -> None:
    """After ``--ranks-timeout`` it is named and ended, and the same."""
    _many(row, given, lambda pid: os.kill(pid, signal.SIGSTOP), TIMEOUT + BAR)


@fault("two groups of ranks in one folder", times=3, quick=1)
def two(row: Row, given: Given) -> None:
    """The second is refused, though all ranks of the first are stopped; they, or others for them, end with the same bits."""
    for number in range(given.times):
        with row.trial(f"try {number}"), ledger(given.folder / f"ledger-{number}") as seen:
            arguments = command(given.folder, f"run-{number}", "--ranks", "2", "--restarts", "1")
            first = Fresh().start(arguments, given.folder / f"first-{number}.log")
            assert wait_for(lambda seen=seen: len(pids_of(seen, set())) == 2, first), first.text()
            ranks = pids_of(seen, set()).values()
            _send(signal.SIGSTOP, ranks)
            try:
                second = Fresh().start([*arguments, "--resume"], given.folder / f"second-{number}.log")
                assert second.ended(_MOST) == 2, second.text()
                assert "Another process is training in" in second.text()
                before = newest(seen)
            finally:
                _send(signal.SIGCONT, ranks)
            assert time.time() - before > 1.0, "the second group made a step"
            assert first.ended(_MOST) == 0, first.text()
            Ended.of(given.folder / f"run-{number}").same_as(whole("--ranks", "2"))
            ranked.each_once(seen, int(ranked.task.recipe["train.steps"]))


# --- nodes ------------------------------------------------------------------------------------------------------------

NODES = {"a": "10.203.7.1", "b": "10.203.7.2"}


def sh(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skip(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


class Nodes:
    """Two network namespaces with a wire between them."""

    def __init__(self) -> None:
        needs_root("making network namespaces")
        if shutil.which("ip") is None:
            raise Skip("the command ip is not there")
        self.names = {node: f"tw{os.getpid() % 100000}{node}" for node in NODES}
        self.close()
        for name in self.names.values():
            sh("ip", "netns", "add", name)
        sh("ip", "link", "add", self.names["a"], "type", "veth", "peer", "name", self.names["b"])
        for node, name in self.names.items():
            sh("ip", "link", "set", name, "netns", name)
            self.within(node, "ip", "addr", "add", f"{NODES[node]}/24", "dev", name)
            self.within(node, "ip", "link", "set", name, "up")
            self.within(node, "ip", "link", "set", "lo", "up")

    def within(self, node: str, *words: str) -> None:
        sh("ip", "netns", "exec", self.names[node], *words)

    def cut(self) -> None:
        self.within("b", "ip", "link", "set", self.names["b"], "down")

    def heal(self) -> None:
        self.within("b", "ip", "link", "set", self.names["b"], "up")

    def close(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def start(self, node: str, port: int, runs: Path, log: Path) -> Running:
        """torchrun with two ranks on a node."""
        words = [
            "ip", "netns", "exec", self.names[node], sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "9", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"{NODES['a']}:{port}", "--rdzv-id", "nodes", "--local-addr", NODES[node],
            "--rdzv-conf", f"is_host={int(node == 'a')},last_call_timeout=3,keep_alive_interval=1,read_timeout=10,join_timeout=60",
            "-m", "thalweg", *command(runs, "run", "--set", "exact_reduce=true", "--set", "train.steps=150"),
        ]  # fmt: skip
        env = {**environment(), "GLOO_SOCKET_IFNAME": self.names[node], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(log, "ab") as out:
            process = subprocess.Popen(words, stdout=out, stderr=out, env=env, start_new_session=True)

        def wait(seconds: float) -> int | None:
            try:
                return process.wait(seconds) if seconds else process.poll()
            except subprocess.TimeoutExpired:
                return None

        return Running(process.pid, wait, log)


def parted(row: Row, given: Given, number: int, nodes: Nodes) -> None:
    """Two nodes are parted; the one that has the rendezvous goes on alone; the other joins again when the wire is whole."""
    folder = given.folder / f"nodes-{number}"
    folder.mkdir()
    port, started = free_port(), []
    with row.trial(f"try {number}"), ledger(folder / "ledger") as seen:
        try:
            a = nodes.start("a", port, folder, folder / "a.log")
            b = nodes.start("b", port, folder, folder / "b.log")
            started += [a, b]
            assert wait_for(lambda: len(pids_of(seen, set())) == 4, a), a.text() + b.text()
            time.sleep(given.draw.uniform(0, 2.0))
            at = time.time()
            nodes.cut()
            took = goes_on(seen, a, at, TIMEOUT + BAR)
            assert took is not None, a.text()
            row.notes["slowest to go on alone, s"] = round(
                max(row.notes.get("slowest to go on alone, s", 0.0), took), 1
            )
            b.send(signal.SIGKILL, group=True)  # as a cluster does with a node that it has given up
            _send(signal.SIGKILL, session_of(b.pid))
            nodes.heal()
            known = {file.name for file in seen.glob("rank-*")}
            b = nodes.start("b", port, folder, folder / "b.log")
            started.append(b)
            assert wait_for(lambda: len(pids_of(seen, known)) == 4, a, 60.0), a.text() + b.text()
            row.count("joined again")
            assert a.ended(_MOST) == 0, a.text()
            assert b.ended(_MOST) == 0, b.text()
            told = a.log.read_text(errors="replace") + (folder / "b.log").read_text(errors="replace")
            assert "Started again by the launcher, on 2 ranks." in told, told[-2000:]
            assert "Started again by the launcher, on 4 ranks." in told, told[-2000:]
            Ended.of(folder / "run").same_as(whole("--set", "exact_reduce=true", "--set", "train.steps=150"))
            ranked.each_once(seen, 150)
        finally:
            for one in started:
                _send(signal.SIGKILL, session_of(one.pid))


@fault("two nodes of two ranks are parted, and one joins again", times=4, quick=1)
def partition(row: Row, given: Given) -> None:
    """Network namespaces; the bits are those of one process, by ``exact_reduce``."""
    nodes = Nodes()
    try:
        for number in range(given.times):
            parted(row, given, number, nodes)
    finally:
        nodes.close()
