"""What an earlier process left of a run, and whether the run can go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thalweg.checkpoint import Snapshot, Store
from thalweg.core import CheckpointError, Plan, Recipe, RunFolderError
from thalweg.run.facts import check_snapshot
from thalweg.run.folder import RunFolder, nothing_to_resume
from thalweg.run.result import Resume


@dataclass(frozen=True)
class Earlier:
    """What an earlier process left of the run.

    Attributes:
        plan: by which it goes on; None: the run begins.
        snapshot: from where; None: from the start.
        faults: newer checkpoints that are damaged, by step.
        changes: what differs from the recipe in the folder, a line each.
        news: what else a person should know, a line each.
    """

    plan: Plan | None = None
    snapshot: Snapshot | None = None
    faults: dict[int, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    news: list[str] = field(default_factory=list)


def look(folder: RunFolder, recipe: Recipe, resume: Resume, accept: Sequence[str]) -> Earlier:
    """What there is to go on from.

    Raises:
        ThalwegError: where the run cannot go on, or begin.
    """
    if resume is False or (resume == "auto" and not folder.holds_run()):
        folder.begin(recipe)
        return Earlier()
    if not folder.holds_run():
        raise nothing_to_resume(folder.path)
    plan, changes = folder.plan_for(recipe, accept)
    store, news = _source(folder)
    faults: dict[int, str] = {}
    snapshot: Snapshot | None
    if isinstance(resume, bool) or resume == "auto":
        snapshot, faults = store.load_newest()
    else:
        store.check(int(resume))
        snapshot = store.load(int(resume))
    if snapshot is not None:
        check_snapshot(snapshot, folder.path)
    elif faults:
        raise CheckpointError(
            f"No checkpoint of {folder.path} is whole.", " ".join(faults.values()), "Start a new run with --name."
        )
    elif folder.saved_file.exists():
        raise CheckpointError(
            f"The run in {folder.path} has saved checkpoints, and they are gone.",
            f"There is none in {store.place}.",
            "Bring them back, name where they are with checkpoint.store, or start over with --name.",
        )
    check_end(plan, 0 if snapshot is None or not changes else int(snapshot.facts["step"]))
    if store is not folder.store:  # it is only read: what is damaged there stays
        news += [f"Passed over a damaged checkpoint there: {fault}" for fault in faults.values()]
        faults = {}
    # Without a snapshot it was stopped before its first checkpoint: the run begins again, in the same folder.
    return Earlier(plan, snapshot, faults, changes, news)


def check_end(plan: Plan, at: int) -> None:
    """
    Raises:
        RunFolderError: where a run that goes on from step ``at`` would end before it.
    """
    if at > plan.steps:
        raise RunFolderError(
            f"train.steps={plan.steps} lies behind the checkpoint that the run goes on from.",
            f"It is of step {at}.",
            f"Give {at} or more, or resume from an earlier step.",
        )


def _source(folder: RunFolder) -> tuple[Store, list[str]]:
    """Where the run's checkpoints are: in its store; in the one that it had before, where that is another and this one is empty."""
    before = None if folder.store.steps() else folder.store_before()
    if before is None or not before.steps():
        return folder.store, []
    text = f"There is none in {folder.store.place} yet: going on from one in {before.place}. New ones are saved in the former."
    return before, [text]
