"""Which micro-batches of each window somebody gets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: (which, of how many): of the micro-batches of each window, every ``of how many``-th from number ``which`` on.
Share = tuple[int, int]
WHOLE: Share = (0, 1)


def micro_batches(num: int, micro_batch: int, share: Share) -> range:
    """Where the micro-batches of a share begin, in a window of ``num`` samples.

    >>> [list(micro_batches(10, 4, (rank, 2))) for rank in (0, 1)]
    [[0, 8], [4]]
    """
    which, of = share
    return range(which * micro_batch, num, of * micro_batch)


class Window(list[Any]):
    """A share of a window's micro-batches, which may be none.

    Attributes:
        whole: how many the window has in all.
    """

    def __init__(self, parts: Iterable[Any], whole: int) -> None:
        super().__init__(parts)
        self.whole = whole


def shared(parts: list[Any], whole: int, share: Share) -> list[Any]:
    """The micro-batches of a share, which know how many the window has in all; the window itself where it is not shared."""
    return parts if share == WHOLE else Window(parts, whole)
