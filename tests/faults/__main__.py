"""``python -m tests.faults [FAMILY ...] [--fault TEXT] [--times N] [--quick]``: make faults, print what came of them, keep it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from typing import Any

from benchmarks.keep import RESULTS, keep
from tests.faults.core import FAULTS, Row
from tests.faults.server import close_shared_server
from tests.faults.table import FAMILIES, printed


def merged(rows: list[Row], command: str) -> list[dict[str, Any]]:
    """These rows in the place of the kept ones of the same faults; each says when and how it came to be."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    how = {"command": command, "commit": commit.stdout.strip(), "date": date.today().isoformat()}
    file = RESULTS / "faults.json"
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    by_fault = {(row["family"], row["fault"]): row for row in [*kept, *({**vars(row), **how} for row in rows)]}
    order = [(fault.family, fault.name) for fault in FAULTS]
    return [by_fault[name] for name in order if name in by_fault]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--fault", default="", help="only those whose name has this in it")
    parser.add_argument("--times", type=int, help="how often each fault is made (default: its own number)")
    parser.add_argument("--quick", action="store_true", help="the short form, as in the tests")
    parser.add_argument("--ranks", type=int, default=2, help="processes where more than one is killed (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants and places")
    parser.add_argument("--no-keep", action="store_true", help="do not write benchmarks/results/faults.json")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.families) - set(FAMILIES):
        parser.error(f"{', '.join(sorted(unknown))}: not known; there are {', '.join(FAMILIES)}")
    rows: list[Row] = []
    try:
        for fault in FAULTS:
            if fault.family in (asked.families or FAMILIES) and asked.fault in fault.name:
                row = fault.run(times=asked.times, quick=asked.quick, ranks=asked.ranks, seed=asked.seed)
                rows.append(row)
                print(printed(row), flush=True)
    finally:
        close_shared_server()
    if not asked.no_keep:
        command = " ".join(["python -m tests.faults", *(sys.argv[1:] if arguments is None else arguments)])
        keep("faults", merged(rows, command), command)
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
