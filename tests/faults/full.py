"""A disk that is full: at every operation of a save, and for a part of a run."""

from __future__ import annotations

import errno
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import thalweg
from tests.faults.core import Given, Row, fault, needs_root
from tests.faults.powercut import sh
from tests.faults.runs import Ended
from tests.faults.samples import same, snapshot
from tests.faults.tasks import Noisy, loss, net
from thalweg.checkpoint import Store
from thalweg.core import CheckpointError, Split, StopReason
from thalweg.watch import Memory

TAKING = ("open", "write", "fsync", "mkdir", "rename", "replace")  # what a disk can refuse


@contextmanager
def refusing(below: Path, says: Callable[[str], int]) -> Iterator[None]:
    """Inside, operations below a folder fail with the number that ``says`` gives for their name; 0: they are done.

    A write or an fsync belongs to the folder if its file was opened below it.
    """
    real = {name: getattr(os, name) for name in TAKING}
    handles: dict[int, bool] = {}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **more: Any) -> Any:
            inside = handles.get(first, False) if isinstance(first, int) else below in Path(first).parents
            reads = name == "open" and not rest[0] & (os.O_WRONLY | os.O_RDWR)
            if inside and not reads and (number := says(name)):
                raise OSError(number, os.strerror(number), str(first))
            result = real[name](first, *rest, **more)
            if name == "open":
                handles[result] = inside
            return result

        return call

    for name in TAKING:
        setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


@fault("disk full at every operation of a save (injected)", times=60, quick=30)
def injected(row: Row, given: Given) -> None:
    """Each refused operation in turn, until a save gets through."""
    kinds, number = (errno.ENOSPC, errno.EDQUOT, errno.EIO), 0
    while row.n < given.times:
        root = given.folder / str(number)
        store = Store(root / "checkpoints")
        store.save(1, snapshot(1))
        at, done = 0, False
        while not done and row.n < given.times:
            kind, left = kinds[number % 3], [at]

            def says(name: str, left: list[int] = left, kind: int = kind) -> int:
                left[0] -= 1
                return kind if (left[0] < 0 and name in ("write", "open", "mkdir")) or left[0] == -1 else 0

            with row.trial(f"{errno.errorcode[kind]} from operation {at} on"), refusing(root, says):
                done = _refused(store, kind)
            at += 1
        with row.trial("room again"):
            store.save(2, snapshot(2))
            found, _ = store.load_newest()
            assert found is not None and same(found, snapshot(2))
        number += 1


