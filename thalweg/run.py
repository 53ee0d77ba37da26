"""A whole run: a task and a recipe in; a trained model, and a run folder if one is wanted, out."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thalweg.checkpoint import FolderLock, Snapshot, Store, write_file
from thalweg.core import (
    VERSION,
    CheckpointError,
    Evaluation,
    Plan,
    Recipe,
    Record,
    RunFolderError,
    Sink,
    StopReason,
    Task,
)
from thalweg.engine import GIVE_UP_AFTER, Loop, Resolved, build, evaluate, evaluated_weights, resolve
from thalweg.engine.memory import PeakWatch, begun
from thalweg.engine.together import same_state
from thalweg.parallel import Ranks, check_equal, join, on_first
from thalweg.regularize import PreciseStatistics, set_factors
from thalweg.report import write_report
from thalweg.watch import JsonLines, Memory

Resume = bool | int


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        reason: why it ended.
        model: the trained module; where there is a weight average, it holds the averaged weights, those that were evaluated.
        plan: what was decided.
        records, evaluations: of this process; a resumed run's earlier ones stand in the run folder.
        folder: the run folder, or None.
        sample: what the task's sample function gave, at the end of a finished run.
    """

    reason: StopReason
    model: nn.Module
    plan: Plan
    records: list[Record]
    evaluations: list[Evaluation]
    folder: Path | None
    sample: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation's metrics; empty where nothing was evaluated."""
        return self.evaluations[-1].metrics if self.evaluations else {}


