"""The power goes: right after a save was reported, and between any two operations of a process that saves."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import thalweg
from tests.faults.core import Given, Row, fault
from tests.faults.disk import Disk
from tests.faults.samples import same, snapshot
from tests.faults.tasks import Noisy, loss, net
from thalweg.checkpoint import Store
from thalweg.core import Split

_IMAGES = 4  # drawn of each cut


class Cutter:
    """Cuts the power of a disk, and looks at what a reader finds.

    Attributes:
        reported: the newest step that was said to be saved; 0: none.
    """

    def __init__(self, disk: Disk, where: Path, draw: random.Random) -> None:
        self.disk, self.where, self.draw = disk, where, draw
        self.reported = 0
        self.wrong: list[str] = []
        self.cuts = 0

    def cut(self, label: str, images: int = _IMAGES) -> None:
        for _ in range(images):
            self.cuts += 1
            shutil.rmtree(self.where, ignore_errors=True)
            self.disk.image(self.where, self.draw)
            if told := self.look():
                self.wrong.append(f"{label}: {told}")

    def look(self) -> str:
        """What is wrong with an image, or nothing: what was reported, or newer, is there, and all that is there is whole."""
        store = Store(self.where / "checkpoints")
        found, faults = store.load_newest()
        step = 0 if found is None else int(found.facts["step"])
        if step < self.reported:
            return f"step {self.reported} was reported, the newest that loads is {step}; {faults}"
        if found is not None and not same(found, snapshot(step)):
            return f"step {step} holds other values"
        torn = {at: fault for at in store.steps() if (fault := store.fault(at))}
        return f"what stands under its name is not whole: {torn}" if torn else ""


def _cutter(given: Given, name: str) -> Cutter:
    root = given.folder / name
    root.mkdir()
    return Cutter(Disk(root), given.folder / f"{name}-image", given.draw)


@fault("power cut right after a save is reported", times=100, quick=12)
def reported(row: Row, given: Given) -> None:
    cutter = _cutter(given, "reported")
    with cutter.disk.recording():
        store = Store(cutter.disk.root / "checkpoints")
        for number in range(1, given.times + 1):
            with row.trial(f"save {number}"):
                store.save(number, snapshot(number))
                cutter.reported, cutter.wrong = number, []
                cutter.cut("after the save")
                assert not cutter.wrong, cutter.wrong[0]
                store.retain(last=2, every=0, best=[])
                cutter.cut("after the removal of older ones", 1)
                assert not cutter.wrong, cutter.wrong[0]
    row.notes["images"] = cutter.cuts


@fault("power cut between any two operations of saving and pruning", times=900, quick=60)
def between(row: Row, given: Given) -> None:
    cutter = _cutter(given, "between")
    share = min(1.0, given.times / 900)
    with cutter.disk.recording():
        store = Store(cutter.disk.root / "checkpoints")
        step = 0
        while row.n < given.times or step < 6:  # six steps take about 900 operations
            step += 1
            one = step
            for label, act in (
                (f"saving step {one}", lambda: store.save(one, snapshot(one))),  # noqa: B023
                (f"removing beside step {one}", lambda: store.retain(last=2, every=0, best=[])),
                (f"saving step {one} again", lambda: store.save(one, snapshot(one))),  # noqa: B023
            ):
                _at_each(row, cutter, share, label, act)
                cutter.reported = one
            if step % 3 == 0:  # the newest is damaged: put aside, and those after an older one removed
                cutter.reported = one - 1
                _at_each(row, cutter, share, f"setting step {one} aside", lambda: store.set_aside(one))  # noqa: B023
                _at_each(row, cutter, share, f"removing after step {one - 1}", lambda: store.remove_after(one - 1))  # noqa: B023
    row.notes["images"] = cutter.cuts


def _at_each(row: Row, cutter: Cutter, share: float, label: str, act: Callable[[], Any]) -> None:
    """Do something, and cut behind each of its operations, or a share of them."""

    def after(name: str) -> None:
        if cutter.draw.random() > share:
            return
        cutter.wrong = []
        with row.trial(f"{label}, after operation {cutter.disk.count} ({name})"):
            cutter.cut(name)
            assert not cutter.wrong, cutter.wrong[0]

    cutter.disk.after = after
    try:
        act()
    finally:
        cutter.disk.after = lambda name: None


def naive(path: Path, data: bytes, *, sync: bool) -> None:
    """A file written aside and renamed, with or without its own fsync, and never its folder's: what others do."""
    aside = path.with_suffix(".part")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(handle, data)
    if sync:
        os.fsync(handle)
    os.close(handle)
    os.replace(aside, path)


