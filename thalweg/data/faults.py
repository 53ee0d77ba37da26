"""Errors of a data set's own code, said with the place where they came up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from thalweg.core import DataError
from thalweg.data.draws import OwnRandom

_GOING_ON = (
    "Mend the data, or leave this out of it. A run folder keeps the state before this step: --resume goes on from it."
)


@contextmanager
def told_as(asked: str, where: str, remedy: str = _GOING_ON) -> Iterator[None]:
    """What is raised inside becomes a ``DataError``; memory that ran out stays what it is."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as err:
        raise DataError(asked, f"{where}: {spoken(err)}.", remedy) from err


def put_together(collate: Callable[[list[Any]], Any], samples: list[Any], name: int, where: str) -> Any:
    """The batch of these samples.

    Args:
        name: of the stream that the collate function's random numbers come from.
        where: what they are wanted for.

    Raises:
        DataError: from what the collate function raised.
    """
    with (
        told_as(
            "Samples cannot be put together to a batch.",
            where,
            "Give all samples one form, or a collate function of your own, such as that of a DataLoader.",
        ),
        OwnRandom(name),
    ):
        return collate(samples)


def listed(samples: Sequence[int], most: int = 16) -> str:
    """The first of some sample indices, and how many more there are.

    >>> listed([4, 2, 9], most=2)
    '4, 2 and 1 more'
    """
    shown = ", ".join(str(sample) for sample in samples[:most])
    return shown if len(samples) <= most else f"{shown} and {len(samples) - most} more"


def spoken(err: BaseException) -> str:
    """An error in one line.

    >>> spoken(OSError("cut short\\n  at byte 7."))
    'OSError: cut short at byte 7'
    """
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text}"[:300].rstrip(".") if text else type(err).__name__
