"""Results are kept with what they rest on: machine, versions, commit, number of pairs, intervals."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from thalweg.device import choose, facts

RESULTS = Path(__file__).parent / "results"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, and its 95 % interval from order statistics (binomial; no assumption on the distribution)."""
    ordered = sorted(values)
    half = 1.96 * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half))
    return {"n": len(ordered), "median": statistics.median(ordered), "low": ordered[low], "high": ordered[high]}


def keep(name: str, rows: list[dict[str, Any]], command: str) -> Path:
    """Write the rows of one benchmark to ``results/NAME.json``."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device, _ = choose("auto")
    tree = {
        "benchmark": name,
        "command": command,
        "date": date.today().isoformat(),
        "commit": told.stdout.strip(),
        "machine": {**facts(device), "torch": torch.__version__, "platform": platform.platform()},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(tree, indent=1) + "\n")
    return path
