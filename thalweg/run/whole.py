"""A whole run: a task and a recipe in; a trained model, and a run folder if one is wanted, out."""

from __future__ import annotations

import copy
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thalweg.checkpoint import FolderLock, Snapshot, write_file
from thalweg.core import (
    FeedState,
    Layout,
    Plan,
    RanksError,
    Recipe,
    RunFolderError,
    Sink,
    StopReason,
    Task,
    ThalwegError,
)
from thalweg.core.changes import accepted
from thalweg.device import Device
from thalweg.engine import Loop, Resolved, Step, build, evaluate, levers, resolve
from thalweg.engine.agree import check_forward
from thalweg.engine.compiled_told import fallbacks
from thalweg.engine.memory import PeakWatch, begun
from thalweg.engine.signals import Asked, asked_to_end
from thalweg.engine.together import check_same, checksum, has_shards, take_state
from thalweg.parallel import Agent, Ranks, check_equal, here, join, left_to, on_first
from thalweg.regularize import PreciseStatistics
from thalweg.report import write_report
from thalweg.run.again import check_in_sight, patience_of
from thalweg.run.best import BestWeights
from thalweg.run.clock import Clock
from thalweg.run.earlier import Earlier, check_end, look
from thalweg.run.ending import give_back, hand_over, wind_up
from thalweg.run.folder import RunFolder, unwritable
from thalweg.run.program import held
from thalweg.run.result import Result, Resume
from thalweg.run.saving import Saving, ranked_by, snapshot_of
from thalweg.watch import JsonLines, Memory


