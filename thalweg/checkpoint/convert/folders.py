"""Run folders and checkpoints of ours, read from outside: nothing in them is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from thalweg.checkpoint.convert.weights import Weights
from thalweg.checkpoint.place import LocalPlace
from thalweg.checkpoint.store import Snapshot, Store
from thalweg.core import CheckpointError, Recipe, RunFolderError

CHOICES = {"live": "weights", "average": "average", "best": "best"}


def read_only(folder: Path) -> Store:
    """The store of a run that another process may be saving into: what is half-written there is left alone."""
    return Store(LocalPlace(folder, make=False), sweep=False)


def is_checkpoint(path: Path) -> bool:
    return (path / "manifest.json").is_file() or re.fullmatch(r"step-\d{8,}", path.name) is not None


def is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or (path / "recipe.toml").is_file()


def found(path: Path | str) -> tuple[Store, int | None]:
    """The store that a run folder holds or names, that an address is of, or that a checkpoint lies in, and then its step.

    Raises:
        RunFolderError: for a path that is neither.
    """
    if isinstance(path, str) and "://" in path:
        return Store(path, sweep=False), None
    path = Path(path)
    if (path / "recipe.toml").is_file() and (elsewhere := Recipe.from_file(path / "recipe.toml").checkpoint.store):
        return Store(elsewhere, sweep=False), None
    if path.is_dir() and is_checkpoint(path):
        whole = path.resolve() if not path.is_symlink() else path.absolute()
        step = re.fullmatch(r"step-(\d+)", whole.name)
        store = read_only(whole.parent)
        if step is None or store.path(int(step[1])).name != whole.name:
            raise RunFolderError(
                f"{path} is no checkpoint under its own name.",
                "A checkpoint of ours lies in a folder such as step-00000120.",
                "Give it its name back, or name the run folder.",
            )
        return store, int(step[1])
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (folder.name == "checkpoints"):
            return read_only(folder), None
    if path.is_dir() and is_run(path):
        raise RunFolderError(f"{path} holds no checkpoint.", "Its run has saved none yet.", "Name another run.")
    raise RunFolderError(
        f"{path} is neither a run folder nor a checkpoint.",
        "It holds no checkpoints, and no manifest.json." if path.is_dir() else "There is no such folder.",
        "Name a folder below runs/, or one of its checkpoints/step-... .",
    )


def read_ours(path: Path, *, choice: str | None = None, step: int | None = None) -> Weights:
    """Weights of a run or a checkpoint.

    Args:
        choice: "live", "average" or "best"; None: the average where there is one, as that is what was evaluated.
        step: which checkpoint of a run; None: the newest good one.

    Raises:
        CheckpointError: if there is none, if it is damaged, or has no such weights.
    """
    store, named = found(path)
    told: list[str] = []
    if named is not None and step not in (None, named):
        raise CheckpointError(f"{path} is the checkpoint of step {named}.", f"--step {step} was given.", "Give one.")
    at = named if step is None else step
    if at is None:
        at, faults = store.newest_good()
        told += [f"Passed over a damaged checkpoint: {fault}" for fault in faults]
        if at is None:
            raise CheckpointError(
                f"No checkpoint of {path} is whole.", " ".join(faults) or "There is none.", "Name another run."
            )
    else:
        store.check(at)
    snapshot = store.load(at)
    if choice == "best" and "best" not in snapshot.groups and named is None and step is None:
        at, snapshot = _of_best_step(store, at, snapshot)
        choice = None
    group = _group(snapshot, choice, at)
    told.append(f"Step {at}: {WORDS[group]}.")
    tensors = snapshot.groups[group]
    tied = _tied(snapshot, tensors)
    return Weights(
        tensors=dict(tensors),
        tied=tied,
        kind="a checkpoint of thalweg" if named is not None else "a run folder of thalweg",
        files=(store.path(at) / "manifest.json",) if isinstance(store.place, LocalPlace) else (),
        told=tuple(told),
        step=at,
    )


WORDS = {
    "weights": "the live weights",
    "average": "the weight average",
    "best": "the weights of the best evaluation",
}


def _group(snapshot: Snapshot, choice: str | None, at: int) -> str:
    if choice is None:
        return "average" if "average" in snapshot.groups else "weights"
    if choice not in CHOICES or CHOICES[choice] not in snapshot.groups:
        have = ", ".join(word for word, group in CHOICES.items() if group in snapshot.groups)
        raise CheckpointError(
            f"The checkpoint of step {at} holds no weights called {choice!r}.",
            f"It holds: {have}.",
            "Take one of them.",
        )
    return CHOICES[choice]


def _of_best_step(store: Store, newest: int, snapshot: Snapshot) -> tuple[int, Snapshot]:
    """A run without early stopping keeps no best weights, but the checkpoint of its best step, as it was evaluated."""
    ranked = [int(step) for _, step in snapshot.facts.get("ranking", ())]
    if not ranked or ranked[0] not in store.steps():
        best = f"the best step, {ranked[0]}," if ranked else "a best step"
        raise CheckpointError(
            "The run holds no best weights.",
            f"Step {newest} has none with it, and there is no checkpoint of {best} either.",
            "Take --weights average or --weights live.",
        )
    return ranked[0], snapshot if ranked[0] == newest else store.load(ranked[0])


def _tied(snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of tied parameters, which a checkpoint holds once."""
    tied = snapshot.facts.get("tied", {})
    return {name: kept for name, kept in tied.items() if kept in tensors and name not in tensors}
