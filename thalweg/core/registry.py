"""One table of named things for each kind: tasks, rules, schedule shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from thalweg.core.errors import RecipeError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things of one kind; asking for a name that is not there says which are.

    >>> shapes = Registry("schedule shape")
    >>> shapes.add("cosine", 1)
    1
    >>> shapes["cosin"]
    Traceback (most recent call last):
    thalweg.core.errors.RecipeError: There is no schedule shape called 'cosin'.
      1 are registered.
      Did you mean cosine? Known: cosine.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Register ``thing`` under ``name``; a name is given once."""
        if name in self._things:
            raise RecipeError(f"A second {self.kind} wants the name '{name}'.", "Names are given once.", "Rename one.")
        self._things[name] = thing
        return thing

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise RecipeError(
                f"There is no {self.kind} called '{name}'.",
                f"{len(self._things)} are registered.",
                did_you_mean(name, self._things),
            )
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
