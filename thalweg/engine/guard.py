"""What the host does about bad steps: tells of them, goes back, or ends the run. The device has judged them already."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thalweg.checkpoint import Snapshot
from thalweg.core import Feed, Record, StopReason
from thalweg.engine.diagnose import Finding, diagnose
from thalweg.engine.spikes import JUDGED, NONE, NONFINITE, SPIKE
from thalweg.engine.step import Step
from thalweg.precision import LEAST
from thalweg.regularize.moments import alone

#: Bad steps of a run that are looked into and told one by one; what comes after is in the records alone.
TOLD = 5
_GROUPS = ("rewind-old", "rewind-new")
_MOST_SAMPLES = 256  # of a step, that an event names


@dataclass(frozen=True)
class Bad:
    """A step that was not applied: its record, ``NONFINITE`` or ``SPIKE``, and what it was judged by."""

    record: Record
    kind: int
    judged: Mapping[str, float]


class Tripped(Exception):
    """A step holds up the run: those after it moved nothing, and have been thrown away."""

    def __init__(self, bad: Bad) -> None:
        super().__init__(f"step {bad.record.step}")
        self.bad = bad


class Warden:
    """The guard's part on the host.

    Args:
        tell: passes an event on: name, text, details, step.

    Attributes:
        copies: (step, state) in memory, the older one first; at most two. State.
        rewinds: how often the run has gone back. State.
    """

    def __init__(
        self, step: Step, feed: Feed, tell: Callable[[str, str, dict[str, Any], int], None], guard: Any
    ) -> None:
        self.step, self.feed, self.tell, self.options = step, feed, tell, guard
        self.copies: list[Snapshot] = []
        self.rewinds = 0
        self._told = 0
        self._news: list[Bad] = []

    @property
    def holds_up(self) -> bool:
        """Whether a bad step may hold up the run."""
        return bool({self.options.nonfinite, self.options.spike} & {"rewind", "stop"})

    # ------------------------------------------------------------------ records, as they are read

    def look(self, records: list[Record], rows: Sequence[Sequence[float]]) -> list[Record]:
        """The records that count: those up to the first step that holds up the run."""
        for k, (record, row) in enumerate(zip(records, rows)):
            if kind := self._kind(record, row):
                judged = {} if self.step.state.watch is None else dict(zip(JUDGED, row[-len(JUDGED) :]))
                self._news.append(Bad(record, kind, judged))
                if self._policy(kind) != "skip":
                    return records[: k + 1]
        return records

    def after(self) -> None:
        """The records have gone to the sinks: tell of bad steps among them.

        Raises:
            Tripped: for one that holds up the run.
        """
        news, self._news = self._news, []
        for bad in news:
            if self._policy(bad.kind) != "skip":
                raise Tripped(bad)
            if self._told < TOLD:
                text, detail = self._spoken(bad)
                more = " Later ones stand in the records alone." if self._told == TOLD - 1 else ""
                self.tell("bad step", f"{text} The step is skipped.{more}", detail, bad.record.step)
            self._told += 1

    def in_a_row(self, before: int, record: Record, row: Sequence[float]) -> int:
        """Bad steps in a row, this one included; what only the loss scale has to do with is none, and ends no row."""
        if record.skipped and self._is_overflow(record) and not self._kind(record, row):
            return before
        return before + 1 if record.skipped else 0

    def _kind(self, record: Record, row: Sequence[float]) -> int:
        if self.step.state.watch is not None:
            return int(row[-len(JUDGED)])
        bad = record.skipped and record.weight > 0 and not self._is_overflow(record)
        return NONFINITE if bad else NONE

    def _is_overflow(self, record: Record) -> bool:
        """Whether a smaller loss scale may help: the gradient alone is not finite, in float16."""
        state = self.step.state
        found = state.scale is not None and record.scale > LEAST and math.isfinite(record.loss)
        return found and not math.isfinite(record.grad_norm)

    def _policy(self, kind: int) -> str:
        policy: str = self.options.spike if kind == SPIKE else self.options.nonfinite
        return policy

    # ------------------------------------------------------------------ copies in memory

    def begin(self) -> None:
        """The run begins, or goes on: there is something to go back to from here on."""
        if self.options.rewinding and not self.copies:
            self.copies = [self.step.state.copied()]

    def is_due(self) -> bool:
        """Whether a copy is taken now. By the number of steps alone, so that a resumed run takes the same ones."""
        return bool(self.options.rewinding and self.step.state.step % self.options.every == 0)

    def copy(self) -> None:
        """Keep this moment, and the one before."""
        self.copies = [*self.copies[-1:], self.step.state.copied()]

    def add_to(self, snapshot: Snapshot) -> Snapshot:
        """A checkpoint's snapshot with what the guard keeps, where it keeps anything."""
        snapshot = replace(snapshot, facts={**snapshot.facts, "bad_told": self._told})
        if not self.options.rewinding:
            return snapshot
        groups, steps = dict(snapshot.groups), {}
        for stem, copy in zip(_GROUPS[-len(self.copies) :] if self.copies else (), self.copies):
            whole = self.step.state.put_together(copy.groups)
            groups[stem] = {f"{group}/{name}": t for group, ts in whole.items() for name, t in ts.items()}
            steps[stem] = copy.facts["step"]
        return replace(
            snapshot, groups=groups, facts={**snapshot.facts, "guard": {"rewinds": self.rewinds, "steps": steps}}
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Take over what ``add_to`` has kept."""
        kept = snapshot.facts.get("guard", {"rewinds": 0, "steps": {}})
        self.rewinds = int(kept["rewinds"])
        self._told = int(snapshot.facts.get("bad_told", 0))
        self.copies = []
        for stem in _GROUPS:
            if stem in kept["steps"]:
                groups: dict[str, dict[str, Tensor]] = {}
                for path, tensor in snapshot.groups[stem].items():
                    group, _, name = path.partition("/")
                    groups.setdefault(group, {})[name] = tensor
                self.copies.append(Snapshot(groups, {"step": int(kept["steps"][stem])}))

    # ------------------------------------------------------------------ a step that holds up the run

    def act(self, bad: Bad) -> StopReason | None:
        """Go back and return None, or say how the run ends."""
        state, at, options = self.step.state, bad.record.step, self.options
        state.step = at  # what was attempted after it moved nothing
        text, detail = self._spoken(bad)
        assert state.watch is not None
        state.watch.release()
        if self._policy(bad.kind) == "stop":
            self.tell("stopped by the guard", f"{text} The run ends.", detail, at)
            return StopReason.DIVERGED
        if self.rewinds >= options.rewinds:
            more = f"The run has gone back {self.rewinds} times (guard.rewinds), and ends."
            self.tell("stopped by the guard", f"{text} {more}", detail, at)
            return StopReason.DIVERGED
        copy = self.copies[0]
        since = int(copy.facts["step"])
        state.go_back(copy)
        self.copies, self.rewinds = [copy], self.rewinds + 1
        more = (
            f"Back to the weights of step {since}; the windows of steps {since + 1} to {at} are passed over. "
            f"Rewind {self.rewinds} of {options.rewinds}."
        )
        self.tell("rewound", f"{text} {more}", {**detail, "from": at, "to": since, "rewind": self.rewinds}, at)
        return None

    def _spoken(self, bad: Bad) -> tuple[str, dict[str, Any]]:
        """(sentence, details) of a bad step, looked into where something was not finite."""
        record, at = bad.record, bad.record.step
        detail: dict[str, Any] = {"loss": record.loss, "grad_norm": record.grad_norm}
        if bad.kind == SPIKE:
            text, more = self._spoken_spike(bad)
            found = Finding(_samples(self.feed, at), "", "")
        else:
            what = "gradient" if math.isfinite(record.loss) else "loss"
            text, more = f"Step {at}: the {what} is not finite.", {}
            if self.step.state.fully is not None:
                found = Finding(_samples(self.feed, at), "", _IN_PARTS)
            else:
                with alone():
                    found = diagnose(self.step, self.feed, at)
        if found.samples is not None:
            more |= {"samples": found.samples[:_MOST_SAMPLES], "num_samples": len(found.samples)}
        if found.module:
            more |= {"module": found.module}
        return f"{text} {found}".strip(), {**detail, **more}

    def _spoken_spike(self, bad: Bad) -> tuple[str, dict[str, Any]]:
        record, told = bad.record, bad.judged
        words = [
            f"the {name} is {value:.4g}, where at most {most:.4g} is in line (median {middle:.4g})"
            for name, value, most, middle in (
                ("loss", record.loss, told["loss_limit"], told["loss_middle"]),
                ("gradient norm", record.grad_norm, told["norm_limit"], told["norm_middle"]),
            )
            if value > most
        ]
        detail = {name: told[name] for name in JUDGED[1:]}
        return f"Step {record.step}: a spike: {'; '.join(words)}.", detail


_IN_PARTS = "Parameters lie on ranks in parts, so it was not gone through again to see what was not finite."


def _samples(feed: Feed, at: int) -> list[int] | None:
    try:
        return feed.samples(at - 1)
    except Exception:  # a feed of somebody's own: what is told of a bad step must not end the run
        return None


def _is_finite(tensor: Tensor) -> bool:
    """By numpy, for tensors of the CPU. Torch would start a second team of threads for the thread that saves, and from then on
    the threads of every step would sleep where they waited for one another.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in _EXPONENTS:
        return bool(tensor.isfinite().all())
    bits, ones = _EXPONENTS[tensor.dtype]
    whole = tensor.detach().reshape(-1).view(bits).numpy()
    return all(((part & ones) != ones).all() for part in (whole[i : i + _PART] for i in range(0, len(whole), _PART)))


_PART = 1 << 16
#: Integers of the same width, and the exponent that infinities and NaN have.
_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


def unfit(snapshot: Snapshot, parameters: Collection[str]) -> str:
    """Why a snapshot should not be kept, "" where nothing is against it: the first trainable weight, average or optimizer slot
    that is not finite.

    Args:
        snapshot: of ``State.snapshot``; its tensors may lie anywhere.
        parameters: names of the trained parameters. Buffers and counters are not looked at: they may be infinite by right.
    """
    trained = set(parameters)
    for group in ("weights", "average", "state"):
        for name, tensor in snapshot.groups.get(group, {}).items():
            owner = name.partition("/")[2] if group == "state" else name
            if owner in trained and tensor.is_floating_point() and not _is_finite(tensor):
                count = int((~tensor.isfinite()).sum())
                return f"'{name}' of the {group} has {count} of {tensor.numel()} values that are not finite"
    return ""
