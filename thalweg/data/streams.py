"""An iterable, read in its own order: a later step is reached by reading up to it, or through the iterable's own state."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thalweg.core import DataError, FeedState, Tell, human_seconds, seed_for
from thalweg.data.coded import Uncodable, decode, encode
from thalweg.data.draws import OwnRandom, States
from thalweg.data.faults import put_together, spoken, told_as
from thalweg.data.quiet import never, quiet
from thalweg.data.share import WHOLE, Share, micro_batches, shared
from thalweg.data.sources import Stream
from thalweg.data.trees import to_device

_TELL_SECONDS = 5.0
_KNOWN = 2  # states that are kept


class StreamFeed:
    """Windows cut from an iterable."""

    def __init__(
        self,
        source: Stream,
        *,
        batch: int,
        micro_batch: int,
        seed: int,
        keep_last: bool,
        device: torch.device,
        sizes: Sequence[int] | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.source, self.micro_batch, self.seed, self.device = source, micro_batch, seed, device
        self.share = share
        self.cut = Cut(source, batch, seed, keep_last, sizes)
        self.tell: Tell = quiet
        self.stop: Callable[[], bool] = never
        self._position: Position | None = None  # of the newest window
        self._positions: weakref.WeakSet[Position] = weakref.WeakSet()  # others that are still read from
        self._known: dict[int, FeedState] = {}  # by step
        self._told: set[str] = set()

    def epoch_of(self, step: int) -> int:
        return 0

    def samples(self, step: int) -> None:
        """An iterable's samples have no indices."""
        return None

    def windows(self, start: int, stop: int) -> Iterator[list[Any]]:
        if start >= stop:
            return
        position = self._position = self._begin(start)
        self._positions.add(position)
        if not self._read_up_to(position, start):
            self._position = None
            return
        while position.step < stop:
            step, samples = position.step, position.window(self.stop)
            if samples is None:
                return
            self._position = position
            parts = micro_batches(len(samples), self.micro_batch, self.share)
            window = [self.collated(step, at, samples[at : at + self.micro_batch]) for at in parts]
            yield shared(window, len(micro_batches(len(samples), self.micro_batch, WHOLE)), self.share)

    def collated(self, step: int, at: int, samples: list[Any]) -> Any:
        name = seed_for(self.seed, "collate", step, at)
        return to_device(put_together(self.source.collate, samples, name, f"In step {step + 1}"), self.device)

    def state(self, step: int) -> FeedState | None:
        if step in self._known:
            return self._known[step]
        if self._position is None or not self.source.stateful or step == 0:
            return None
        position = next((one for one in [self._position, *self._positions] if one.is_at(step)), None)
        if position is None:
            self._without("its iterable stands within a window, which is not whole, or at another step")
            return None
        try:
            with OwnRandom(0):  # whatever state_dict draws, it draws not from the caller
                return self._keep(step, FeedState(*encode(position.state())))
        except Uncodable as err:
            self._without(f"{err}, which is neither plain data nor a tensor")
        except MemoryError:
            raise
        except Exception as err:
            self._without(f"its state_dict() raised {spoken(err)}")
        return None

    def restore(self, step: int, state: FeedState) -> None:
        if self.source.stateful:
            self._keep(step, state)
        else:
            self._without("the data has no load_state_dict() any more")

    def _keep(self, step: int, state: FeedState) -> FeedState:
        """The newest few: a run that goes back to an earlier step need not begin at the first."""
        self._known[step] = state
        for older in sorted(self._known)[:-_KNOWN]:
            del self._known[older]
        return state

    def _without(self, why: str) -> None:
        """No state, and it is said once what that costs."""
        if why not in self._told:
            self._told.add(why)
            self.tell("data", f"The state of the data is not used: {why}. A resumed run reads up to its step.", {})

    def _begin(self, start: int) -> Position:
        """At the newest state that is known and not beyond ``start``, or at the beginning."""
        position = Position(self.cut)
        at = max((step for step in self._known if step <= start), default=None)
        if at is not None:
            position.go_on(decode(self._known[at].facts, self._known[at].tensors))
        return position

    def _read_up_to(self, position: Position, start: int) -> bool:
        """Whether the position was reached; what lies before it is read and let go."""
        begun = told = time.monotonic()
        most = 0
        while position.step < start:
            if position.window(self.stop) is None or self.stop():
                return False
            now = time.monotonic()
            if now - told >= _TELL_SECONDS:
                most = most or sum(self.cut.size(step) for step in range(start))
                told = now
                text = f"Reading up to step {start} of the stream: {position.passed:,} of {most:,} samples passed."
                self.tell("data", text, {"samples": position.passed, "of": most})
        if told > begun:
            took = time.monotonic() - begun
            text = f"Step {start} of the stream is reached: {position.passed:,} samples in {human_seconds(took)}."
            self.tell("data", text, {"samples": position.passed, "seconds": round(took, 3)})
        return True


@dataclass(frozen=True)
class Cut:
    """How a stream becomes windows."""

    source: Stream
    batch: int
    seed: int
    keep_last: bool
    sizes: Sequence[int] | None

    def size(self, step: int) -> int:
        """Samples in the window of a step."""
        return self.batch if self.sizes is None else self.sizes[min(step, len(self.sizes) - 1)]


