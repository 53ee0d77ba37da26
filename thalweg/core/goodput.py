"""Which share of a run's wall time went into steps that count, over all its starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.core.units import human_seconds

#: What the time between two steps may go into, beside the steps.
WAITING = "waiting for data"
BESIDE = ("evaluating", "saving", WAITING, "compiling")


@dataclass(frozen=True)
class Goodput:
    """Seconds by purpose; together they are the run's wall time, but for pauses in which nobody wanted it to run.

    Attributes:
        seconds: of "steps" that count, of what stands in ``BESIDE``, of "starting", of steps that were "repeated" because the
            process died after its last checkpoint, and of "restarting": from the last step before to the call after.
        restarts: by a launcher.
        repeated: steps that were made again.
    """

    seconds: dict[str, float]
    restarts: int
    repeated: int

    @property
    def share(self) -> float:
        """From 0 to 1."""
        whole = sum(self.seconds.values())
        return self.seconds["steps"] / whole if whole else 0.0

    def __str__(self) -> str:
        whole = sum(self.seconds.values())
        rest = {name: number for name, number in self.seconds.items() if name != "steps" and number >= 0.005 * whole}
        counts = {"repeated": f" ({self.repeated} steps)", "restarting": f" ({self.restarts} times)"}
        told = [f"{name}{counts.get(name, '')} {human_seconds(number)}" for name, number in rest.items()]
        text = f"{self.share:.1%} of {human_seconds(whole)} went into steps that count"
        return "; ".join([text, ", ".join(told)]) if told else text


def times_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``times.jsonl``; what a power cut left half of is passed over."""
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def goodput(lines: Iterable[Mapping[str, Any]]) -> Goodput:
    """What ``times.jsonl`` of a run folder adds up to.

    Args:
        lines: "start": called and begun (times), step, whether a launcher did it (again), and the last step that the records
            knew of before (made) and at the checkpoint (kept), each with the seconds since its own start; "saved": step and
            what was spent so far; "end": time, step, spent.

    >>> start = {
    ...     "kind": "start",
    ...     "called": 0.0,
    ...     "begun": 2.0,
    ...     "step": 0,
    ...     "again": False,
    ...     "made": [0, 0.0],
    ...     "kept": [0, 0.0],
    ... }
    >>> again = {**start, "called": 16.0, "begun": 18.0, "step": 4, "again": True, "made": [6, 12.0], "kept": [4, 8.0]}
    >>> print(goodput([start, again, {"kind": "end", "time": 22.0, "step": 6, "spent": {"saving": 1.0}}]))
    50.0% of 22.0 s went into steps that count; saving 1.0 s, starting 4.0 s, repeated (2 steps) 4.0 s, restarting (1 times) 2.0 s
    """
    starts: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "start":
            starts.append({**line, "saved": []})
        elif starts and line["kind"] in ("saved", "end"):
            starts[-1]["saved"].append(line)
            starts[-1]["end"] = line if line["kind"] == "end" else None
    seconds = dict.fromkeys(("steps", *BESIDE, "starting", "repeated", "restarting"), 0.0)
    restarts = repeated = 0
    for i, one in enumerate(starts):
        seconds["starting"] += one["begun"] - one["called"]
        later = starts[i + 1 :]
        step, ended = _end(one, later[0] if later else None)
        back = min(later, key=lambda other: other["step"], default=None)
        kept = step if back is None else min(step, max(back["step"], one["step"]))
        until = ended
        if back is not None and kept < step:
            until = one["begun"] + (min(back["kept"][1], ended - one["begun"]) if kept > one["step"] else 0.0)
        spent = _spent(one["saved"], kept)
        for name in BESIDE:
            seconds[name] += spent.get(name, 0.0)
        seconds["steps"] += max(0.0, until - one["begun"] - sum(spent.values()))
        seconds["repeated"] += ended - until
        repeated += step - kept
        if later and later[0]["again"]:
            seconds["restarting"] += max(0.0, later[0]["called"] - ended)
            restarts += 1
    return Goodput(seconds, restarts, repeated)


def _end(one: Mapping[str, Any], following: Mapping[str, Any] | None) -> tuple[int, float]:
    """(last step, when) of a start; of one that was killed, by what its successor found, or by what it said last."""
    if end := one.get("end"):
        return end["step"], end["time"]
    if following is not None and following["made"][0] > one["step"]:
        return following["made"][0], one["begun"] + following["made"][1]
    last = one["saved"][-1] if following is None and one["saved"] else None
    return (one["step"], one["begun"]) if last is None else (last["step"], last["time"])


def _spent(saved: Iterable[Mapping[str, Any]], kept: int) -> dict[str, float]:
    """What had been spent beside the steps up to step ``kept``, as far as it was written down."""
    return next((dict(line["spent"]) for line in reversed(list(saved)) if line["step"] <= kept), {})
