"""Results are kept with what they rest on: machine, versions, commit, number of pairs, intervals.

A full form is kept in ``results/NAME.json``, a short one in ``results/short/NAME.json``: neither takes the place of the other.
"""

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


def keep(name: str, rows: list[dict[str, Any]], command: str, *, short: bool = False) -> Path:
    """Write the rows of one benchmark to the file of its form."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device, _ = choose("auto")
    tree = {
        "benchmark": name,
        "command": command,
        "form": "short" if short else "full",
        "date": date.today().isoformat(),
        "commit": told.stdout.strip(),
        "machine": {**facts(device), "torch": torch.__version__, "platform": platform.platform()},
        "rows": rows,
    }
    path = _path(name, short)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n")
    if short and (full := kept(name)) is not None:
        later = shown(name) != full
        told_as = "this short form, which is newer" if later else "the full form"
        print(f"{name}: a full form of {full['date']} is kept as well; tables and pictures show {told_as}.")
    return path


def kept(name: str, *, short: bool = False) -> dict[str, Any] | None:
    """What was kept of one form."""
    path = _path(name, short)
    return {"form": "short" if short else "full", **json.loads(path.read_text())} if path.exists() else None


def rows_of(name: str, *, short: bool = False) -> list[dict[str, Any]]:
    """The rows that were kept of one form; none where none were."""
    tree = kept(name, short=short)
    return [] if tree is None else tree["rows"]


def shown(name: str) -> dict[str, Any] | None:
    """What tables and pictures are made from: the form that was measured later; of one day, the full one."""
    forms = [tree for tree in (kept(name), kept(name, short=True)) if tree is not None]
    return max(forms, key=lambda tree: tree["date"], default=None)


def where(tree: dict[str, Any]) -> str:
    """On what machine, and when, in a few words."""
    machine = tree["machine"]
    chip = machine.get("name") or machine.get("chip") or machine.get("device", "")
    return f"{chip}, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}, {tree['date']}"


def _path(name: str, short: bool) -> Path:
    return (RESULTS / "short" if short else RESULTS) / f"{name}.json"
