"""Where files lie that a task reads and no package holds: in a folder that the recipe names, or the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

#: The environment variable that names a folder for whatever the recipe's own does not hold.
VARIABLE = "THALWEG_DATA"


@dataclass
class DataFolder:
    """The folders in which a task's files are looked for, in order.

    Args:
        named: by the recipe; None: by the environment alone.

    Attributes:
        asked: whether the task asked for a file at all.
        found: the folder that held one.
    """

    named: str | None = None
    asked: bool = False
    found: Path | None = None

    places: list[tuple[Path, str]] = field(init=False)

    def __post_init__(self) -> None:
        there = os.environ.get(VARIABLE)
        words = [(self.named, "data.folder"), (there, VARIABLE)]
        self.places = [(Path(os.path.abspath(Path(name).expanduser())), who) for name, who in words if name]

    def look(self, name: str) -> Path | None:
        """The file called ``name`` in the first folder that holds it."""
        self.asked = True
        for folder, _ in self.places:
            if (folder / name).is_file():
                self.found = folder
                return folder / name
        return None


_FOLDER: ContextVar[DataFolder | None] = ContextVar("the data folder", default=None)


@contextmanager
def reading_from(named: str | None) -> Iterator[DataFolder]:
    """Inside, a task's files are looked for in the folder ``named``, and then in that of the environment."""
    folder = DataFolder(named)
    token = _FOLDER.set(folder)
    try:
        yield folder
    finally:
        _FOLDER.reset(token)


def folder_in_use() -> DataFolder:
    """The folder that data are being made from; outside of a run that of the environment."""
    return _FOLDER.get() or DataFolder()