class Position:
    """Where a reader of a stream stands: between two windows, in an epoch of which it has seen so many samples.

    Attributes:
        step: what the next window is for.
        passed: samples of all epochs.
    """

    def __init__(self, cut: Cut) -> None:
        # Not the feed, which holds this: loaders that the garbage collector finds in a ring do not end their workers well.
        self.cut = cut
        self.step = self.epoch = self.seen = self.passed = 0
        self.is_whole = True  # between two windows
        self._pass: Pass | None = None  # None: an epoch that has not begun
        self._held: dict[str, Any] | None = None  # where to go on when it is this reader's turn
        self._lost = ""  # why it cannot go on
        self._loaded: dict[str, Any] | None = None

    def is_at(self, step: int) -> bool:
        """Whether the state of this reader is known, and that of this step."""
        is_known = self._held is not None or self.cut.source.standing.is_read_by(self)
        return self.step == step and self.is_whole and is_known

    def state(self) -> dict[str, Any]:
        if self._held is not None:
            return self._held
        return {
            "step": self.step,
            "epoch": self.epoch,
            "seen": self.seen,
            "passed": self.passed,
            "draws": None if self._pass is None else self._pass.own.states(),
            "data": self.cut.source.iterable.state_dict(),
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """From what ``state`` gave, in this process or an earlier one."""
        self.step, self.epoch, self.seen, self.passed = (state[name] for name in ("step", "epoch", "seen", "passed"))
        self._held = state

    def hold(self) -> None:
        if not self.is_whole:
            self._lost = "it was in the middle of a window"
            return
        try:
            with OwnRandom(0):
                self._held = copy.deepcopy(self.state())
        except MemoryError:
            raise
        except Exception as err:
            self._lost = f"its state_dict() gave none that can be kept: {spoken(err)}"
        self._pass = None

    def _take_turn(self) -> None:
        """An iterable with a state has one place: who reads on brings it to where it was for this reader."""
        source = self.cut.source
        if not source.stateful or source.standing.is_read_by(self):
            return
        source.standing.take(source.iterable, self)
        if self._lost:
            raise DataError(
                "The data was read from elsewhere meanwhile, and does not go back to where it was.",
                f"At step {self.step}, {self._lost}.",
                "Mend its state_dict(), or take it away: each iter() is then to begin anew, beside the others.",
            )
        if self._held is None:
            source.standing.begin(source.iterable)
            return
        state, self._held = self._held, None
        with told_as(
            "The data does not take its saved state.",
            f"At step {self.step}",
            "Mend its load_state_dict(), or take it away: the stream is then read up to that step.",
        ):
            source.standing.load(source.iterable, state["data"])
            self._pass, self._loaded = Pass(source, self._name(), state["draws"]), state

    def window(self, stop: Callable[[], bool]) -> list[Any] | None:
        """The samples of the next step; None where someone wants the run to end before they are there.

        Raises:
            DataError: for a stream that breaks off, or holds nothing.
        """
        self.is_whole = False
        self._take_turn()
        window: list[Any] = []
        while True:
            for sample in self._samples():
                window.append(sample)
                self.seen += 1
                self.passed += 1
                if len(window) == self.cut.size(self.step):
                    return self._taken(window)
                # With a state of its own it is read up to a border first: between borders it has none to be saved.
                if not self.cut.source.stateful and stop():
                    return None
            if self._was_at_its_end():
                continue
            seen = self._end_epoch()
            if window and (self.cut.keep_last or seen < self.cut.size(self.step)):
                return self._taken(window)
            window = []

    def _taken(self, window: list[Any]) -> list[Any]:
        self.step += 1
        self.is_whole = True
        return window

    def _samples(self) -> Iterator[Any]:
        """What is left of this epoch's pass."""
        try:
            if self._pass is None:
                self._pass = Pass(self.cut.source, self._name())
            yield from self._pass
        except MemoryError:
            raise
        except Exception:
            where = f"In epoch {self.epoch}, after {self.seen:,} samples of it, for step {self.step + 1}"
            with told_as("The stream broke off.", where):
                raise

    def _was_at_its_end(self) -> bool:
        """Loaded at the border of two epochs, some iterables begin the next one, others give nothing once more."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded["draws"] is not None or self.seen:
            return False
        self._pass = None
        return True

    def _end_epoch(self) -> int:
        if not self.seen:
            raise DataError("The data holds no sample.", "Its iterator ended at once.", "Give at least one sample.")
        seen, self.seen = self.seen, 0
        self.epoch += 1
        self._pass = None
        return seen

    def _name(self) -> int:
        return seed_for(self.cut.seed, "stream", self.epoch)


class Pass:
    """One pass over a stream; what it draws comes from the stream of random numbers called ``name``.

    Args:
        states: where those numbers stand already, for a pass that goes on.
    """

    def __init__(self, source: Stream, name: int, states: States | None = None) -> None:
        self.own = OwnRandom(name)
        with self.own:
            self.samples = iter(source.iterable)
        if states is not None:
            self.own.go_on(states)

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Any:
        with self.own:
            return next(self.samples)


class Visit:
    """A reader that does not come back."""

    def hold(self) -> None:
        """It has no place to keep."""


def read_stream(source: Stream, name: int) -> Iterator[Any]:
    """One pass over a stream, from its beginning."""
    visit = Visit()
    if source.stateful:
        source.standing.take(source.iterable, visit)
        source.standing.begin(source.iterable)
    yield from Pass(source, name)
