"""A new run that goes on from a checkpoint of another: to cool down late, or to go on for longer. The other stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thalweg.checkpoint import Store, write_file
from thalweg.core import CheckpointError, Decision, Plan, Recipe, RecipeError, RunFolderError, Sink, Task
from thalweg.engine import average_times, run_span
from thalweg.engine.scheduled import BY_STEPS
from thalweg.parallel import join, on_first
from thalweg.run import Result, RunFolder, train_task
from thalweg.run.facts import check_snapshot
from thalweg.schedules import Schedule, first, hold, parse
from thalweg.schedules.language import Piece


def continue_run(
    task: Task,
    source: str | Path,
    folder: str | Path,
    *,
    steps: int,
    then: str | Schedule = "cooldown()",
    at: int | None = None,
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train on from another run's checkpoint, in a folder of its own.

    Up to the checkpoint, every schedule is what it was; from there on the rate follows ``then``, beginning at the value that
    it had, and all else stays at the value that it had.

    Args:
        source: the other run's folder; nothing in it is changed.
        folder: the new one; it must not hold a run.
        steps: how many more, 1 or more.
        then: schedule of the rate over these steps; a share such as "50%" in it is of the whole new run.
        at: the checkpoint's step; None: the newest good one.

    Raises:
        ThalwegError: before anything is written, if there is no such checkpoint, or the schedule does not fit.
    """
    ranks = join()
    recipe = on_first(ranks, lambda: _begun(Path(source), Path(folder), steps, parse(then), at))
    return train_task(task, ranks.from_first(recipe) or Recipe(), folder=folder, resume=True, sinks=sinks)


def _begun(source: Path, folder: Path, steps: int, then: Schedule, at: int | None) -> Recipe:
    """The new run's folder is written, as if it had been trained up to the checkpoint; its recipe."""
    if then.feedback:
        raise RecipeError(
            f"A run cannot go on with '{then}', which listens.",
            "What has been heard belongs to the schedule that the run began with.",
            "Use other pieces, such as cooldown() or hold().",
        )
    if steps < 1:
        raise RecipeError(f"{steps} more steps are none.", "A run that goes on takes 1 or more.", "Give 1 or more.")
    if not (source / "recipe.toml").is_file():
        raise RunFolderError(
            f"There is no run in {source} to go on from.", "It has no recipe.toml.", "Name a folder below runs/."
        )
    if (folder / "recipe.toml").exists():
        raise RunFolderError(
            f"{folder} already holds a run.", "It has a recipe.toml.", "Give the new run a name of its own."
        )
    other = RunFolder(source, own=False)
    plan = other.saved_plan()
    at = _checkpoint(other.store, at)
    snapshot = other.store.load(at)
    check_snapshot(snapshot, other.path)
    best, reached = snapshot.facts["early"][0], snapshot.facts.get("reached")
    snapshot = replace(
        snapshot, facts={**snapshot.facts, "early": [best, 0.0], "reached": None}
    )  # patience begins anew
    applied = int(snapshot.groups["state"]["applied"][0])
    changed = _changed(plan, at, applied, steps, then)
    met = reached is not None and changed.recipe.evaluate.target is not None
    if met:
        changed = replace(
            changed, recipe=replace(changed.recipe, evaluate=replace(changed.recipe.evaluate, target=None))
        )
    reason = f"goes on from {source} at step {at}, where {applied} updates had been applied"
    made = [Decision("train.steps", at + steps, reason)]
    made += [Decision("evaluate.target", None, f"reached by {reached:g}: the run goes on beyond it")] if met else []
    if changed.recipe.checkpoint.store:  # which is the other run's
        here = replace(changed.recipe, checkpoint=replace(changed.recipe.checkpoint, store=""))
        changed = replace(changed, recipe=here)
        made += [Decision("checkpoint.store", "", "the run folder: a store of the other run's holds that run alone")]
    changed = replace(changed, decisions=(*changed.decisions, *made))
    parse(changed.recipe.schedule.lr).values(run_span(changed))
    mine = RunFolder(folder)
    mine.path.mkdir(parents=True, exist_ok=True)
    with open(other.records_file, "rb") as records:
        write_file(mine.records_file, records.read(int(snapshot.facts["records_bytes"])))
    mine.store.save(at, snapshot)
    write_file(mine.plan_file, changed.to_json().encode())
    write_file(mine.recipe_file, changed.recipe.to_toml().encode())
    return Recipe.from_file(mine.recipe_file)


def _checkpoint(store: Store, at: int | None) -> int:
    if at is not None:
        store.check(at)
        return at
    newest, faults = store.newest_good()
    if newest is None:
        raise CheckpointError(
            "The run has no checkpoint to go on from.", " ".join(faults) or "There is none.", "Name another run."
        )
    return newest


def _changed(plan: Plan, at: int, applied: int, steps: int, then: Schedule) -> Plan:
    """The plan of the run that goes on."""
    recipe, old, span = plan.recipe, plan.steps, run_span(plan)
    only = then.pieces[0]
    if len(then.pieces) == 1 and isinstance(only, Piece) and only.length is None:
        then = Schedule((replace(only, length=steps),))  # its last value is that of the last update

    def kept(text: str | None, count: int, after: Schedule) -> str | None:
        """What a schedule was until now, and what follows; in updates, where amounts of data would be others now."""
        if text is None:
            return None
        was = parse(text).in_updates(span) if span.varies else parse(text)
        return str(first(was, count, of=old) >> after if count else after)

    def kept_all(table: Mapping[str, Any]) -> dict[str, Any]:
        return {name: kept(text, applied, hold()) for name, text in table.items()}

    schedule = recipe.schedule
    simple: dict[str, Any] = {
        name: kept(getattr(schedule, name), at if name in BY_STEPS else applied, hold())
        for name in (
            "weight_decay",
            "clip",
            "average",
            "batch",
            "sequence",
            "image_size",
            "dropout",
            "stochastic_depth",
        )
    }
    tables: dict[str, Any] = {name: kept_all(getattr(schedule, name)) for name in ("options", "loss", "penalties")}
    lr = kept(schedule.lr, applied, then)
    assert lr is not None
    groups = {
        pattern: {**group, **({"schedule": kept_all(group["schedule"])} if "schedule" in group else {})}
        for pattern, group in recipe.optimizer.groups.items()
    }
    for pattern, group in groups.items():
        if "lr" in group.get("schedule", {}):
            group["schedule"]["lr"] = kept(recipe.optimizer.groups[pattern]["schedule"]["lr"], applied, then)
    _, start, every = average_times(plan, span)
    thaw = max(row.thaws for row in plan.parameters)  # a share would be another of more steps
    changed = replace(
        recipe,
        train=replace(recipe.train, steps=at + steps),
        schedule=replace(schedule, lr=lr, **simple, **tables),
        optimizer=replace(recipe.optimizer, groups=groups, unfreeze=str(thaw) if thaw else None),
        regularize=replace(recipe.regularize, average_start=str(start), average_every=str(every)),
    )
    return replace(plan, recipe=changed, steps=at + steps)
