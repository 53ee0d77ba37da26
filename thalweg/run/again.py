"""A run whose ranks a launcher has started again: where it is, and whether this group may go on with it."""

from __future__ import annotations

from thalweg.core import RunFolderError
from thalweg.parallel import Left, Ranks, here
from thalweg.run.folder import RunFolder

_LONGEST = 60.0


def patience_of(ranks: Ranks) -> float:
    """Seconds for which the first rank waits for that of the group before to let go of the folder, while the others wait for it."""
    return min(_LONGEST, 0.7 * ranks.timeout) if ranks.world > 1 else _LONGEST


def check_in_sight(folder: RunFolder | None, left: Left) -> None:
    """The first rank may be on another node than before.

    Raises:
        RunFolderError: where it does not see a run that has begun.
    """
    if folder is None or not left.begun or folder.holds_run():
        return
    raise RunFolderError(
        f"The ranks were started again, and the run is not in {folder.path} any more.",
        f"It had begun there, with the first rank on {left.host}; now that is on {here()}, where the folder holds no run.",
        "Keep run folders (--runs) on a disk that all nodes share, or name a store that they share by checkpoint.store.",
    )