def train(
    model: Any,
    loss: Callable[..., Any],
    data: Any,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    folder: str | Path | None = None,
    resume: Resume = False,
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train a model; where torchrun or torch.distributed made this process one of several, together with the others.

    Args:
        model: an ``nn.Module``, or a function that makes one from ``recipe.model``.
        loss: ``loss(model, batch)`` gives ``Loss(total, weight)`` or a scalar mean.
        data: training data, or ``Split(train=..., test=...)``; a dict of tensors, a ``Dataset``, an iterable.
        recipe: a ``Recipe``, or what differs from the default one, by dotted path.
        metrics: ``metrics(model, batch)`` gives further (sum, weight) pairs for evaluation.
        folder: where records, checkpoints and the report go; None writes nothing.
        resume: go on from the newest good checkpoint of ``folder`` (True), or from a step.
        sinks: further places where records go, such as ``thalweg.watch.Terminal()``.

    Raises:
        ThalwegError: for a mistake, before any work; the message says what to do.
    """
    task = Task(model=model, loss=loss, data=data, metrics=metrics)
    given = recipe if isinstance(recipe, Recipe) else Recipe().override(recipe or {})
    return train_task(task, given, folder=folder, resume=resume, sinks=sinks)


def train_task(
    task: Task,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    resume: Resume = False,
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train a task; see ``train``."""
    ranks = join()
    if folder is None and resume:
        raise RunFolderError("resume needs a run folder.", "folder is None.", "Give the folder of the run.")
    if ranks.world > 1:
        check_equal(ranks, "another recipe or program", _held(recipe), "Start all ranks with the same command.")
    if folder is None:
        return _Run(task, recipe, None, sinks, ranks, None).go()
    path = Path(folder)
    lock = FolderLock(path)
    try:
        on_first(ranks, lock.acquire)
        here = on_first(ranks, lambda: RunFolder(path))  # the other ranks write nothing, and read nothing there
        return _Run(task, recipe, here, sinks, ranks, path).go(resume)
    finally:
        lock.release()


def _held(recipe: Recipe) -> list[str]:
    """What ranks must have in common, one thing a line."""
    return [f"thalweg {VERSION}", f"torch {torch.__version__}", *recipe.to_toml().splitlines()]


class RunFolder:
    """The files of a run: recipe, plan, records, checkpoints, report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file, self.plan_file = path / "recipe.toml", path / "plan.json"
        self.records_file = path / "records.jsonl"
        self.store = Store(path / "checkpoints")

    def begin(self, recipe: Recipe) -> None:
        """Claim the folder for a new run.

        Raises:
            RunFolderError: if it already holds one.
        """
        if self.recipe_file.exists():
            self.check_same(recipe)
            raise RunFolderError(
                f"{self.path} already holds this run.",
                f"Newest checkpoint: {self.store.steps()[-1] if self.store.steps() else 'none'}.",
                "Go on with --resume, or start another with --name.",
            )

    def check_same(self, recipe: Recipe) -> None:
        """Refuse a recipe that is not the one in the folder; the difference is shown."""
        theirs = Recipe.from_file(self.recipe_file)
        differing = [f"{path}: {theirs_!r} there, {mine!r} here" for path, mine, theirs_ in recipe.diff(theirs)]
        if differing:
            raise RunFolderError(
                f"{self.path} belongs to a run with another recipe.",
                "; ".join(differing) + ".",
                "Start a new run with --name, or resume without changing the recipe.",
            )

    @staticmethod
    def recipe_in(path: Path) -> Recipe:
        """The recipe that the run in ``path`` began with."""
        file = path / "recipe.toml"
        if not file.exists():
            raise _nothing_to_resume(path)
        return Recipe.from_file(file)

    def saved_plan(self) -> Plan:
        try:
            return Plan.from_json(self.plan_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise RunFolderError(
                f"{self.path} holds no run to resume.", f"plan.json: {err}.", "Start one without --resume."
            ) from None


def _nothing_to_resume(path: Path) -> RunFolderError:
    return RunFolderError(
        f"There is no run in {path} to resume.", "It has no recipe.toml.", "Start one without --resume."
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


class _Run:
    """One process's part of a run.

    Args:
        folder: where it writes; None on all ranks but the first.
        path: of the run's folder, which all may know.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        folder: RunFolder | None,
        sinks: Sequence[Sink],
        ranks: Ranks,
        path: Path | None,
    ) -> None:
        self.task, self.recipe, self.folder, self.ranks, self.path = task, recipe, folder, ranks, path
        self.memory = Memory()
        self.lines: JsonLines | None = None
        self.given_sinks = list(sinks) if ranks.is_first else []

    def go(self, resume: Resume = False) -> Result:
        ranks = self.ranks
        snapshot, told = ranks.together(lambda: self._open(resume))
        saved = ranks.together(
            lambda: self.folder.saved_plan() if self.folder and resume is not False else None,
        )
        resolved = self._resolved(saved)
        ranks.use(resolved.device)
        try:
            return self._train(resolved, saved, snapshot, told, resume)
        finally:
            resolved.prepared.undo()

    def _resolved(self, saved: Plan | None) -> Resolved:
        """The plan; on ranks the first one measures and decides, and the others take it over."""
        ranks = self.ranks
        decided = on_first(ranks, lambda: resolve(self.task, self.recipe, saved=saved, ranks=ranks))
        if ranks.world == 1:
            assert decided is not None
            return decided
        plan = Plan.from_json(ranks.from_first("" if decided is None else decided.plan.to_json()))
        resolved = ranks.together(lambda: decided or resolve(self.task, self.recipe, saved=plan, ranks=ranks))
        rows = [f"{row.name} {list(row.shape)} by {row.rule}" for row in resolved.plan.parameters]
        check_equal(ranks, "another model", rows, "Let the model not hang on the rank.")
        return resolved

    def _train(
        self, resolved: Resolved, saved: Plan | None, snapshot: Snapshot | None, told: list[str], resume: Resume
    ) -> Result:
        ranks = self.ranks
        step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy, ranks)
        plan = replace(resolved.plan, sizes=step.state.nbytes())
        if saved is None:
            if plan.ledger is not None:
                plan = replace(plan, ledger=begun(plan.ledger, resolved.device))
            plan = replace(plan, decisions=(*plan.decisions, *step.state.ways()))
        if self.folder and resume is False:
            write_file(self.folder.plan_file, plan.to_json().encode())
            write_file(self.folder.recipe_file, self.recipe.to_toml().encode())
        ranks.together(lambda: None if snapshot is None else step.state.load(snapshot))
        snapshot, others = same_state(step.state, snapshot, ranks)
        if self.folder:
            # All checks are behind us and the run goes on from here: what lies ahead of it is another's.
            self.folder.store.remove_after(step.state.step)
            (self.folder.path / "outcome.json").unlink(missing_ok=True)
        sinks = self._sinks(snapshot)
        watch = None if plan.ledger is None else PeakWatch(plan.ledger, resolved.device)
        with _asked_to_stop() as stop:
            precise = self._precise(resolved)
            evaluation = self._evaluation(resolved, step, precise)
            loop = Loop(plan, step, resolved.feed, sinks, evaluate=evaluation, stop=stop, ranks=ranks)
            keeper = BestWeights(step.state, precise) if plan.recipe.evaluate.patience else None
            loop.save = lambda: self._save(loop, keeper)
            if keeper is not None:
                loop.best = keeper.keep
            if snapshot is not None:
                loop.ranking = [(value, at) for value, at in snapshot.facts["ranking"]]
                loop.early.restore(snapshot.facts["early"])
                if keeper is not None:
                    keeper.values = dict(snapshot.groups.get("best", {}))
                loop.streak = snapshot.facts["streak"] % GIVE_UP_AFTER  # one that gave up gets another try
            for sink in sinks:
                sink.start(plan, step.state.step)
            if watch is not None:
                watch.begin()
                loop.measured = watch.told
            for text in told:
                loop.tell("checkpoint passed over", text)
            for text in others:
                loop.tell("ranks", text)
            begun_by = next((made.value for made in plan.decisions if made.path == "ranks"), 1)
            if begun_by != ranks.world:
                loop.tell("ranks", f"The run began on {begun_by} ranks, and goes on with {ranks.world}.")
            reason = StopReason.FAILED
            try:
                reason = loop.run()
                if keeper is not None and keeper.values:
                    loop.tell("best weights", f"The model is that of step {loop.best_steps()[0]}.")
            finally:
                if step.recomputation is not None:
                    step.recomputation.release()
                for sink in sinks:
                    sink.stop(reason)
        step.state.adopt_average()
        if precise is not None:
            precise.estimate(version=step.state.step).put(step.state.model)
        if keeper is not None:
            keeper.adopt()
        if step.streams is not None:  # the model is the user's again: its layers draw from torch's generator
            step.streams.release()
            set_factors(step.state.model, {"dropout": None, "stochastic_depth": None})
        sample = self._sample(step.state.model, reason)
        if self.folder:
            outcome = {"reason": reason.value, "advice": reason.advice, "sample": sample}
            write_file(self.folder.path / "outcome.json", json.dumps(outcome).encode())
            write_report(self.folder.path)
        ranks.wait()  # what the first rank writes is there
        return Result(reason, step.state.model, plan, self.memory.records, self.memory.evaluations, self.path, sample)

    def _open(self, resume: Resume) -> tuple[Snapshot | None, list[str]]:
        """The snapshot to go on from, and what to tell of damaged ones."""
        if self.folder is None:
            return None, []
        if resume is False:
            self.folder.begin(self.recipe)
            return None, []
        if not self.folder.recipe_file.exists():
            raise _nothing_to_resume(self.folder.path)
        self.folder.check_same(self.recipe)
        store = self.folder.store
        if resume is not True:
            store.check(resume)
            return store.load(resume), []
        step, faults = store.newest_good()
        if step is None:
            if faults:
                raise CheckpointError(
                    f"No checkpoint of {self.folder.path} is whole.", " ".join(faults), "Start a new run with --name."
                )
            return None, []  # stopped before its first checkpoint: the run begins again, in the same folder
        told = [f"Passed over a damaged checkpoint: {fault} Going on from step {step}." for fault in faults]
        return store.load(step), told

    def _sinks(self, snapshot: Snapshot | None) -> list[Sink]:
        sinks: list[Sink] = [self.memory]
        if self.folder:
            keep = snapshot.facts["records_bytes"] if snapshot else 0
            self.lines = JsonLines(self.folder.records_file, keep_bytes=keep)
            sinks.append(self.lines)
        return [*sinks, *self.given_sinks]

    def _precise(self, resolved: Resolved) -> PreciseStatistics | None:
        """What measures batch statistics for averaged weights, from the first batches of the run."""
        recipe, feed = resolved.plan.recipe, resolved.feed
        num = recipe.regularize.precise
        if not num:
            return None

        def batches() -> Iterator[Any]:
            windows = itertools.islice(feed.windows(0, resolved.plan.steps), num)
            return (part for window in windows for part in window)

        def forward(model: nn.Module, batch: Any) -> None:
            with resolved.policy.context(resolved.device):
                resolved.loss(model, batch)

        return PreciseStatistics(resolved.model, batches, forward, seed=recipe.seed, group=self.ranks.group)

    def _evaluation(
        self, resolved: Resolved, step: Any, precise: PreciseStatistics | None
    ) -> Callable[[], dict[str, float]] | None:
        test, wanted = resolved.test, resolved.plan.recipe.evaluate
        if test is None:
            return None
        batch, ranks = wanted.batch or 1, self.ranks
        return lambda: evaluate(
            step.state,
            test,
            resolved.loss,
            self.task.metrics,
            resolved.policy,
            batch=batch,
            precise=precise,
            ranks=ranks,
        )

    def _save(self, loop: Loop, keeper: BestWeights | None) -> None:
        if self.folder is None or self.lines is None:
            return
        state, wanted = loop.step.state, loop.plan.recipe.checkpoint
        facts = {
            "ranking": loop.ranking,
            "early": loop.early.facts(),
            "streak": loop.streak,
            "records_bytes": self.lines.durable_bytes(),
        }
        snapshot = state.snapshot(facts)
        if keeper is not None and keeper.values:
            snapshot = replace(snapshot, groups={**snapshot.groups, "best": keeper.values})
        self.folder.store.save(state.step, snapshot)
        self.folder.store.retain(
            last=wanted.keep_last, every=wanted.keep_every, best=loop.best_steps()[: wanted.keep_best]
        )

    def _sample(self, model: nn.Module, reason: StopReason) -> str:
        if self.task.sample is None or reason is not StopReason.FINISHED or not self.ranks.is_first:
            return ""
        model.eval()
        return self.task.sample(model)


class BestWeights:
    """The weights of the best evaluation so far, as they were evaluated: averaged where there is an average.

    Attributes:
        values: by name, as in the model's state dict; empty before the first.
    """

    def __init__(self, state: Any, precise: PreciseStatistics | None) -> None:
        self.state, self.precise = state, precise
        self.values: dict[str, Any] = {}

    def keep(self) -> None:
        with evaluated_weights(self.state, self.precise):
            self.values = {name: tensor.clone() for name, tensor in self.state.weights().items()}

    def adopt(self) -> None:
        """Leave them in the model."""
        live = self.state.weights()
        for name, tensor in self.values.items():
            live[name].copy_(tensor)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and a terminal that closes ask for an end between two steps; a second Ctrl-C ends at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
