"""What saving costs a run, and how fast a verified load is against the disk's own reading.

1. What a checkpoint every 100 steps costs a run of pycode (its own recipe), measured in one run that saves more often: the steps
   after a save against their neighbours; and how long each step that saves waits for the copy.
2. A load of 1 GiB, every byte compared with its digest, against a plain read of the same files into memory; the page cache is
   emptied of them before each. Bytes a second of both, in pairs.

    python -m benchmarks.checkpoint [--pairs 8] [--steps 420] [--gib 1]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.keep import keep, summary
from thalweg.checkpoint import Snapshot, Store
from thalweg.recipes import find_task, recipe_for
from thalweg.run import saving, train_task

EVERY = 20  # steps between two saves of the measured run
AROUND = 10  # steps after a save that are held against as many before it and after them


def run(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """(seconds of each step, seconds that each save held the loop)."""
    held: list[float] = []
    real = saving.Saving.save

    def timed(self: Any, must: bool) -> None:
        began = time.perf_counter()
        real(self, must)
        held.append(time.perf_counter() - began)

    saving.Saving.save = timed  # type: ignore[method-assign]
    changes = {"train.steps": steps, "evaluate.every": 0, "checkpoint.every": EVERY, "precision": "bf16"}
    task = find_task("pycode")
    try:
        result = train_task(task, recipe_for(task).override(changes), folder=folder)
    finally:
        saving.Saving.save = real  # type: ignore[method-assign]
    times = [0.0, *(record.seconds for record in result.records)]
    return [b - a for a, b in zip(times, times[1:])], held


def cost_of_saving(steps: int) -> dict[str, Any]:
    """Within one run, because two runs on a shared machine differ by a third: what the steps after a save take beyond their
    neighbours, as a share of 100 steps."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        seconds, held = run(Path(place) / "run", steps)
        size = sum(f.stat().st_size for f in next((Path(place) / "run" / "checkpoints").iterdir()).iterdir())
    shares = []
    for save in range(
        2 * EVERY, steps - EVERY, EVERY
    ):  # index of the first step after it; the first holds checks of its own
        after = sum(seconds[save : save + AROUND])
        others = (sum(seconds[save - AROUND : save]) + sum(seconds[save + AROUND : save + 2 * AROUND])) / 2
        shares.append((after - others) / (100 * others / AROUND))
    return {
        "what": "pycode: a checkpoint every 100 steps, its cost as a share of the run's time",
        "steps": steps,
        "share": summary(shares),
        "step, ms": round(1000 * statistics.median(seconds), 1),
        "held a save, ms": round(1000 * statistics.median(held), 2),
        "bytes": size,
    }


def forget(folder: Path) -> None:
    """Empty the page cache of the files of a folder."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plain_read(folder: Path, buffer: memoryview) -> None:
    """The disk's own reading: large reads into memory that is there already."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        while os.readv(handle, [buffer]):
            pass
        os.close(handle)


def speed_of_loading(pairs: int, gib: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        store = Store(Path(place))
        each = int(gib * (1 << 30) / 4 / 32)
        store.save(1, Snapshot({"weights": {f"p{i}": torch.randn(each) for i in range(32)}, "state": {}}, {"step": 1}))
        folder, size = store.path(1), sum(f.stat().st_size for f in store.path(1).iterdir())
        buffer = memoryview(bytearray(16 << 20))
        ratios, ours, disk = [], [], []
        for pair in range(pairs):
            seconds = {}
            for name in ("load", "read") if pair % 2 else ("read", "load"):
                forget(folder)
                began = time.perf_counter()
                if name == "load":
                    store.load(1)
                else:
                    plain_read(folder, buffer)
                seconds[name] = time.perf_counter() - began
            ratios.append(seconds["read"] / seconds["load"])
            ours.append(size / seconds["load"] / 1e9)
            disk.append(size / seconds["read"] / 1e9)
            print(f"pair {pair}: load {ours[-1]:.2f} GB/s, disk {disk[-1]:.2f} GB/s", flush=True)
    return {
        "what": "verified load over the disk's own reading, cold",
        "bytes": size,
        "speed": summary(ratios),
        "load GB/s": summary(ours),
        "disk GB/s": summary(disk),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--gib", type=float, default=1.0)
    asked = parser.parse_args(arguments)
    rows = [speed_of_loading(asked.pairs, asked.gib), cost_of_saving(asked.steps)]
    for row in rows:
        print(row)
    keep("checkpoint", rows, f"python -m benchmarks checkpoint (pairs {asked.pairs}, steps {asked.steps})")


if __name__ == "__main__":
    main()
