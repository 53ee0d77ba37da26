"""Checkpoints of a run: folders of safetensors and JSON with a manifest of digests, verified whenever they are read.

    checkpoints/step-00000120/
        weights.safetensors   parameters and buffers, by the model's own names
        average.safetensors   the same for the weight average, where there is one
        state.safetensors     optimizer slots by parameter name, counters, loss scale
        state.json            data position, schedule position, length of the records, metrics
        manifest.json         sizes and sha256 of all of the above, and of each tensor

Nothing in a checkpoint can execute: safetensors and JSON hold data alone.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from thalweg.checkpoint.damage import Damage, Unreadable, damage_of
from thalweg.checkpoint.manifest import NAME, check_sha256, check_size, manifest_bytes, read_all, read_manifest
from thalweg.checkpoint.place import LocalPlace, Place, open_place
from thalweg.checkpoint.tensors import Entry, check_tensors, copied, joined, read_tensors, write_tensors
from thalweg.core import CheckpointError, human_bytes

_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
STATE = "state.json"
_MOMENT = 0.5  # seconds
_SHARD = "shard-"
_ASIDE = re.compile(r"step-[0-9]{8,}\.damaged(-[0-9]+)?")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    Attributes:
        groups: file stem to tensors by name, such as "weights".
        facts: plain data.
    """

    groups: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]

    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.groups.values() for t in tensors.values())

    def on_host(self) -> Snapshot:
        """A copy in the CPU's memory, which goes on living when the run goes on."""
        return Snapshot(
            {stem: {name: copied(t) for name, t in tensors.items()} for stem, tensors in self.groups.items()},
            dict(self.facts),
        )


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, in one piece, with nothing to be done when it is read."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()


