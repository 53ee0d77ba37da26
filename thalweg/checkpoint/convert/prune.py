"""Checkpoints that need not be kept, chosen by step and metric and never by the time of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thalweg.checkpoint.convert.folders import found, is_run
from thalweg.checkpoint.convert.overview import steps_of
from thalweg.checkpoint.damage import Damage
from thalweg.checkpoint.lock import FolderLock
from thalweg.checkpoint.place import LocalPlace
from thalweg.checkpoint.store import Store
from thalweg.core import CheckpointError, RecipeError, RunFolderError


@dataclass(frozen=True)
class Pruned:
    """What went, or would go, and what stays.

    Attributes:
        removed: (name, why).
        kept: (name, why).
        freed: bytes of what went.
    """

    removed: list[tuple[str, str]]
    kept: list[tuple[str, str]]
    freed: int


def prune(
    run: Path,
    *,
    last: int | None = None,
    every: int = 0,
    best: int = 0,
    damaged: bool = False,
    dry: bool = False,
) -> Pruned:
    """Remove checkpoints of a run that no process trains in.

    Args:
        last: newest ones that are kept; None: 1, or all of them where ``damaged`` alone is asked for.
        every: multiples of this step are kept; 0: none.
        best: kept for the best evaluations.
        damaged: remove those that are not whole.
        dry: say it, and remove nothing.

    Raises:
        ThalwegError: before anything is removed: for a run that another process holds, one without a whole checkpoint, and
            one whose newest is damaged, unless damaged ones are to go.
    """
    if last is None and not every and not best and not damaged:
        raise RecipeError(
            "Nothing says which checkpoints to keep.",
            "None of --last, --every, --best and --damaged is given.",
            "For example --last 2 --best 1.",
        )
    for option, value, least in (
        ("--last", 1 if last is None else last, 1),
        ("--every", every, 0),
        ("--best", best, 0),
    ):
        if value < least:
            raise RecipeError(f"{option} {value} is too small.", f"It is a count, from {least}.", "Give such a one.")
    if not is_run(run):
        raise RunFolderError(f"{run} is no run folder.", "It has no checkpoints.", "Name a folder below runs/.")
    store, _ = found(run)
    _check_own(run, store)
    lock = FolderLock(run)
    try:
        lock.acquire()
    except RunFolderError as err:
        raise RunFolderError(
            f"{run} cannot be pruned now.", f"{err.asked} {err.numbers}", "Wait, or stop it."
        ) from None
    try:
        return _pruned(store, last, every, best, damaged, dry)
    finally:
        lock.release()


def _check_own(run: Path, store: Store) -> None:
    """Refuse a place elsewhere that another run keeps its checkpoints in, whatever the recipe of this one says."""
    recipe = run / "recipe.toml"
    if isinstance(store.place, LocalPlace) and store.place.root == run / "checkpoints":
        return
    try:
        with store.place.open("run", "recipe.toml") as file:
            data = bytearray(min(file.size, 1 << 20))
            file.read_into(0, memoryview(data))
        same = data == recipe.read_bytes()
    except (OSError, Damage):
        same = False
    if not same:
        raise RunFolderError(
            f"{store.place} is not known to hold the checkpoints of {run}.",
            "It does not hold this run's recipe.",
            "Name the run that they are of.",
        )


def _pruned(store: Store, last: int | None, every: int, best: int, damaged: bool, dry: bool) -> Pruned:
    steps = steps_of(store)
    faults = {step: store.fault(step) for step in steps}
    sure = {step: store.damaged(step) if faults[step] else "" for step in steps}  # and not only out of reach now
    good = [step for step in steps if not faults[step]]
    if not good:
        raise CheckpointError(
            f"{store.place} is left as it is.", f"None of its {len(steps)} checkpoints is whole.", "Save what you can."
        )
    if faults[steps[-1]] and not damaged:
        raise CheckpointError(
            f"{store.place} is left as it is.",
            f"Its newest is damaged: {faults[steps[-1]]}",
            "Resume the run, which passes over it, or add --damaged.",
        )
    reasons = _reasons(store, good, last, every, best)
    doomed = [(store.name(s), f"damaged: {sure[s]}") for s in steps if sure[s]] if damaged else []
    doomed += [(name, "set aside as damaged") for name in store.set_asides()] if damaged else []
    doomed += [(store.name(s), "not among those to keep") for s in good if s not in reasons]
    if not damaged:
        reasons |= {step: "damaged: only --damaged removes it" for step in steps if faults[step]}
    freed = sum(store.size(name) for name, _ in doomed)
    if not dry:
        for name, _ in doomed:
            store.discard(name)
    return Pruned(doomed, [(store.name(step), why) for step, why in sorted(reasons.items())], freed)


def _reasons(store: Store, good: list[int], last: int | None, every: int, best: int) -> dict[int, str]:
    """Which good checkpoints stay, and why; the newest good one always does."""
    if last is None and not every and not best:
        return dict.fromkeys(good, "whole")
    reasons: dict[int, str] = {}
    if best:
        ranking = [(value, int(step)) for value, step in store.load(good[-1]).facts.get("ranking", ())]
        there = [(value, step) for value, step in ranking if step in good]
        reasons |= {step: f"one of the {best} best: {value:.6g}" for value, step in there[:best]}
    reasons |= {step: f"a multiple of {every}" for step in good if every and step % every == 0}
    return reasons | dict.fromkeys(good[-(last or 1) :], "one of the newest")
