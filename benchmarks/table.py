"""What is kept of the benchmarks of speed, as a table and a picture: README's section "How fast".

python -m benchmarks.table [--write README.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import keep
from benchmarks.draw import Bar, bars
from benchmarks.keep import shown, summary
from benchmarks.short import PARTS, Row
from benchmarks.speed.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "docs/pictures/speed.svg"
BEGIN = "<!-- How fast: python -m benchmarks.table --write README.md -->"
END = "<!-- The end of how fast. -->"
HAND, EAGER, AUTO = "by hand", "thalweg, eager", "thalweg, auto"
#: Bars: eager over the loop by hand, auto over it, the better of both over the fastest trainer.
BARS = {
    "W1": (1.0, 2.5, 1.2),
    "W2": (1.0, None, 1.05),
    "W3": (1.0, 1.3, 1.05),
    "W4": (1.0, None, 1.05),
    "W5": (1.0, None, 1.05),
}


def interval(value: dict[str, float]) -> str:
    """A median with its interval, in as many figures as it bears.

    >>> interval({"n": 5, "median": 2.4981, "low": 2.412, "high": 2.6})
    '2.50 (2.41 to 2.60)'
    """
    return "{:.2f} ({:.2f} to {:.2f})".format(*(value[key] for key in ("median", "low", "high")))


def speed_table(rows: Sequence[Row]) -> str:
    """A row a peer, a column a workload: its steps/s over those of the loop by hand in the same rounds."""
    by_key = {(row["workload"], row["peer"]): row for row in rows}
    workloads = [w for w in WORKLOADS.values() if (w.name, HAND) in by_key]
    names = list(dict.fromkeys(row["peer"] for row in rows if row["peer"] != HAND))
    order = lambda name: -(by_key.get((workloads[0].name, name), {}).get("ratio") or {"median": 0})["median"]
    hand = [by_key[w.name, HAND] for w in workloads]
    lines = [
        "| steps/s over the loop by hand | " + " | ".join(w.title for w in workloads) + " |",
        "|---|" + "--:|" * len(workloads),
        "| the loop by hand, steps/s | " + " | ".join(f"{row['rate']['median']:,.4g}" for row in hand) + " |",
    ]
    for name in sorted(names, key=order):
        cells = [by_key.get((w.name, name), {}) for w in workloads]
        told = [interval(cell["ratio"]) if "ratio" in cell else "failed" if "failed" in cell else "" for cell in cells]
        if any("ratio" in cell for cell in cells):
            shown = f"**{name}**" if cells[0].get("kind") == "ours" else name
            lines.append(f"| {shown} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """One sentence for each peer and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "failed" in row:
            found.setdefault((row["peer"], row["failed"]), []).append(row["workload"])
    num = len({row["workload"] for row in rows})
    where = lambda names: "" if len(names) == num else f" ({', '.join(WORKLOADS[name].title for name in names)})"
    return [f"{peer} {told.strip().rstrip('.')}{where(names)}." for (peer, told), names in found.items()]


def speed_bars(rows: Sequence[Row]) -> list[Row]:
    """What the bars ask for."""
    lines = []
    for name, w in WORKLOADS.items():
        here = {row["peer"]: row for row in rows if row["workload"] == name and "ratio" in row}
        if not {HAND, EAGER, AUTO} <= here.keys():
            continue
        eager, auto, trainer = BARS[name]
        lines.append(
            {"what": f"{w.title}: eager over the loop by hand", "figure": interval(here[EAGER]["ratio"]), "bar": eager}
        )
        lines.append({"what": "... auto over the loop by hand", "figure": interval(here[AUTO]["ratio"]), "bar": auto})
        trainers = [row for row in here.values() if row["kind"] == "trainer" and not row["peer"].endswith("bare")]
        if trainers:
            best, mine = max(trainers, key=_median), max((here[EAGER], here[AUTO]), key=_median)
            pairs = summary([a / b for a, b in zip(mine["rates"], best["rates"])])
            what = f"... {mine['peer'].removeprefix('thalweg, ')} over the fastest trainer here, {best['peer']}"
            lines.append({"what": what, "figure": interval(pairs), "bar": trainer})
    return lines


def _median(row: Row) -> float:
    return row["rate"]["median"]


def picture(tree: dict[str, Any]) -> str:
    groups = []
    for w in WORKLOADS.values():
        here = [row for row in tree["rows"] if row["workload"] == w.name and "ratio" in row]
        here.sort(key=lambda row: -row["ratio"]["median"])
        drawn = [
            Bar(row["peer"], *(row["ratio"][k] for k in ("median", "low", "high")), tone=row["kind"]) for row in here
        ]
        if drawn:
            groups.append((w.title, drawn))
    return bars(groups, f"Steps/s over those of the loop by hand, {spread(tree)}. {where(tree)}")


def spread(tree: dict[str, Any]) -> str:
    """What the intervals are: of fewer than 6 rounds, order statistics make none of 95 %."""
    least = min((row["ratio"]["n"] for row in tree["rows"] if "ratio" in row), default=0)
    return "medians and 95 % intervals" if least >= 6 else f"medians and whole ranges of {least} rounds"


def where(tree: dict[str, Any]) -> str:
    return f"{keep.where(tree)}, torch {tree['machine']['torch']}, {tree['form']} form."


#: Of the lines below the picture.
SINGLE = (
    "A figure without an interval is that of one run or of few seeds, on a machine that may have had other work: its page "
    "says what it rests on ([characters](docs/characters.md), [images](docs/image-tasks.md), "
    "[tables and text](docs/tables-and-text.md))."
)


def section() -> str:
    """README's section, from what is kept."""
    parts = [
        "## How fast",
        "",
        "What `make bench` measured last, written here by `python -m benchmarks.table --write README.md`",
    ]
    parts[-1] += " ([what it means and how to run it again](docs/how-fast.md))."
    tree = shown("speed")
    if tree is not None:
        parts += [
            f"{where(tree)} Same net, batches, weights and losses; each in a process and an environment of its own, in turns; "
            f"{spread(tree)}."
        ]
        parts += ["", speed_table(tree["rows"]), "", *failures(tree["rows"]), "", f"![The same as bars]({PICTURE})"]
    lines = []
    for part in PARTS:
        other = shown(part.name)
        lines += [] if other is None else part.lines(other)
    if lines:
        parts += ["", "| what | figure | bar |", "|---|---|---|"]
        parts += [
            f"| {line['what']} | {line['figure']} | {'' if line['bar'] is None else line['bar']} |" for line in lines
        ]
        parts += ["", SINGLE]
    return "\n".join(parts)


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FILE", help="put it between the marks of this file, and write the picture")
    given = parser.parse_args(arguments)
    print(section())
    if given.write:
        path = ROOT / given.write
        path.write_text(replaced(path.read_text(), section()))
        tree = shown("speed")
        if tree is not None:
            (ROOT / PICTURE).write_text(picture(tree))


if __name__ == "__main__":
    main()