@fault("the rig sees what a write without fsync loses", times=100, quick=12)
def control(row: Row, given: Given) -> None:
    """Passed: at least one of the images of a naive write has lost it."""
    for number in range(given.times):
        for sync in (False, True):
            cutter = _cutter(given, f"naive-{number}-{sync}")
            data = given.draw.randbytes(3 * 4096)
            with row.trial(f"naive write {number}, fsync {sync}"):
                with cutter.disk.recording():
                    naive(cutter.disk.root / "model.pt", data, sync=sync)
                lost = 0
                for _ in range(16):
                    shutil.rmtree(cutter.where, ignore_errors=True)
                    cutter.disk.image(cutter.where, given.draw)
                    file = cutter.where / "model.pt"
                    lost += not file.exists() or file.read_bytes() != data
                assert lost, "a write that nothing made durable was found each time"
            row.count("images", 16)


class _Run(Cutter):
    """Looks at a whole run folder: the records must reach as far as the checkpoint says."""

    def look(self) -> str:
        folder = self.where / "run"
        if not folder.is_dir():
            return f"step {self.reported} was reported, and the run's folder is gone" if self.reported else ""
        found, faults = Store(folder / "checkpoints").load_newest()
        step = 0 if found is None else int(found.facts["step"])
        if step < self.reported:
            return f"step {self.reported} was reported, the newest that loads is {step}; {faults}"
        if found is None:
            return ""
        records, length = folder / "records.jsonl", found.facts["records_bytes"]
        there = records.read_bytes() if records.exists() else b""
        real = (self.disk.root / "run" / "records.jsonl").read_bytes()
        if there[:length] != real[:length] or len(there) < length:
            return f"step {step} counts on {length} bytes of records, and {len(there)} are there"
        return "" if (folder / "recipe.toml").exists() else "the recipe is gone"


RECIPE = {
    "precision": "fp32",
    "train.steps": 16,
    "train.batch": 8,
    "checkpoint.every": 2,
    "evaluate.every": 4,
    "regularize.average": 0.9,
}


def _trained(folder: Path, *, resume: bool = False) -> Any:
    torch.manual_seed(0)
    data = Split(train=Noisy(seconds=0.0), test=Noisy(12, shift=7, seconds=0.0))
    return thalweg.train(net(), loss, data, RECIPE, folder=folder, resume="auto" if resume else False)


@fault("power cut in the middle of a run, then resumed from what is left", times=100, quick=10)
def run(row: Row, given: Given) -> None:
    """Each try is an operation of a run behind which the power goes; some of the images are trained to their end."""
    whole = _bits(_trained(given.folder / "whole"))
    number = 0
    while row.n < given.times:
        root = given.folder / f"cut-{number}"
        root.mkdir()
        cutter = _Run(Disk(root), given.folder / "image", given.draw)
        number += 1
        _recorded(row, given, cutter)
    for number in range(max(2, given.times // 10)):  # what a cut leaves is a run like any other
        root, kept = given.folder / f"again-{number}", given.folder / f"left-{number}"
        root.mkdir()
        disk, at = Disk(root), given.draw.randrange(20, 500)

        def keep(name: str, disk: Disk = disk, at: int = at, kept: Path = kept) -> None:
            if disk.count == at:
                disk.image(kept, given.draw)

        disk.after = keep
        with disk.recording():
            _trained(root / "run")
        with row.trial(f"resumed from the image behind operation {at}"):
            assert _bits(_trained(kept / "run", resume=True)) == whole
        row.count("resumed")


def _recorded(row: Row, given: Given, cutter: _Run) -> None:
    save = Store.save
    share = 0.03 if given.quick else 0.1

    def saved(store: Store, step: int, what: Any) -> str:
        name = save(store, step, what)
        cutter.reported = step
        return name

    def after(name: str) -> None:
        if row.n < given.times and given.draw.random() < share:
            cutter.wrong = []
            with row.trial(f"a run, after operation {cutter.disk.count} ({name}), reported {cutter.reported}"):
                cutter.cut(name, 2)
                assert not cutter.wrong, cutter.wrong[0]

    cutter.disk.after = after
    Store.save = saved  # type: ignore[method-assign]
    try:
        with cutter.disk.recording():
            _trained(cutter.disk.root / "run")
    finally:
        Store.save = save  # type: ignore[method-assign]


def _bits(result: Any) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in result.model.state_dict().items()}
