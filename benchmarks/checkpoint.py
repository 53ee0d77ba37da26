"""What saving costs a run, and how fast a verified load is against the disk's own reading.

1. The time of a run of pycode (its own recipe) with a checkpoint every 100 steps over the same run without, in pairs, their order
   in turn; and how long each step that saves waits for the copy.
2. A load of 1 GiB, every byte compared with its digest, against a plain read of the same files into memory; the page cache is
   emptied of them before each. Bytes a second of both, in pairs.

    python -m benchmarks.checkpoint [--pairs 6] [--steps 200] [--gib 1]
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


def run(folder: Path, steps: int, every: int) -> tuple[float, list[float]]:
    """(seconds from the first step's end to the last's, seconds that each save held the loop)."""
    held: list[float] = []
    real = saving.Saving.save

    def timed(self: Any, must: bool) -> None:
        began = time.perf_counter()
        real(self, must)
        held.append(time.perf_counter() - began)

    saving.Saving.save = timed  # type: ignore[method-assign]
    changes = {"train.steps": steps, "evaluate.every": 0, "checkpoint.every": every, "precision": "bf16"}
    task = find_task("pycode")
    try:
        result = train_task(task, recipe_for(task).override(changes), folder=folder)
    finally:
        saving.Saving.save = real  # type: ignore[method-assign]
    return result.records[-1].seconds - result.records[9].seconds, held


def cost_of_saving(pairs: int, steps: int) -> dict[str, Any]:
    ratios, held = [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        for pair in range(pairs):
            seconds = {}
            for every in (100, 0) if pair % 2 else (0, 100):
                seconds[every], waits = run(Path(place) / f"{pair}-{every}", steps, every)
                held += waits if every else []
            ratios.append(seconds[100] / seconds[0])
            print(f"pair {pair}: x {ratios[-1]:.4f}", flush=True)
        size = sum(f.stat().st_size for f in next((Path(place) / "0-100" / "checkpoints").iterdir()).iterdir())
    return {
        "what": "pycode, a checkpoint every 100 steps over none",
        "steps": steps,
        "time": summary(ratios),
        "ms held a save": round(1000 * statistics.median(held), 2),
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
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gib", type=float, default=1.0)
    asked = parser.parse_args(arguments)
    rows = [speed_of_loading(asked.pairs + 4, asked.gib), cost_of_saving(asked.pairs, asked.steps)]
    for row in rows:
        print(row)
    keep("checkpoint", rows, f"python -m benchmarks checkpoint (pairs {asked.pairs}, steps {asked.steps})")


if __name__ == "__main__":
    main()
