"""Seconds from a bare clone to the first training step of ``make train``, installation included, and of ``thalweg --help``.

python -m benchmarks.newcomer
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.keep import keep

ROOT = Path(__file__).parent.parent


def first_step() -> tuple[float, float]:
    """(seconds to the end of installation, seconds to the first record) from a fresh clone."""
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(ROOT), f"{place}/thalweg"], check=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
        with open(f"{place}/log", "wb") as log:
            make = subprocess.Popen(
                ["make", "train"],
                cwd=f"{place}/thalweg",
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
            stamp, records = Path(place, "thalweg/.venv/run.stamp"), Path(place, "thalweg/runs/pycode/records.jsonl")
            installed = 0.0
            while make.poll() is None:
                if not installed and stamp.exists():
                    installed = time.perf_counter() - start
                if records.exists() and records.stat().st_size:
                    break
                time.sleep(0.05)
            else:
                raise RuntimeError(Path(place, "log").read_text()[-2000:])
            seconds = time.perf_counter() - start
            os.killpg(make.pid, signal.SIGKILL)
            make.wait()
    return installed, seconds


def help_seconds(runs: int = 15) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([str(Path(sys.executable).parent / "thalweg"), "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times


def main(arguments: list[str] | None = None) -> None:
    installed, seconds = first_step()
    rows = [
        {"what": "bare clone to the end of installation", "seconds": round(installed, 1), "bar": None},
        {"what": "bare clone to the first training step", "seconds": round(seconds, 1), "bar": 90},
        {"what": "thalweg --help, median of 15", "seconds": round(statistics.median(help_seconds()), 3), "bar": 0.3},
    ]
    for row in rows:
        print(row)
    print(keep("newcomer", rows, "python -m benchmarks.newcomer"))


if __name__ == "__main__":
    main()
