"""All families, in the order of docs/faults.md, and a row as a person reads it."""

from __future__ import annotations

import importlib

from tests.faults.core import Row

FAMILIES = (
    "kill",
    "power",
    "powercut",
    "rot",
    "full",
    "signals",
    "poison",
    "owner",
    "workers",
    "hostile",
    "fuzz",
    "order",
    "ranks",
)

for _name in FAMILIES:
    importlib.import_module(f"tests.faults.{_name}")


def printed(row: Row) -> str:
    told = f"skipped: {row.skipped}" if row.skipped else f"{row.passed} of {row.n}"
    notes = "; ".join(f"{name}: {value}" for name, value in sorted(row.notes.items()))
    head = f"{row.family:8} {row.fault:58} {told:12} {row.seconds:7.1f} s"
    return "\n".join(
        [f"{head}  {notes}".rstrip(), *(f"         FAILED {text[:100]} ... {text[-600:]}" for text in row.failures)]
    )
