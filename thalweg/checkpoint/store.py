"""Checkpoints of a run: folders of safetensors and JSON with a manifest of digests, verified whenever they are read.

    checkpoints/step-00000120/
        weights.safetensors   parameters and buffers, by the model's own names
        average.safetensors   the same for the weight average, where there is one
        state.safetensors     optimizer slots by parameter name, counters, loss scale
        state.json            data position, schedule position, length of the records, metrics
        manifest.json         sizes and sha256 of all of the above

Nothing in a checkpoint can execute: safetensors and JSON hold data alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thalweg.checkpoint.files import digest, new_folder, remove_folder, sweep
from thalweg.core import CheckpointError, human_bytes

FORMAT = 1
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")


def _manifest(step: int, files: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest; it carries its own digest, so that a flipped bit in it is found too."""
    body = json.dumps({"format": FORMAT, "step": step, "files": files}, sort_keys=True)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(
        {"format": FORMAT, "step": step, "files": files, "sha256": own}, indent=1, sort_keys=True
    ).encode()


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    Attributes:
        groups: file stem to tensors by name, such as "weights".
        facts: plain data.
    """

    groups: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


class Store:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder, lambda name: name.startswith(".step-"))
        except OSError as err:
            raise CheckpointError(
                f"The checkpoint folder {folder} cannot be used.", f"{err}.", "See to its path and its permissions."
            ) from None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first. The name decides, never the clock."""
        try:
            found = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        except OSError as err:
            raise CheckpointError(
                f"The checkpoint folder {self.folder} cannot be read.",
                f"{err}.",
                "See to its path and its permissions.",
            ) from None
        steps = [int(match.group(1)) for match, path in found if match and path.is_dir()]
        return sorted(step for step in steps if self.path(step).is_dir())

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write a checkpoint; when this returns, it survives a power cut.

        Raises:
            CheckpointError: if it cannot be written; all earlier checkpoints are as they were.
        """
        target = self.path(step)
        try:
            with new_folder(target) as aside:
                for stem, tensors in snapshot.groups.items():
                    plain = {name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}
                    save_file(plain, aside / f"{stem}.safetensors")
                (aside / "state.json").write_text(json.dumps(dict(snapshot.facts), indent=1, sort_keys=True))
                files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(aside.iterdir())}
                (aside / "manifest.json").write_bytes(_manifest(step, files))
        except (OSError, SafetensorError) as err:
            full = getattr(err, "errno", None) == errno.ENOSPC or "No space" in str(err)
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder}.",
                f"{err}. Newest kept: {self._newest_name()}.",
                f"Free {human_bytes(self._size(snapshot))}, then resume."
                if full
                else "See to the folder, then resume.",
            ) from None
        return target

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
        fault = self.fault(step)
        if fault:
            good = [s for s in self.steps() if s != step and not self.fault(s)]
            remedy = f"The newest good one is step {good[-1]}: --resume {good[-1]}." if good else "No other is left."
            raise CheckpointError(f"The checkpoint of step {step} is damaged.", fault, remedy)
        folder = self.path(step)
        try:
            groups = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
            facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError("state.json holds no table")
        except (OSError, ValueError, TypeError, KeyError, RecursionError, RuntimeError, SafetensorError) as err:
            raise CheckpointError(
                f"The checkpoint of step {step} cannot be read.",
                f"{folder}: {type(err).__name__}: {str(err)[:200]}. Its digests fit: it was written so.",
                "Resume from another step, or start a new run.",
            ) from None
        return Snapshot(groups, facts)

    def fault(self, step: int) -> str:
        """What is wrong with a checkpoint, or an empty text."""
        folder = self.path(step)
        try:
            return self._fault(folder, step)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            return f"{folder / 'manifest.json'} or a file that it names cannot be read: {str(err)[:200]}."

    @staticmethod
    def _fault(folder: Path, step: int) -> str:
        path = folder / "manifest.json"
        if path.is_symlink() or folder.is_symlink():
            return f"{path} is a link."
        written = path.read_bytes()
        manifest = json.loads(written.decode("utf-8"))
        if manifest["format"] != FORMAT:
            return f"{path} is of format {manifest['format']!r}, this thalweg reads {FORMAT}."
        files = dict(manifest["files"])
        if written != _manifest(step, files):
            return f"{path} is not what was written for step {step}."
        if set(files) != {p.name for p in folder.iterdir()} - {"manifest.json"}:
            return f"{folder} does not hold the files that its manifest names."
        if not {"state.json", "weights.safetensors", "state.safetensors"} & set(files):
            return f"{path} names no state."
        for name, wanted in files.items():
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"{path} is no plain file."
            if path.stat().st_size != wanted["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {wanted['bytes']}."
            if digest(path) != wanted["sha256"]:
                return f"{path} does not have the sha256 of its manifest."
        return ""

    def newest_good(self) -> tuple[int | None, list[str]]:
        """The newest step whose checkpoint verifies, and the faults of newer ones that were passed over."""
        faults: list[str] = []
        for step in reversed(self.steps()):
            fault = self.fault(step)
            if not fault:
                return step, faults
            faults.append(fault)
        return None, faults

    def retain(self, *, last: int, every: int, best: list[int]) -> list[int]:
        """Remove what need not be kept: all but the ``last`` newest, multiples of ``every``, and the steps in ``best``.

        Nothing is removed unless the newest checkpoint verifies.
        """
        steps = self.steps()
        keep = {*steps[-last:], *best, *(s for s in steps if every and s % every == 0)}
        doomed = [s for s in steps if s not in keep]
        if doomed and self.fault(steps[-1]):
            return []
        for step in doomed:
            remove_folder(self.path(step))
        return doomed

    def remove_after(self, step: int) -> None:
        """Remove checkpoints newer than ``step``: the run goes on from there."""
        for later in self.steps():
            if later > step:
                remove_folder(self.path(later))

    def _newest_name(self) -> str:
        try:
            steps = self.steps()
        except CheckpointError:
            return "not known"
        return self.path(steps[-1]).name if steps else "none"

    @staticmethod
    def _size(snapshot: Snapshot) -> int:
        return sum(t.nbytes for tensors in snapshot.groups.values() for t in tensors.values())
