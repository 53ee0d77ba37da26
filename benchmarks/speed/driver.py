"""Processes that wait and are timed in turns, so that what drifts on the machine hits all of them alike."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.keep import summary
from benchmarks.speed.environments import ROOT, CannotInstall, ready
from benchmarks.speed.peers import Peer
from benchmarks.speed.workloads import Workload


class Failed(Exception):
    """A process that ended early, with the last line that it left."""


class Process:
    """One peer on one workload."""

    def __init__(self, peer: Peer, w: Workload, weights: Path, seconds: float, python: str) -> None:
        self.peer, self.windows = peer, list[dict[str, float]]()
        self.folder = Path(tempfile.mkdtemp(prefix="speed-"))  # its own, so that no compiler's cache is warm
        self.log = self.folder / "log"
        given = dict(os.environ)
        given |= {"SPEED_BEGUN": str(time.time()), "SPEED_WEIGHTS": str(weights), "PYTHONPATH": str(ROOT)}
        given |= {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache"), "XDG_CACHE_HOME": str(self.folder / "home")}
        given |= dict(peer.settings) | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", "benchmarks.speed.worker", peer.adapter, peer.variant, w.name, str(seconds)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=given,
                cwd=self.folder,
            )

    def hear(self, what: str) -> dict[str, Any]:
        """The next message of a kind."""
        line = self.process.stdout.readline()
        told = json.loads(line) if line else {"what": "nothing"}
        if told.pop("what") != what:
            lines = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise Failed((lines or ["it ended and said nothing"])[-1].strip()[:200])
        return told

    def say(self, word: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; what is heard next says why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()

    def window(self) -> dict[str, float]:
        self.say("go")
        return self.hear("window")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def measure(w: Workload, peers: list[Peer], weights: Path, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row a peer: rates of its windows, the ratio to the first peer's in the same round, the loss that it came to.

    Args:
        rounds: windows that count; one more goes before them.
        seconds: of a window; 0: the workload's own.
    """
    rows: dict[str, dict[str, Any]] = {p.name: {"workload": w.name, "peer": p.name, "kind": p.kind} for p in peers}
    live: list[Process] = []
    try:
        for peer in peers:
            try:
                live.append(_started(w, peer, weights, seconds, rows[peer.name]))
            except (CannotInstall, Failed) as error:
                rows[peer.name]["failed"] = str(error)
        for turn in range(rounds + 1):
            at = turn % max(1, len(live))
            for process in [*live[at:], *live[:at]]:
                try:
                    process.windows.append(process.window())
                except Failed as error:
                    rows[process.peer.name]["failed"] = str(error)
                    live.remove(process)
                    process.end()
        for process in live:
            process.say("stop")
            rows[process.peer.name] |= process.hear("end")
    finally:
        for process in live:
            process.end()
    timed = {process.peer.name: process.windows[1:] for process in live}
    first = timed.get(peers[0].name)
    for name, windows in timed.items():
        rates = [one["updates"] / one["seconds"] for one in windows]
        rows[name]["rates"] = [float(f"{rate:.5g}") for rate in rates]  # by round, so that any two can be compared
        rows[name]["rate"] = summary(rates)
        rows[name]["cpu_ms"] = 1e3 * statistics.median(one["cpu"] / one["updates"] for one in windows)
        if first is not None:
            rows[name]["ratio"] = summary([r * b["seconds"] / b["updates"] for r, b in zip(rates, first)])
    return list(rows.values())


def _started(w: Workload, peer: Peer, weights: Path, seconds: float, row: dict[str, Any]) -> Process:
    """A process that has trained its first updates and waits."""
    python = str(ready(peer.environment)) if peer.environment else sys.executable
    process = Process(peer, w, weights, seconds, python)
    try:
        row |= process.hear("checked")
        process.hear("ready")
    except BaseException:
        process.end()
        raise
    return process
