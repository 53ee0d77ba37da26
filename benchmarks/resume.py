"""Runs killed with SIGKILL at random instants, during training and saving, then resumed: do they end with the same bits?

Each trial starts the command in a process of its own, kills it at an instant drawn evenly from the uninterrupted run's
training time, resumes it with the same command, and compares every tensor of the last checkpoint and every record.

    python -m benchmarks.resume [--kills 20]
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.keep import keep
from thalweg.core import read_lines

#: Saving takes about half of the time, so that kills fall into saves too.
TASKS = {
    "digits": ["--set", "train.epochs=8", "--set", "checkpoint.every=2", "--set", "precision=fp32"],
    "pycode": [
        *("--set", "train.steps=60", "--set", "train.batch=8", "--set", "train.micro_batch=4"),
        *("--set", "checkpoint.every=2", "--set", "evaluate.every=20", "--set", "data.options.held_out_windows=16"),
        *("--set", "data.options.limit_bytes=1000000", "--set", "precision=bf16"),
    ],
}


def command(task: str, runs: Path, name: str, *more: str) -> list[str]:
    fixed = ["--runs", str(runs), "--name", name, "--quiet"]
    return [sys.executable, "-m", "thalweg.cli.main", "train", task, *TASKS[task], *fixed, *more]


def last_checkpoint(folder: Path) -> dict[str, str]:
    """sha256 of each tensor file of the newest checkpoint, by step and name."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {f"{newest.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in newest.glob("*.safetensors")}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_lines(folder / "records.jsonl") if line["kind"] != "event"]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def trial(task: str, runs: Path, number: int, seconds: float, draw: random.Random) -> dict[str, Any]:
    name = f"killed-{number}"
    folder = runs / name
    with open(runs / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command(task, runs, name), stdout=log, stderr=log)
        while process.poll() is None and not (folder / "records.jsonl").exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        code = process.wait()
        saving = bool(list((folder / "checkpoints").glob(".*.tmp")))
        seen = len(list(read_lines(folder / "records.jsonl")))
        again = subprocess.run(command(task, runs, name, "--resume"), stdout=log, stderr=log, check=False).returncode
    same = again == 0 and last_checkpoint(folder) == last_checkpoint(runs / "whole")
    same = same and records(folder) == records(runs / "whole")
    return {
        "task": task,
        "killed": code == -9,
        "while saving": saving,
        "lines before": seen,
        "resumed": again,
        "same": same,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args(arguments).kills
    draw, rows = random.Random(0), []
    for task in TASKS:
        with tempfile.TemporaryDirectory() as place:
            runs = Path(place)
            subprocess.run(command(task, runs, "whole"), check=True, capture_output=True)
            seconds = max(line["seconds"] for line in read_lines(runs / "whole" / "records.jsonl") if "seconds" in line)
            number, done = 0, []
            while len(done) < kills and number < 3 * kills:
                row = trial(task, runs, number, seconds, draw)
                number += 1
                if row["killed"]:  # else the run was done before the kill: not a trial
                    done.append(row)
                    print(row, flush=True)
        rows.append(
            {
                "task": task,
                "kills": len(done),
                "while a checkpoint was being written": sum(row["while saving"] for row in done),
                "resumed without help": sum(row["resumed"] == 0 for row in done),
                "same bits and records": sum(row["same"] for row in done),
            }
        )
        print(rows[-1])
    print(keep("resume", rows, f"python -m benchmarks.resume --kills {kills}"))


if __name__ == "__main__":
    main()
