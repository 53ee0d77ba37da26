"""Numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from thalweg.core.errors import RecipeError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("B", "kB", "MB", "GB", "TB")


def to_bytes(text: str | int, path: str) -> int:
    """Bytes of a size as people write it.

    Args:
        path: what is so large, for the error.

    Raises:
        RecipeError: if it is no size above 0.

    >>> to_bytes("1.5KiB", "memory_budget"), to_bytes("12 GB", "memory_budget"), to_bytes(4096, "memory_budget")
    (1536, 12000000000, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = "" if found is None else found[2].lower()
    for base, units in ((1024, _BINARY), (1000, _DECIMAL)):
        for power, name in enumerate(units):
            if found is not None and unit in (name.lower(), "" if power == 0 else name.lower()):
                size = int(float(found[1]) * base**power)
                if size > 0:
                    return size
    raise RecipeError(
        f"{path}={text!r} is no size in bytes.",
        f"Units are {', '.join(_BINARY)} and {', '.join(_DECIMAL[1:])}.",
        "Write one such as '12GiB'.",
    )


def human_bytes(count: int) -> str:
    """Binary units, three figures.

    >>> human_bytes(1536), human_bytes(3_221_225_472)
    ('1.50 KiB', '3.00 GiB')
    """
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.0f} {unit}" if value >= 100 else f"{value:.2f} {unit}"


def human_seconds(seconds: float) -> str:
    """Minutes and hours where they help.

    >>> human_seconds(7.25), human_seconds(125), human_seconds(7325)
    ('7.2 s', '2 min 05 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_count(count: float) -> str:
    """Thousands and millions.

    >>> human_count(812), human_count(12_340), human_count(3_400_000)
    ('812', '12.3k', '3.4M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return _three_figures(count / size) + unit
    return _three_figures(count)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as plain text, a line for each row.

    >>> columns([("a", "b"), ("long", "")])
    ['a     b', 'long']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]


def _three_figures(value: float) -> str:
    text = f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
