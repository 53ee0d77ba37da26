"""Bits that flip, pages that read as zeros, files that end early or are gone: each is named, and the newest good one is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import thalweg
from tests.faults.core import Given, Row, fault
from tests.faults.runs import as_it_lies
from tests.faults.samples import same, snapshot
from tests.faults.tasks import Noisy, loss, net
from thalweg.checkpoint import Store
from thalweg.core import CheckpointError, Split

KINDS = ("one flipped bit", "one page of zeros", "cut short", "missing")
PAGE = 4096
SIZE = 40  # so that files have several pages


def damage(file: Path, kind: str, given: Given) -> tuple[str, ...]:
    """Harm a file; what the error must say besides its name."""
    data = file.read_bytes()
    if kind == "missing":
        file.unlink()
        return ("missing",)
    if kind == "cut short":
        file.write_bytes(data[: given.draw.randrange(len(data))])
        return ()
    if kind == "one flipped bit":
        at = given.draw.randrange(len(data))
        changed = data[:at] + bytes([data[at] ^ 1 << given.draw.randrange(8)]) + data[at + 1 :]
        first = last = at
    else:
        pages = [at for at in range(0, len(data), PAGE) if any(data[at : at + PAGE])]
        first = given.draw.choice(pages)
        last = min(first + PAGE, len(data)) - 1
        changed = data[:first] + bytes(last + 1 - first) + data[last + 1 :]
    file.write_bytes(changed)
    return tensors_at(data, first, last) if file.suffix == ".safetensors" else ()


def tensors_at(data: bytes, first: int, last: int) -> tuple[str, ...]:
    """The one tensor that holds these bytes, quoted; nothing where they reach into the header or over several."""
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    for name, row in table.items():
        begin, end = (start + at for at in row["data_offsets"])
        if begin <= first and last < end:
            return (f"'{name}'",)
    return ()


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Afterwards all files of a folder are what they were."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        yield
    finally:
        for path, data in before.items():
            path.write_bytes(data)


@fault("a flipped bit, a zeroed page, a cut, a missing file", times=1000, quick=80)
def damaged(row: Row, given: Given) -> None:
    store = Store(given.folder / "checkpoints")
    for step in (1, 2, 3):
        store.save(step, snapshot(step, SIZE))
    names = sorted(path.name for path in store.path(3).iterdir())
    for number in range(given.times):
        kind, name = KINDS[number % len(KINDS)], names[number // len(KINDS) % len(names)]
        with row.trial(f"{name}, {kind}"), restored(store.path(3)):
            must = damage(store.path(3) / name, kind, given)
            _refused(store, name, must)
        row.count(kind)
    row.notes["files"] = len(names)


def _refused(store: Store, name: str, must: tuple[str, ...]) -> None:
    for text in (store.fault(3), _told(store)):
        assert text, "silent"
        assert name in text and "step-00000003" in text, f"does not name {name}: {text}"
        assert all(word in text for word in must), f"does not say {must}: {text}"
    found, faults = store.load_newest()
    assert found is not None and same(found, snapshot(2, SIZE)), "the newest good one was not taken"
    assert list(faults) == [3] and name in faults[3]
    assert store.newest_good()[0] == 2
    assert not store.retain(last=1, every=0, best=[]), "an older one was removed beside a damaged one"


def _told(store: Store) -> str:
    try:
        store.load(3)
    except CheckpointError as err:
        assert err.remedy == "The newest good one is step 2: --resume 2."
        return str(err)
    return ""


RECIPE = {"precision": "fp32", "train.steps": 12, "train.batch": 8, "checkpoint.every": 4, "regularize.average": 0.9}


def _go(folder: Path, *, resume: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    data = Split(train=Noisy(seconds=0.0))
    return thalweg.train(net(), loss, data, RECIPE, folder=folder, resume=resume).model.state_dict()


@fault("a run resumed beside a damaged checkpoint", times=40, quick=4)
def resumed(row: Row, given: Given) -> None:
    """It says which it passes over, keeps it for a person, goes on from the one before, and ends with the same bits."""
    whole = _go(given.folder / "whole")
    for number in range(given.times):
        folder = given.folder / f"run-{number}"
        shutil.copytree(given.folder / "whole", folder)
        store = as_it_lies(folder)
        last = store.steps()[-1]
        name = given.draw.choice(sorted(path.name for path in store.path(last).iterdir()))
        kind = KINDS[number % len(KINDS)]
        with row.trial(f"{name}, {kind}"):
            damage(store.path(last) / name, kind, given)
            again = _go(folder, resume=True)
            assert all(torch.equal(again[key], whole[key]) for key in whole), "other bits"
            told = (folder / "records.jsonl").read_text()
            assert "checkpoint passed over" in told and name in told, told[-500:]
            assert (folder / "checkpoints" / f"step-{last:08d}.damaged").is_dir(), "it was not kept"
            assert store.steps()[-1] == last and not store.fault(last)
        shutil.rmtree(folder)