def _refused(store: Store, kind: int) -> bool:
    """Save where operations fail; whether it got through."""
    try:
        store.save(2, snapshot(2))
    except CheckpointError as err:
        assert os.strerror(kind) in err.numbers and "Newest kept: step-0000000" in err.numbers, err
        assert ("Free " in err.remedy) == (kind != errno.EIO), err
        found, faults = store.load_newest()
        step = 0 if found is None else int(found.facts["step"])
        assert found is not None and same(found, snapshot(step)), f"the last good one is gone: {faults}"
        return False
    return True


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    needs_root("a small tmpfs")
    root = folder / "small"
    root.mkdir(parents=True)
    sh("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root)
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", str(root)], check=False)


def fill(file: Path, leave: int) -> None:
    """A ballast that leaves so many bytes."""
    file.unlink(missing_ok=True)
    facts = os.statvfs(file.parent)
    with open(file, "wb") as ballast:
        for _ in range(max(0, facts.f_bavail * facts.f_frsize - leave) // 4096):
            ballast.write(bytes(4096))


@fault("disk full at every page of a save (tmpfs)", times=60, quick=12)
def tmpfs(row: Row, given: Given) -> None:
    with small_disk(given.folder, "2m") as root:
        store = Store(root / "checkpoints")
        store.save(1, snapshot(1))
        need = snapshot(2).nbytes() + (24 << 10)
        for number in range(given.times):
            leave = need * number // given.times
            fill(root / "ballast", leave)
            with row.trial(f"{leave} bytes left"):
                got_through = _refused(store, errno.ENOSPC)
                assert not got_through or leave > snapshot(2).nbytes() // 2, "the rig made no full disk"
                (root / "ballast").unlink()
                store.save(2, snapshot(2))
                found, _ = store.load_newest()
                assert found is not None and same(found, snapshot(2))
                assert not list(root.rglob("*.tmp")), "left over"
                store.place.remove("step-00000002")


RECIPE = {
    "precision": "fp32",
    "train.steps": 40,
    "train.batch": 8,
    "checkpoint.every": 2,
    "evaluate.every": 10,
    "regularize.average": 0.9,
    "checkpoint.grace": 2.0,
}


@dataclass
class Trouble:
    """Something that begins at a step, and ends some samples after the run has said that it cannot save, or near its end.

    Attributes:
        start: the step.
        begin, end: what makes it, and what undoes it.
        more: samples that are read before it ends.
    """

    start: int
    begin: Callable[[], object]
    end: Callable[[], object]
    more: int
    begun: bool = False
    over: bool = False
    told: bool = False

    def look(self, read: int, sink: Memory) -> None:
        if not self.begun and read >= self.start * RECIPE["train.batch"]:
            self.begun = True
            self.begin()
        elif self.begun and not self.over and "not saved" in [event.name for event in sink.events]:
            self.more -= 1
        if (
            self.begun
            and not self.over
            and (self.more < 0 or read >= (RECIPE["train.steps"] - 2) * RECIPE["train.batch"])
        ):
            self.over, self.told = True, self.more < 0
            self.end()


class Acting(Noisy):
    """Does something when the samples of a step are read.

    Args:
        look: called with the number of samples read so far.
        drawn: whether samples draw from the generators of this process, which a store's package may draw from too.
    """

    def __init__(
        self, acts: dict[int, Callable[[], object]], *, look: Callable[[int], None], drawn: bool = True
    ) -> None:
        super().__init__(seconds=0.001)
        self.acts, self.look, self.drawn, self.read = acts, look, drawn, 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read += 1
        self.look(self.read)
        if act := self.acts.pop(self.read // RECIPE["train.batch"], None):
            act()
        if self.drawn:
            return super().__getitem__(index)
        time.sleep(self.seconds)
        return {"x": torch.full((6,), index / self.num), "y": torch.tensor(index % 3)}


def go(
    folder: Path,
    acts: dict[int, Callable[[], object]] | None = None,
    resume: bool | str = False,
    drawn: bool = True,
    trouble: Trouble | None = None,
    **more: Any,
) -> tuple[Any, Memory]:
    """(result, events) of a run."""
    torch.manual_seed(0)
    sink = Memory()
    look = lambda read: None if trouble is None else trouble.look(read, sink)
    data = Split(train=Acting(acts or {}, look=look, drawn=drawn), test=Noisy(12, shift=7, seconds=0.0))
    result = thalweg.train(net(), loss, data, {**RECIPE, **more}, folder=folder, resume=resume, sinks=[sink])
    return result, sink


@fault("a run whose disk is full for a while (tmpfs, or injected)", times=20, quick=2)
def for_a_while(row: Row, given: Given) -> None:
    """It says so, goes on in memory, saves again when there is room, and ends with the bits of one that had room."""
    go(given.folder / "whole")
    whole = Ended.of(given.folder / "whole")
    for number in range(given.times):
        start, later = given.draw.randrange(4, 26), given.draw.randrange(40)
        with row.trial(f"full from step {start}, {later} samples longer than it is told of"):
            if os.geteuid() == 0:
                with small_disk(given.folder / f"disk-{number}", "2m") as root:
                    ballast = root / "ballast"
                    trouble = Trouble(start, partial(fill, ballast, 0), ballast.unlink, later)
                    went_on(root / "run", trouble, whole)
            else:
                full = [0]
                begin, end = partial(full.__setitem__, 0, errno.ENOSPC), partial(full.__setitem__, 0, 0)
                folder = given.folder / f"run-{number}"
                with refusing(folder, lambda name, full=full: full[0]):
                    went_on(folder, Trouble(start, begin, end, later), whole)


def went_on(folder: Path, trouble: Trouble, whole: Ended, says: tuple[str, ...] = ("No space left",)) -> None:
    """A run with a trouble that passes."""
    result, sink = go(folder, trouble=trouble, **{"checkpoint.failures": 100})
    assert result.reason is StopReason.FINISHED and result.exit_code == 0, (result.reason, trouble)
    failed = [event.text for event in sink.events if event.name == "not saved"]
    if trouble.told:
        assert any(word in text for text in failed for word in says), failed
        assert "saved again" in [event.name for event in sink.events]
    Ended.of(folder).same_as(whole)
    Store(folder / "checkpoints")  # as the next start: what a mount hid in the middle of a save is swept
    assert not list(folder.rglob("*.tmp")), "left over"


@fault("a run whose disk stays full", times=5, quick=1)
def for_good(row: Row, given: Given) -> None:
    """After ``checkpoint.failures`` saves it ends as unsaved, exit code 4, its last checkpoint whole; with room it goes on."""
    go(given.folder / "whole")
    whole = Ended.of(given.folder / "whole")
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        full = [0]
        acts = {given.draw.randrange(6, 20): partial(full.__setitem__, 0, errno.ENOSPC)}
        with row.trial(f"run {number}"):
            with refusing(folder, lambda name, full=full: full[0]), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                result, sink = go(folder, acts, **{"checkpoint.failures": 3, "checkpoint.grace": 0.3})
            assert any("report" in str(one.message) for one in warned), "the report that could not be written"
            assert result.reason is StopReason.UNSAVED and result.exit_code == 4, result.reason
            assert "3 saves in a row may fail" in " ".join(e.text for e in sink.events)
            store = Store(folder / "checkpoints")
            assert store.steps() and not store.fault(store.steps()[-1])
            again, _ = go(folder, resume="auto", **{"checkpoint.failures": 3, "checkpoint.grace": 0.3})
            assert again.exit_code == 0
            Ended.of(folder).same_as(whole)
