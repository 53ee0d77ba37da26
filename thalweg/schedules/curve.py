"""A value over a run, ready to be drawn: what the engine finds out and the report draws."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A value that moves.

    Attributes:
        name: as in a recipe, such as "lr" or "options.b1".
        text: the schedule, as it is written.
        values: one for each update, at least one.
        about: what the values are.
        counted: what they are numbered by: "update" (applied), or "step" (attempted).
        notes: what a reader must know beside.
    """

    name: str
    text: str
    values: tuple[float, ...]
    about: str = ""
    counted: str = "update"
    notes: tuple[str, ...] = ()

    def ends(self) -> list[tuple[str, float, int]]:
        """(word, value, number from 1) of the first, the largest and the last value, and of the least if it is neither end.

        >>> Curve("lr", "", (0.5, 1.0, 1.0, 0.1)).ends()
        [('first', 0.5, 1), ('peak', 1.0, 2), ('last', 0.1, 4)]
        """
        values = self.values
        found = [("first", 0), ("peak", values.index(max(values))), ("last", len(values) - 1)]
        if min(values) < min(values[0], values[-1]):
            found.insert(2, ("least", values.index(min(values))))
        return [(word, values[place], place + 1) for word, place in found]
