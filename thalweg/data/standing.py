"""Where an iterable with a state stands, for all who read it: of such iterables many have one place, which all iterators share."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Protocol

from thalweg.core import DataError
from thalweg.data.draws import OwnRandom
from thalweg.data.faults import spoken, told_as


class Holds(Protocol):
    """A reader that another one takes the iterable from."""

    def hold(self) -> None:
        """Keep where the iterable stands: this reader may want to go on from there."""


class Standing:
    """Who reads an iterable now, and where it stood before anybody did.

    After ``load_state_dict`` an iterable begins from there; without it, ``iter()`` begins anew for some and goes on for
    others. So every reading is begun by a state: a saved one, or that from before the first reading in this process.
    """

    def __init__(self) -> None:
        self._first: Any = None
        self._why_not = ""
        self._is_known = self._is_read = False
        self._reader: weakref.ref[Holds] | None = None

    def is_read_by(self, reader: Holds) -> bool:
        return self._reader is not None and self._reader() is reader

    def take(self, iterable: Any, reader: Holds) -> None:
        """From now on it is this reader's; who had it before keeps its place."""
        before = None if self._reader is None else self._reader()
        if before is not None:
            before.hold()
        self._reader = weakref.ref(reader)
        if not self._is_known:
            self._is_known = True
            self._know(iterable)

    def load(self, iterable: Any, state: Any) -> None:
        self._is_read = True
        with OwnRandom(0):  # whatever it draws, it draws not from the caller
            iterable.load_state_dict(state)

    def begin(self, iterable: Any) -> None:
        """The next iterator begins at the beginning.

        Raises:
            DataError: for a second reading, if where the iterable stood before the first is not known.
        """
        if not self._why_not:
            with told_as(
                "The data does not go back to its beginning.",
                "Given the state from before its first sample",
                "Let load_state_dict() take what state_dict() gives before the first iter(), or take both away.",
            ):
                self.load(iterable, copy.deepcopy(self._first))
        elif self._is_read:
            raise DataError(
                "The data cannot be read from its beginning again.",
                f"Before its first sample, {self._why_not}. It is read for the checks before step 1, then for the run.",
                "Let state_dict() say where the data stands before the first iter() too, or take it away: each iter() is "
                "then to begin anew.",
            )
        self._is_read = True

    def _know(self, iterable: Any) -> None:
        try:
            with OwnRandom(0):
                self._first = copy.deepcopy(iterable.state_dict())
        except MemoryError:
            raise
        except Exception as err:
            self._why_not = f"its state_dict() gave none that can be kept: {spoken(err)}"


_standings: dict[int, Standing] = {}


def standing_of(iterable: Any) -> Standing:
    """The one of this object, whoever asks."""
    found = _standings.get(id(iterable))
    if found is None:
        found = Standing()
        try:
            weakref.finalize(iterable, _standings.pop, id(iterable), None).atexit = False
        except TypeError:  # nobody tells when it is gone, and then its id may be another's
            return found
        _standings[id(iterable)] = found
    return found
