"""The files of a run: recipe, plan, records, checkpoints, report; and which folder is meant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from thalweg.checkpoint import LocalPlace, Store, open_place, write_file
from thalweg.core import Plan, Recipe, RunFolderError, ThalwegError
from thalweg.core.changes import changed_plan, differences, refuse_changes
from thalweg.run.as_planned import as_planned

#: Says that a checkpoint of the run has been saved: without one, a run that goes on begins again.
SAVED = "saved"


class RunFolder:
    """The files of a run.

    Args:
        recipe: of the run that is to be in it; None: the one that is there.
        own: whether this process holds its lock, and may tidy up.
    """

    def __init__(self, path: Path, recipe: Recipe | None = None, *, own: bool = True) -> None:
        self.path, self._own = path, own
        self.recipe_file, self.plan_file = path / "recipe.toml", path / "plan.json"
        self.records_file, self.saved_file = path / "records.jsonl", path / SAVED
        self._next_file = path / "plan.next.json"  # an accepted change, while it is written down
        self._recipe = recipe

    @cached_property
    def store(self) -> Store:
        """Its checkpoints, wherever they lie."""
        recipe = self._recipe
        if recipe is None and self.recipe_file.exists():
            recipe = Recipe.from_file(self.recipe_file)
        place = open_place((recipe.checkpoint.store if recipe else "") or self.path / "checkpoints", make=self._own)
        local = isinstance(place, LocalPlace)
        if local and self._own and self.elsewhere:
            place.claim()
        return Store(place, sweep=self._own and local)

    def store_before(self) -> Store | None:
        """Where the run in the folder had its checkpoints, to read from; None: where it has them now."""
        before = Recipe.from_file(self.recipe_file).checkpoint.store
        if self._recipe is None or before == self._recipe.checkpoint.store:
            return None
        return Store(open_place(before or self.path / "checkpoints", make=False), sweep=False)

    @property
    def elsewhere(self) -> bool:
        """Whether the recipe names another place for its checkpoints than this folder."""
        return self._recipe is not None and bool(self._recipe.checkpoint.store)

    def release(self) -> None:
        """This process is done here."""
        if self.elsewhere and "store" in vars(self):
            self.store.place.release()

    def holds_run(self) -> bool:
        """Whether a run has begun here; one whose folder is lost, and whose checkpoints lie elsewhere, is fetched first."""
        if not self.recipe_file.exists() and self.elsewhere:
            self._fetch()
        return self.recipe_file.exists()

    def begin(self, recipe: Recipe) -> None:
        """Claim the folder for a new run.

        Raises:
            RunFolderError: if it already holds one.
        """
        if self.holds_run():
            refuse_changes(self.path, differences(recipe, Recipe.from_file(self.recipe_file)), ())
            raise RunFolderError(
                f"{self.path} already holds this run.",
                f"Newest checkpoint: {self.store.steps()[-1] if self.store.steps() else 'none'}.",
                "Go on with --resume, or start another with --name.",
            )
        if self.elsewhere and self.store.steps():
            raise RunFolderError(
                f"{self.store.place} already holds checkpoints, and not of this run.",
                f"Steps: {', '.join(map(str, self.store.steps()[-4:]))}.",
                "Give each run a checkpoint.store of its own.",
            )

    def write(self, plan: Plan, recipe: Recipe) -> None:
        """Say what the run is. With the recipe, the folder holds a run; a change of both holds once the recipe is there.

        Raises:
            RunFolderError: if it cannot be written.
        """
        files = {"plan.json": plan.to_json().encode(), "recipe.toml": recipe.to_toml().encode()}
        try:
            if self.elsewhere:
                with self.store.place.new("run") as folder:
                    for name, data in files.items():
                        with folder.file(name) as write:
                            write(data)
            changed = self.recipe_file.exists()
            if changed:
                both = {name: data.decode() for name, data in files.items()}
                write_file(self._next_file, json.dumps(both).encode())
                write_file(self.recipe_file, files.pop("recipe.toml"))
            for name, data in files.items():
                write_file(self.path / name, data)
            if changed:
                self._next_file.unlink()
        except OSError as err:
            raise unwritable(self.path, err) from None

    def goes_on(self) -> None:
        """All checks are behind us: this process is the owner, and how the run ended before is no longer how it ended."""
        if not isinstance(self.store.place, LocalPlace):  # it has no lock: whoever trains now is the owner
            self.store.place.claim()
            self.store.place.sweep()
        try:
            (self.path / "outcome.json").unlink(missing_ok=True)
        except OSError as err:
            raise RunFolderError(
                f"{self.path / 'outcome.json'} cannot be removed.", f"{err.strerror}.", "Take it away, then resume."
            ) from None

    def _fetch(self) -> None:
        """Recipe and plan from where the checkpoints lie."""
        place = self.store.place
        if "run" not in place.folders():
            return
        for name in ("plan.json", "recipe.toml"):
            with place.open("run", name) as file:
                data = bytearray(file.size)
                file.read_into(0, memoryview(data))
            write_file(self.path / name, bytes(data))

    def plan_for(self, recipe: Recipe, accept: Sequence[str]) -> tuple[Plan, list[str]]:
        """The plan to go on by, and what differs from the one in the folder.

        Raises:
            RunFolderError: for a change that was not accepted, or that cannot be.
        """
        changes = differences(recipe, Recipe.from_file(self.recipe_file))
        refuse_changes(self.path, changes, accept)
        before = self.saved_plan()
        plan, told = changed_plan(before, recipe, changes)
        plan, kept = as_planned(self.path, before, plan, changes)
        return plan, [*told, *kept]

    def _settle(self) -> None:
        """A change that was broken off while it was written down holds if its recipe is there, and else never was."""
        if self._own and self._next_file.exists():
            both = json.loads(self._next_file.read_text(encoding="utf-8"))
            if both["recipe.toml"] == self.recipe_file.read_text(encoding="utf-8"):
                write_file(self.plan_file, both["plan.json"].encode())
            self._next_file.unlink()

    @staticmethod
    def recipe_in(path: Path) -> Recipe:
        """The recipe that the run in ``path`` began with."""
        file = path / "recipe.toml"
        if not file.exists():
            raise nothing_to_resume(path)
        return Recipe.from_file(file)

    def saved_plan(self) -> Plan:
        try:
            self._settle()
            return Plan.from_json(self.plan_file.read_text(encoding="utf-8"))
        except ThalwegError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise RunFolderError(
                f"{self.path} holds no run to resume.", f"plan.json: {err}.", "Start one without --resume."
            ) from None


def unwritable(path: Path, err: OSError) -> RunFolderError:
    return RunFolderError(
        f"The run folder {path} cannot be written.",
        f"{err.strerror or err}.",
        "Make room, see to its permissions, or choose another with --runs. No step has been taken.",
    )


def nothing_to_resume(path: Path) -> RunFolderError:
    return RunFolderError(
        f"There is no run in {path} to resume.",
        "It has no recipe.toml.",
        "Start one without --resume, or with --resume auto, which begins where there is none.",
    )


def choose_folder(runs: Path, name: str | None, task: str, *, resume: bool) -> Path:
    """The run folder: ``name``; else a free one called after the task, or, to resume, the newest such.

    A folder that holds no recipe yet, as after an error before step 1, counts as free.
    """
    if name is not None:
        return runs / name
    number = 1
    path = runs / task
    while True:
        following = runs / f"{task}-{number + 1}"
        if resume and not (following / "recipe.toml").exists():
            return path
        if not resume and not (path / "recipe.toml").exists():
            return path
        path, number = following, number + 1
