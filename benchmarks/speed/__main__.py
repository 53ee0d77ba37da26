"""Steps/s of thalweg, of loops by hand and of other trainers, on five workloads.

    python -m benchmarks.speed [--short] [--workloads W1,W3] [--peers "by hand" "thalweg, auto" ...]

Each runs in a process and an environment of its own. All train the same net on the same batches from the same weights, and the
losses after the first updates say so. Then all wait, and are timed in windows of a second or two, in turns. What is kept are
medians with their 95 % intervals, of steps/s and of the ratio to the loop by hand in the same round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.keep import keep, rows_of
from benchmarks.speed.driver import measure
from benchmarks.speed.environments import ENVIRONMENTS, TORCH
from benchmarks.speed.peers import PEERS
from benchmarks.speed.workloads import WORKLOADS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="fewer rows, fewer and shorter windows: about five minutes"
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--peers", nargs="+", metavar="NAME", choices=PEERS, help="these rows alone; nothing is kept")
    parser.add_argument("--rounds", type=int, help="windows that count (11, short 6)")
    parser.add_argument("--seconds", type=float, default=0.0, help="of a window")
    given = parser.parse_args(arguments)
    rounds = given.rounds or (6 if given.short else 11)
    command = "python -m benchmarks.speed" + (" --short" if given.short else "")
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(folder)
        for name in given.workloads.split(","):
            w = WORKLOADS[name]
            seconds = given.seconds or (w.seconds / 4 if given.short else w.seconds)
            peers = [p for p in PEERS.values() if not given.short or name in p.short.split()]
            if given.peers:
                peers = [PEERS[peer] for peer in given.peers]
            rows = measure(w, peers, Path(folder), rounds=rounds, seconds=seconds)
            print(told(w.title, rows), flush=True)
            if not given.peers:
                print(keep("speed", merged(rows, given.short), command, short=given.short))


def merged(rows: list[dict[str, Any]], short: bool) -> list[dict[str, Any]]:
    """The kept rows of this form, with these in the place of those of the same workload."""
    new = {row["workload"] for row in rows}
    for row in rows:
        row["packages"] = ", ".join(ENVIRONMENTS.get(PEERS[row["peer"]].environment, (TORCH,)))
    joined = [row for row in rows_of("speed", short=short) if row["workload"] not in new] + rows
    return sorted(joined, key=lambda row: list(WORKLOADS).index(row["workload"]))


def told(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"== {title}"]
    for row in sorted(rows, key=lambda row: -row.get("rate", {"median": 0})["median"]):
        if "failed" in row:
            lines.append(f"{row['peer']:30} failed: {row['failed']}")
            continue
        low, middle, high = (row.get("ratio", row["rate"])[key] for key in ("low", "median", "high"))
        lines.append(
            f"{row['peer']:30} {row['rate']['median']:8.1f} steps/s x {middle:.3f} [{low:.3f}, {high:.3f}]"
            f" cpu {row['cpu_ms']:.3f} ms, {row['first']:.1f} s, {row['peak_mb']:.0f} MB, loss {row['loss']:.6f} {row['note']}"
        )
    return "\n".join(lines)


def _write_weights(folder: str) -> None:
    from benchmarks.speed.nets import write_weights

    write_weights(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
