"""The figures of the recipe cards: the final evaluation of each embedded task over several seeds, with time and memory.

Each run is the command of its card, in a process of its own.

    python -m benchmarks.cards [--digits 10] [--pycode 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.keep import keep
from thalweg.core import read_lines


def one(task: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "thalweg.cli.main", "train", task, "--set", f"seed={seed}", "--runs", runs]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        assert status == 0, status
        folder = Path(runs, task)
        last = [line for line in read_lines(folder / "records.jsonl") if line["kind"] == "evaluation"][-1]
        precision = json.loads((folder / "plan.json").read_text())["recipe"]["precision"]
    return {
        "seed": seed,
        **last["metrics"],
        "seconds": round(seconds, 1),
        "peak MiB": usage.ru_maxrss // 1024,
        "precision": precision,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", type=int, default=10)
    parser.add_argument("--pycode", type=int, default=3)
    asked = parser.parse_args(arguments)
    rows = []
    for task, seeds in (("digits", asked.digits), ("pycode", asked.pycode)):
        runs = [one(task, seed) for seed in range(seeds)]
        for key in ("loss", "accuracy", "seconds", "peak MiB"):
            values = [run[key] for run in runs]
            spread = {"min": min(values), "median": statistics.median(values), "max": max(values)}
            rows.append({"task": task, "seeds": seeds, "what": key, **spread})
            print(rows[-1], flush=True)
        rows.append({"task": task, "runs": runs})
    print(keep("cards", rows, "python -m benchmarks.cards"))


if __name__ == "__main__":
    main()