class Store:
    """The checkpoints of one run.

    Args:
        where: a folder, an address such as ``s3://bucket/runs/digits``, or a ``Place``.
        sweep: remove what a killed process left half-written; for the run's owner alone, who holds its lock.
    """

    def __init__(self, where: Path | str | Place, *, sweep: bool = True) -> None:
        self.place: Place = open_place(where, make=sweep) if isinstance(where, (str, Path)) else where
        if sweep:
            self._asking(self.place.sweep)

    @property
    def folder(self) -> Path:
        """The folder on this machine; only for a store that is one."""
        assert isinstance(self.place, LocalPlace)
        return self.place.root

    def path(self, step: int) -> Path:
        return self.folder / self.name(step)

    @staticmethod
    def name(step: int) -> str:
        return f"step-{step:08d}"

    def where(self, step: int) -> str:
        """As a person would write it."""
        return f"{self.place}/{self.name(step)}"

    def size(self, name: str) -> int:
        """Bytes of the files of a folder, of those that are still there."""
        try:
            return sum(self.place.files(name).values())
        except (OSError, Damage):
            return 0

    def set_asides(self) -> list[str]:
        """Names of damaged checkpoints that a run has moved out of its way."""
        return sorted(name for name in self._asking(self.place.folders) if _ASIDE.fullmatch(name))

    def discard(self, name: str) -> None:
        """Remove a checkpoint, or one that was set aside, for good."""
        self._asking(lambda: self.place.remove(name))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first. The name decides, never the clock."""
        found = map(_NAME.fullmatch, self._asking(self.place.folders))
        return sorted(int(match.group(1)) for match in found if match)

    def save(self, step: int, snapshot: Snapshot) -> str:
        """Write a checkpoint; when this returns, it survives a power cut. Returns where it lies.

        Args:
            snapshot: its tensors may lie on any device; those of the CPU are written as they are.

        Raises:
            CheckpointError: if it cannot be written; all earlier checkpoints are as they were.
        """
        name = self.name(step)
        try:
            with self.place.new(name) as folder:
                files: dict[str, Any] = {}
                for stem, tensors in snapshot.groups.items():
                    plain = {key: _plain(t) for key, t in tensors.items()}
                    with folder.file(f"{stem}.safetensors") as write:
                        files[f"{stem}.safetensors"] = write_tensors(write, plain)
                facts = check_size(json.dumps(dict(snapshot.facts), indent=1, sort_keys=True).encode(), STATE)
                with folder.file(STATE) as write:
                    write(facts)
                files[STATE] = {"bytes": len(facts), "sha256": hashlib.sha256(facts).hexdigest()}
                with folder.file(
                    NAME
                ) as write:  # last: in a store without renames, it is what makes the rest a checkpoint
                    write(check_size(manifest_bytes(step, files), NAME))
        except (OSError, ValueError, TypeError, RuntimeError) as err:
            full = getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.place}.",
                f"{err}. Newest kept: {self._newest_name()}.",
                f"Free {human_bytes(snapshot.nbytes())}, then resume." if full else "See to the folder, then resume.",
            ) from None
        return self.where(step)

    def check(self, step: int) -> None:
        """Refuse a step that no checkpoint is of.

        Raises:
            CheckpointError: naming those that are there.
        """
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"There is no checkpoint of step {step}.", f"There are: {have}.", "Name one.")

    def load(self, step: int) -> Snapshot:
        """Read a checkpoint, every byte verified before anything is used.

        Raises:
            CheckpointError: if a file is missing or differs from the manifest; the file is named.
        """
        try:
            return self._read(step)
        except Damage as fault:
            good = [s for s in self.steps() if s != step and not self.fault(s)]
            remedy = f"The newest good one is step {good[-1]}: --resume {good[-1]}." if good else "No other is left."
            raise CheckpointError(f"The checkpoint of step {step} is damaged.", str(fault), remedy) from None

    def fault(self, step: int) -> str:
        """What is wrong with a checkpoint, or an empty text; every byte of it is read."""
        found = self._damage(step)
        return "" if found is None else str(found)

    def damaged(self, step: int) -> str:
        """As ``fault``, but only where it is sure that the checkpoint is none; an empty text otherwise."""
        found = self._damage(step)
        return "" if found is None or isinstance(found, Unreadable) else str(found)

    def _damage(self, step: int) -> Damage | None:
        try:
            self._walk(step, check_tensors, check_sha256)
        except Damage as found:
            return found
        return None

    def newest_good(self) -> tuple[int | None, list[str]]:
        """The newest step whose checkpoint verifies, and the faults of newer ones that were passed over."""
        faults: list[str] = []
        for step in reversed(self.steps()):
            fault = self.fault(step)
            if not fault:
                return step, faults
            faults.append(fault)
        return None, faults

    def load_newest(self) -> tuple[Snapshot | None, dict[int, str]]:
        """The newest checkpoint that verifies, read once, and the faults of newer ones, by step.

        Raises:
            CheckpointError: where one cannot be reached, and may be whole: it is not passed over for an older one.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                return self._read_patiently(step), faults
            except Unreadable as fault:
                older = [s for s in self.steps() if s < step]
                remedy = f" To go on from an older one: --resume {older[-1]}." if older else ""
                raise CheckpointError(
                    f"The checkpoint of step {step} cannot be read now, and may be whole.",
                    str(fault),
                    f"Nothing was changed. See to what is named, and say the same again.{remedy}",
                ) from None
            except Damage as fault:
                faults[step] = str(fault)
        return None, faults

    def _read_patiently(self, step: int) -> Snapshot:
        """Once more after a moment, where the way to the file failed."""
        try:
            return self._read(step)
        except Unreadable:
            time.sleep(_MOMENT)
            return self._read(step)

    def _read(self, step: int) -> Snapshot:
        """
        Raises:
            Damage: for anything but what was written.
        """
        plain: dict[str, bytes] = {}

        def keep(file: Any, row: Mapping[str, Any]) -> None:
            data = read_all(file, row["bytes"])
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise Damage("it does not have the sha256 of its manifest")
            plain[STATE] = data

        read = self._walk(step, read_tensors, keep)
        where = self.where(step)
        groups = _groups(read, where)
        if STATE not in plain or not {"weights", "state"} & set(groups):
            raise Damage(f"{where} names no state.")
        try:
            facts = json.loads(plain[STATE].decode("utf-8"))
        except (ValueError, RecursionError) as err:
            raise Damage(f"{where}/{STATE} cannot be read: {str(err)[:200]}. It was written so.") from None
        if not isinstance(facts, dict):
            raise Damage(f"{where}/{STATE} holds no table. It was written so.")
        return Snapshot(groups, facts)

    def verified_facts(self, step: int, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
        """The plain data of a checkpoint; of its files of tensors, one of ``parts`` is verified.

        Raises:
            Damage: naming the file.
        """
        plain: dict[str, bytes] = {}
        turn = itertools.count()

        def check(file: Any, row: Mapping[str, Any]) -> None:
            if next(turn) % parts == part:
                check_tensors(file, row)

        def keep(file: Any, row: Mapping[str, Any]) -> None:
            check_sha256(file, row)
            plain[STATE] = read_all(file, row["bytes"])

        self._walk(step, check, keep)
        try:
            return dict(json.loads(plain[STATE]))
        except (ValueError, KeyError, TypeError, RecursionError) as err:
            raise Damage(f"{self.place}/{self.name(step)}/{STATE}: {str(err)[:200]}.") from None

    def _walk(self, step: int, tensors: Callable[[Any, Any], Any], other: Callable[[Any, Any], Any]) -> dict[str, Any]:
        """Go through all files of a checkpoint; what ``tensors`` gives, by name.

        Raises:
            Damage: naming the file.
        """
        folder = self.name(step)
        at = NAME
        try:
            found = {}
            for name, row in sorted(read_manifest(self.place, folder, step).items()):
                at = name
                with self.place.open(folder, name) as file:
                    if name.endswith(".safetensors"):
                        found[name] = tensors(file, row)
                    else:
                        other(file, row)
            return found
        except (Damage, OSError, RuntimeError, ValueError, OverflowError, MemoryError) as err:
            raise damage_of(err, f"{self.place}/{folder}/{at}") from None

    def retain(self, *, last: int, every: int, best: list[int], num_best: int | None = None) -> list[int]:
        """Remove what need not be kept: all but the ``last`` newest, multiples of ``every``, and the steps in ``best``.

        Nothing is removed unless the newest checkpoint verifies.

        Args:
            best: steps by their metric, best first; of those that have a checkpoint, the first ``num_best`` are kept.
            num_best: None: all of them.
        """
        steps = self.steps()
        there = [s for s in best if s in steps][:num_best]
        keep = {*steps[-last:], *there, *(s for s in steps if every and s % every == 0)}
        doomed = [s for s in steps if s not in keep]
        if doomed and self.fault(steps[-1]):
            return []
        for step in doomed:
            self.place.remove(self.name(step))
        return doomed

    def set_aside(self, step: int) -> str:
        """Take a damaged checkpoint out of the row, and keep it for a person to look at; its new name."""
        taken = set(self._asking(self.place.folders))
        name = next(n for n in _aside_names(self.name(step)) if n not in taken)
        self._asking(lambda: self.place.rename(self.name(step), name))
        return name

    def remove_after(self, step: int) -> None:
        """Remove checkpoints newer than ``step``: the run goes on from there."""
        for later in self.steps():
            if later > step:
                self._asking(lambda later=later: self.place.remove(self.name(later)))  # type: ignore[misc]

    def _asking(self, question: Callable[[], _T]) -> _T:
        try:
            return question()
        except OSError as err:
            raise CheckpointError(
                f"The checkpoint folder {self.place} cannot be used.",
                f"{err}.",
                "See to its path and its permissions.",
            ) from None

    def _newest_name(self) -> str:
        try:
            steps = self.steps()
        except CheckpointError:
            return "not known"
        return self.name(steps[-1]) if steps else "none"


def _groups(read: Mapping[str, Mapping[Entry, Tensor]], where: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by group and name; those of a run over ranks are put together from their shards."""
    groups: dict[str, dict[str, Tensor]] = {}
    shards: list[tuple[Entry, Tensor]] = []
    for file, tensors in read.items():
        if file.startswith(_SHARD):
            shards += tensors.items()
        else:
            groups[file.removesuffix(".safetensors")] = {entry.name: tensor for entry, tensor in tensors.items()}
    try:
        for name, tensor in joined(shards).items():
            stem, _, rest = name.partition("/")
            groups.setdefault(stem, {})[rest] = tensor
    except (Damage, RuntimeError, ValueError) as fault:
        raise Damage(f"{where}: {str(fault)[:300]}.") from None
    return groups


def _aside_names(name: str) -> Iterator[str]:
    yield f"{name}.damaged"
    number = 2
    while True:
        yield f"{name}.damaged-{number}"
        number += 1
