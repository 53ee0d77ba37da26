"""The one tree of errors. Each has three parts: what was asked, the numbers, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache


class ThalwegError(Exception):
    """A user's mistake, or a fault of the machine, said so that a person can act on it.

    Args:
        asked: what was asked for, as one sentence.
        numbers: the figures or names that show why it cannot be.
        remedy: what to do instead.

    Attributes:
        in_run: whether it ended a run that had begun, and so is no mistake in what was asked.

    >>> print(RecipeError("batch=96 is not a whole number of micro_batch=36.", "96/36 = 2.67.", "Use micro_batch=32."))
    batch=96 is not a whole number of micro_batch=36.
      96/36 = 2.67.
      Use micro_batch=32.
    """

    in_run = False

    def __init__(self, asked: str, numbers: str, remedy: str) -> None:
        super().__init__(asked, numbers, remedy)
        self.asked, self.numbers, self.remedy = asked, numbers, remedy

    def __str__(self) -> str:
        return "\n  ".join((self.asked, self.numbers, self.remedy))


class RecipeError(ThalwegError, ValueError):
    """A recipe that does not say something possible."""


class TaskError(ThalwegError, ValueError):
    """A task that cannot be found, or is not one."""


class DataError(ThalwegError, ValueError):
    """Data that cannot be trained on."""


class LossError(ThalwegError, ValueError):
    """A loss that is not a finite scalar with a gradient."""


class ModelError(ThalwegError, ValueError):
    """A model whose parameters cannot be trained as asked."""


class RunFolderError(ThalwegError, OSError):
    """A run folder that cannot be used for this run."""


class CheckpointError(ThalwegError, OSError):
    """A checkpoint that is missing or damaged."""


class DeviceError(ThalwegError, RuntimeError):
    """A device or precision that this machine does not have."""


class OutOfMemoryError(ThalwegError, MemoryError):
    """Memory ran out in the middle of a run, and smaller portions did not help."""


class RanksError(ThalwegError, RuntimeError):
    """Ranks that cannot train together, or one that lost the others.

    Attributes:
        told: whether another rank tells it to the user.
        lost: whether others are gone or do not come, so that another try may do better.
    """

    told = False
    lost = False


class MissingExtra(ThalwegError, ImportError):
    """A feature whose optional package is not installed."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, or all of them.

    >>> did_you_mean("cosin", ["cosine", "linear"])
    'Did you mean cosine? Known: cosine, linear.'
    """
    return _nearest(wrong, tuple(sorted(known)))


@lru_cache(maxsize=512)  # a recipe asks for each of its words before it knows whether one is wrong
def _nearest(wrong: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    listed = f"Known: {', '.join(known)}." if known else "None are known."
    return f"Did you mean {near[0]}? {listed}" if near else listed
