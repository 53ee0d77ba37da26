"""Tables of numbers and categories as tensors: what is learnt of the training rows is used on all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thalweg.core import RecipeError

Values = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class NumberColumn:
    """Where a value stands among the training values: 0 at the smallest, 1 at the largest; a blank in the middle.

    Attributes:
        knots: training values in ascending order, each once.
        places: of the knots, in [0, 1]; equal values share the middle of their places.
    """

    knots: Values
    places: Values

    @classmethod
    def fit(cls, values: Values, most: float = 1.0) -> NumberColumn:
        """
        Args:
            most: share of the rows that one value may take up of the range, however many have it. Of Adult's people 92 %
                have no capital gain: without a limit the others would be told apart within a twelfth of the range.

        >>> NumberColumn.fit(np.array([1.0, 3.0, 3.0, np.nan, 9.0])).places.tolist()
        [0.0, 0.5, 1.0]
        """
        knots, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        counts = np.minimum(counts, max(1.0, most * counts.sum()))
        ends = np.cumsum(counts)
        middles = ends - (counts + 1) / 2
        last = max(middles[-1] - middles[0], 1) if len(middles) else 1
        return cls(knots, (middles - middles[:1].sum()) / last)

    def __call__(self, values: Values) -> Values:
        found = np.interp(values, self.knots, self.places) if len(self.knots) else np.full(len(values), 0.5)
        return np.where(np.isnan(values), 0.5, found)


@dataclass(frozen=True)
class Columns:
    """Maps rows to tensors: "numbers" (rows, N) float32 in [0, 1], "categories" (rows, C) int64.

    A column of numbers that has blanks in training has a category beside it, which says whether it is blank. Category 0 is
    a value that was not seen in training.

    Attributes:
        blanks: numbers with blanks, by place.
        words: the values of each column of categories.
    """

    numbers: tuple[NumberColumn, ...]
    blanks: tuple[int, ...]
    words: tuple[dict[str, int], ...]

    @classmethod
    def fit(cls, numbers: Values, words: Sequence[Sequence[str]], most: float = 0.02) -> Columns:
        """
        Args:
            numbers: (rows, N), blanks as nan.
            words: for each column of categories, its value in each row.
            most: as for ``NumberColumn.fit``.
        """
        blanks = tuple(int(i) for i in np.flatnonzero(np.isnan(numbers).any(0)))
        known = tuple({word: k for k, word in enumerate(sorted(set(column)), start=1)} for column in words)
        return cls(tuple(NumberColumn.fit(column, most) for column in numbers.T), blanks, known)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each column of categories."""
        return *(2 for _ in self.blanks), *(len(known) + 1 for known in self.words)

    def __call__(self, numbers: Values, words: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        places = np.stack([column(values) for column, values in zip(self.numbers, numbers.T)], 1)
        found = [np.isnan(numbers[:, i]).astype(np.int64) for i in self.blanks]
        for known, column in zip(self.words, words):
            found.append(np.array([known.get(word, 0) for word in column], dtype=np.int64))
        categories = np.stack(found, 1) if found else np.zeros((len(numbers), 0), np.int64)
        return {"numbers": torch.from_numpy(places.astype(np.float32)), "categories": torch.from_numpy(categories)}


def held_out_rows(order: Rows, num_test: int, held_out: str) -> tuple[Rows, Rows]:
    """(training rows, held-out rows) of all, in an order that hangs on nothing.

    Args:
        order: all rows, shuffled; the first ``num_test`` are the test set.
        held_out: "test", or "validation": a fifth of the training rows, and the test set is left alone.

    Raises:
        RecipeError: for another word.
    """
    test, train = order[:num_test], order[num_test:]
    if held_out == "test":
        return train, test
    if held_out != "validation":
        raise RecipeError(
            f"data.options.held_out={held_out!r} is not known.", "2 are.", "Use 'test', or 'validation' to choose by."
        )
    cut = len(train) // 5
    return train[cut:], train[:cut]