def train(
    model: Any,
    loss: Callable[..., Any],
    data: Any,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    folder: str | Path | None = None,
    resume: Resume = False,
    accept: Sequence[str] = (),
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
        resume: go on from the newest good checkpoint of ``folder`` (True), or from a step; "auto": begin where there is no
            run yet.
        accept: what may differ from the recipe of the run that is resumed: paths, tables, or their last parts.
        sinks: further places where records go, such as ``thalweg.watch.Terminal()``.

    Raises:
        ThalwegError: for a mistake, before any work; the message says what to do.
    """
    task = Task(model=model, loss=loss, data=data, metrics=metrics)
    given = recipe if isinstance(recipe, Recipe) else Recipe().override(recipe or {})
    return train_task(task, given, folder=folder, resume=resume, accept=accept, sinks=sinks)


def train_task(
    task: Task,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    resume: Resume = False,
    accept: Sequence[str] = (),
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train a task; see ``train``."""
    ranks, called = join(), time.time()
    if folder is None and (resume or accept):
        raise RunFolderError("resume needs a run folder.", "folder is None.", "Give the folder of the run.")
    if ranks.world > 1:
        check_equal(
            ranks, "another recipe or program", held(task, recipe), "Start all ranks with the same command and files."
        )
    if folder is None:
        return _Run(task, recipe, None, sinks, ranks, None).go()
    path, agent = Path(folder), Agent()
    left = left_to(ranks, agent)
    again = left.folder == str(path)  # a launcher has started this group in the place of an earlier one
    lock, place = FolderLock(path), None
    try:
        on_first(ranks, lambda: lock.acquire(patience_of(ranks) if again else 0.0))
        place = on_first(
            ranks, lambda: RunFolder(path, recipe)
        )  # the other ranks write nothing, and read nothing there
        if again:
            on_first(ranks, lambda: check_in_sight(place, left))
            resume = "auto"
        run = _Run(task, recipe, place, sinks, ranks, path, agent=agent)
        run.still_ours, run.clock = lock.check, Clock(path if ranks.is_first else None, called, again=again)
        if again:
            run.news.append(("ranks", f"Started again by the launcher, on {ranks.world} ranks."))
        return run.go(resume, accept)
    finally:
        if place is not None:
            place.release()
        lock.release()


def _take_part(loop: Loop, keeper: BestWeights | None, must: bool) -> None:
    """A rank's part in a checkpoint that the first one writes."""
    snapshot_of(loop, keeper, {})


class _Run:
    """One process's part of a run.

    Args:
        folder: where it writes; None on all ranks but the first.
        path: of the run's folder, which all may know.
        agent: what started this process, for what the next group should know.

    Attributes:
        still_ours: raises where the folder is another's by now.
        clock: where the run's time goes.
    """

    still_ours: Callable[[], None] = staticmethod(lambda: None)
    clock = Clock(None, 0.0)

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        folder: RunFolder | None,
        sinks: Sequence[Sink],
        ranks: Ranks,
        path: Path | None,
        *,
        agent: Agent | None = None,
    ) -> None:
        self.task, self.recipe, self.folder, self.ranks, self.path = task, recipe, folder, ranks, path
        self.agent = agent
        self.memory = Memory()
        self.lines: JsonLines | None = None
        self.news: list[tuple[str, str]] = []  # to be told when the run begins: name and text of an event
        self.given_sinks = list(sinks) if ranks.is_first else []

    @levers.kept()
    def go(self, resume: Resume = False, accept: Sequence[str] = ()) -> Result:
        ranks = self.ranks
        earlier = ranks.together(lambda: self._open(resume, accept))
        resolved = self._resolved(earlier)
        ranks.use(resolved.device)
        try:
            with asked_to_end(resolved.plan.recipe.checkpoint.grace) as asked:
                return self._train(resolved, earlier, asked)
        finally:
            resolved.prepared.undo()

    def _resolved(self, earlier: Earlier) -> Resolved:
        """The plan; on ranks the first one measures and decides, and the others take it over."""
        ranks, begins = self.ranks, earlier.snapshot is None
        decided = on_first(
            ranks, lambda: resolve(self.task, self.recipe, saved=earlier.plan, begins=begins, ranks=ranks)
        )
        if ranks.world == 1:
            assert decided is not None
            return decided
        plan = Plan.from_json(ranks.from_first("" if decided is None else decided.plan.to_json()))
        stand = Layout(**plan.layout)
        resolved = ranks.together(
            lambda: decided or resolve(self.task, self.recipe, saved=plan, begins=False, ranks=ranks, layout=stand)
        )
        rows = [f"{row.name} {list(row.shape)} by {row.rule}" for row in resolved.plan.parameters]
        check_equal(ranks, "another model", rows, "Let the model not hang on the rank.")
        return resolved

    def _train(self, resolved: Resolved, earlier: Earlier, asked: Asked) -> Result:
        step = build(
            resolved.plan,
            resolved.model,
            resolved.loss,
            resolved.device,
            resolved.policy,
            self.ranks,
            resolved.tried,
        )
        try:
            return self._through(resolved, earlier, asked, step)
        finally:
            give_back(step)

    def _through(self, resolved: Resolved, earlier: Earlier, asked: Asked, step: Step) -> Result:
        plan, kept = self._filled(step, resolved, earlier)
        if self.ranks.world > 1 and (text := check_forward(step, resolved.tried, self.ranks)):
            self.news.append(("ranks", text))
        check_end(plan, step.state.step)  # a plan with fewer epochs knows its end only now
        if earlier.plan is not None:
            self.news += levers.told_threads(earlier.plan, plan, resolved.device)
        news = self._begun(plan, earlier, step.state.step)
        sinks = self._sinks(earlier.snapshot, new=earlier.plan is None)
        precise = self._precise(resolved, step)
        evaluation = self._evaluation(resolved, step, precise, asked)
        loop = Loop(plan, step, resolved.feed, sinks, evaluate=evaluation, stop=asked, ranks=self.ranks)
        keeper = BestWeights(step.state, precise) if plan.recipe.evaluate.patience else None
        saving = self._wired(loop, keeper, asked)
        if kept is not None:
            self._take_up(loop, keeper, kept)
        self._begin(loop, plan, resolved, [*news, *self.news])
        self.clock.start(step.state.step, self.ranks.world)
        try:
            reason = loop.run()
            if keeper is not None and keeper.values:
                loop.tell("best weights", f"The model is that of step {loop.best_steps()[0]}.")
        except BaseException as err:
            if isinstance(err, ThalwegError):
                err.in_run = True
            if not (isinstance(err, RanksError) and (err.lost or err.told)):
                self.ranks.ends_with(f"{type(err).__name__}: {err}"[:300])
            with suppress(BaseException):  # the first error is the one that counts
                wind_up(StopReason.FAILED, saving, step, sinks)
            raise
        with loop.spending("saving"):
            reason = wind_up(reason, saving, step, sinks)
        self.clock.end(step.state.step, loop.spent)
        reason = self.ranks.from_first(reason)  # whether it could be saved, the first one alone knows
        if self.agent is not None and reason is StopReason.DIVERGED:
            self.agent.leave(code=reason.exit_code)  # a group that is started again would go the same way
        hand_over(step, precise, keeper)
        sample = self._sample(step.state.model, reason)
        if self.folder:
            self._conclude(reason, sample)
        number = max(self.ranks.told(asked.number))  # any rank may have been asked; what the first one writes is there
        memory, told = self.memory, self.clock.told()
        return Result(
            reason, step.state.model, plan, memory.records, memory.evaluations, self.path, sample, number, told
        )

    def _filled(self, step: Step, resolved: Resolved, earlier: Earlier) -> tuple[Plan, Snapshot | None]:
        """The step has the state that the run goes on from; the plan as it is kept, and what else was in the checkpoint."""
        ranks = self.ranks
        plan = replace(resolved.plan, sizes=step.state.nbytes())
        if earlier.plan is None:
            self._tell_of_graphs(plan)
            if plan.ledger is not None:
                plan = replace(plan, ledger=begun(plan.ledger, resolved.device))
            plan = replace(plan, decisions=(*plan.decisions, *step.state.ways()))
        kept, told = take_state(step.state, earlier.snapshot, ranks)
        self.news += [("ranks", text) for text in told]
        return plan, kept

    def _tell_of_graphs(self, plan: Plan) -> None:
        """What could not be compiled; to whoever looks at nothing of the run, as a warning of Python's."""
        for text in fallbacks(plan.decisions, self.recipe.compile, plan.recipe.compile):
            self.news.append(("compiled", text))
            if not self.given_sinks and self.ranks.is_first:
                warnings.warn(text, stacklevel=2)

    def _begun(self, plan: Plan, earlier: Earlier, at: int) -> list[tuple[str, str]]:
        """The folder holds the run; where a launcher may start ranks again, the next ones will know of it, wherever they are."""
        folder, ranks = self.folder, self.ranks
        if self.agent is not None:
            self.agent.leave(folder=str(self.path), host=ranks.from_first(here()))
        news = on_first(ranks, lambda: [] if folder is None else self._claim(folder, plan, earlier, at))
        if self.agent is not None:
            self.agent.leave(begun=True)
        return news or []

    def _claim(self, folder: RunFolder, plan: Plan, earlier: Earlier, at: int) -> list[tuple[str, str]]:
        """All checks are behind us and the run goes on from step ``at``: what lies ahead of it in the folder is another's."""
        folder.goes_on()
        if earlier.plan is None:
            folder.saved_file.unlink(missing_ok=True)
        if earlier.plan is None or earlier.changes:
            folder.write(plan, self.recipe)
        aside = {damaged: folder.store.set_aside(damaged) for damaged in earlier.faults}
        folder.store.remove_after(at)
        passed = [
            f"Passed over a damaged checkpoint: {earlier.faults[damaged]} Going on from step {at}. It is kept as {name}."
            for damaged, name in aside.items()
        ]
        known = 0 if earlier.snapshot is None else earlier.snapshot.facts.get("accepted")
        all_accepted = accepted(plan)  # also what another process had been allowed, and was ended before it was saved
        changed = [f"{t} (accepted)" for t in (earlier.changes if known is None else all_accepted[known:])]
        told = {"checkpoints": earlier.news, "checkpoint passed over": passed, "recipe changed": changed}
        return [(name, text) for name, texts in told.items() for text in texts]

    def _wired(self, loop: Loop, keeper: BestWeights | None, asked: Asked) -> Saving | None:
        """What goes on beside the loop is connected with it; what saves, where something is saved."""
        loop.feed.tell = loop.tell
        if self.ranks.world > 1 and not has_shards(loop.step.state.model):
            loop.agree = lambda: check_same(loop.step.state, self.ranks, checksum)
        if self.ranks.world == 1:  # a rank that waits for data ends with the others, after the same step
            loop.feed.stop = asked
        if keeper is not None:
            loop.best = keeper.keep
        if self.folder is None or self.lines is None:
            if self.path is not None and loop.step.state.fully is not None:
                loop.save = partial(_take_part, loop, keeper)
            return None
        saving = Saving(self.folder.store, loop, self.lines, keeper, asked, self.still_ours, self.clock)
        loop.save, loop.watch = saving.save, saving.watch
        return saving

    def _begin(self, loop: Loop, plan: Plan, resolved: Resolved, news: Sequence[tuple[str, str]]) -> None:
        """The sinks hear of the plan, and of what is new since the run was last here."""
        try:
            for sink in loop.sinks:
                sink.start(plan, loop.step.state.step)
        except OSError as err:
            if self.path is None or isinstance(err, ThalwegError):
                raise
            raise unwritable(self.path, err) from None
        if plan.ledger is not None:
            watch = PeakWatch(plan.ledger, resolved.device)
            watch.begin()
            loop.measured = watch.told
        for name, text in news:
            loop.tell(name, text)
        begun_by = next((made.value for made in plan.decisions if made.path == "ranks"), 1)
        if begun_by != self.ranks.world:
            loop.tell("ranks", f"The run began on {begun_by} ranks, and goes on with {self.ranks.world}.")

    def _conclude(self, reason: StopReason, sample: str) -> None:
        """How it ended, for those who look at the folder; on a disk that takes nothing more, the run is over all the same."""
        assert self.folder is not None
        outcome = {"reason": reason.value, "advice": reason.advice, "sample": sample}
        try:
            write_file(self.folder.path / "outcome.json", json.dumps(outcome).encode())
            write_report(self.folder.path)
        except OSError as err:
            warnings.warn(f"The report of {self.folder.path} could not be written: {err}", stacklevel=2)

    def _open(self, resume: Resume, accept: Sequence[str]) -> Earlier:
        """What there is to go on from."""
        return Earlier() if self.folder is None else look(self.folder, self.recipe, resume, accept)

    def _take_up(self, loop: Loop, keeper: BestWeights | None, snapshot: Snapshot) -> None:
        """What the loop knew when the checkpoint was made."""
        facts = snapshot.facts
        now = ranked_by(loop.plan)
        before = facts.get("ranked", now)
        if before == now:
            loop.ranking = [(value, at) for value, at in facts["ranking"]]
            loop.early.restore(facts["early"])
            loop.target.by = facts.get("reached")
        else:
            loop.step.state.timetable.feedback.forget("evaluation")
            text = f"Evaluations are compared by {now} from here on; those before, compared by {before}, count no more."
            self.news.append(("evaluations", text))
        loop.owed = bool(facts.get("owed", False)) and loop.evaluate is not None
        loop.streak = facts["streak"] % loop.plan.recipe.guard.patience  # one that gave up gets another try
        if keeper is not None and before == now:
            keeper.values = dict(snapshot.groups.get("best", {}))
        loop.guard.restore(snapshot)
        if "feed" in facts:
            state = FeedState(facts["feed"], dict(snapshot.groups.get("feed", {})))
            loop.feed.restore(loop.step.state.step, state)

    def _sinks(self, snapshot: Snapshot | None, *, new: bool) -> list[Sink]:
        sinks: list[Sink] = [self.memory]
        if self.folder:
            keep = snapshot.facts["records_bytes"] if snapshot else 0
            self.lines = JsonLines(self.folder.records_file, keep_bytes=keep)
            self.clock.look(keep, new=new)
            sinks.append(self.lines)
        return [*sinks, *self.given_sinks]

    @staticmethod
    def _precise(resolved: Resolved, step: Step) -> PreciseStatistics | None:
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

        ranks = {"group": step.ranks.group, "in_order": recipe.exact_reduce}
        return PreciseStatistics(resolved.model, batches, forward, seed=recipe.seed, **ranks)

    def _evaluation(
        self, resolved: Resolved, step: Any, precise: PreciseStatistics | None, asked: Asked
    ) -> Callable[[], dict[str, float]] | None:
        test, wanted = resolved.test, resolved.plan.recipe.evaluate
        if test is None:
            return None
        batch, alone = wanted.batch or 1, self.ranks.world == 1
        return lambda: evaluate(
            step.state,
            test,
            resolved.loss,
            self.task.metrics,
            resolved.policy,
            batch=batch,
            precise=precise,
            stop=asked if alone else lambda: False,
            ranks=step.ranks,
        )

    def _sample(self, model: nn.Module, reason: StopReason) -> str:
        if self.task.sample is None or reason is not StopReason.FINISHED or not self.ranks.is_first:
            return ""
        model.eval()
        return self.task.sample(self._where_lengths_may_change(model))

    @staticmethod
    def _where_lengths_may_change(model: nn.Module) -> nn.Module:
        """The model, or a copy on the host: what grows word by word would be compiled anew for each word elsewhere."""
        first = next(model.parameters(), None)
        if first is None or not Device(first.device).static_shapes:
            return model
        return Device(torch.device("cpu")).move(copy.deepcopy(model))
