"""A run's checkpoints: handed over between two steps, written beside them, and what a person must be told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from thalweg.checkpoint import Job, Saver, Snapshot, Store, Unfit, write_file
from thalweg.core import Plan, RunFolderError, StopReason
from thalweg.core.changes import accepted
from thalweg.engine import Loop
from thalweg.engine.guard import unfit
from thalweg.engine.signals import Asked
from thalweg.run.best import BestWeights
from thalweg.run.clock import Clock
from thalweg.run.folder import SAVED
from thalweg.watch import JsonLines


def ranked_by(plan: Plan) -> str:
    """What evaluations are compared by, for people."""
    wanted = plan.recipe.evaluate
    return f"{wanted.best} ({wanted.goal})"


def snapshot_of(loop: Loop, keeper: BestWeights | None, facts: Mapping[str, Any]) -> Snapshot:
    """What a checkpoint holds of a run. Where parameters lie on ranks in parts, all ranks call this at once."""
    state = loop.step.state
    snapshot = loop.guard.add_to(state.snapshot(facts))
    if keeper is not None and keeper.values:
        best = state.put_together({"best": dict(keeper.values)})
        snapshot = replace(snapshot, groups={**snapshot.groups, **best})
    return snapshot


class Saving:
    """Between a loop and the thread that saves.

    Args:
        lines: the records; a checkpoint knows how many of them belong to it, and they are made durable before it.
        keeper: the best weights, where a run ends with them.
        asked: whether a signal asks the run to end; then it waits no longer than its grace for a store that fails.
        still_ours: raises where the run folder is another's by now.
        clock: where the run's time goes.
    """

    def __init__(
        self,
        store: Store,
        loop: Loop,
        lines: JsonLines,
        keeper: BestWeights | None,
        asked: Asked,
        still_ours: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.still_ours, self._looked_at, self.clock = still_ours, 0.0, clock
        self.loop, self.lines, self.keeper, self.asked = loop, lines, keeper, asked
        self.wanted = loop.plan.recipe.checkpoint
        self.saver = Saver(store, before=self._before, retain=self._retain, hurry=asked)
        self._trained = [name for arena in loop.step.state.arenas for name in arena.places]
        self._failing = self._unfit = False
        self._records_fail = ""
        self._marked = lines.path.parent / SAVED

    def save(self, must: bool) -> None:
        """Hand over a checkpoint of this moment; the run waits for the copy alone."""
        self.asked.heard()
        self.saver.put(lambda: self._job(must))
        self.clock.saved(self.loop.step.state.step, self.loop.spent)

    def _job(self, must: bool) -> Job:
        loop = self.loop
        facts = {
            "ranking": list(loop.ranking),
            "early": loop.early.facts(),
            "reached": loop.target.by,
            "streak": loop.streak,
            "owed": loop.owed,
            "records_bytes": self.lines.length,
            "ranked": ranked_by(loop.plan),
            "accepted": len(accepted(loop.plan)),
        }
        fed = loop.feed.state(loop.step.state.step)
        if fed is not None:
            facts["feed"] = fed.facts
        snapshot = snapshot_of(loop, self.keeper, facts)
        if fed is not None and fed.tensors:
            snapshot = replace(snapshot, groups={**snapshot.groups, "feed": fed.tensors})
        every = self.wanted.keep_every
        must = must or bool(every and loop.step.state.step % every == 0)
        return Job(loop.step.state.step, snapshot.on_host(), must=must, best=loop.best_steps())

    def watch(self) -> StopReason | None:
        """What the thread has to say; a reason where too many saves in a row have failed.

        Raises:
            RunFolderError: where the folder is another's by now.
        """
        if (now := time.monotonic()) - self._looked_at > 1.0:
            self._looked_at = now
            self.still_ours()
        if self.lines.trouble != self._records_fail:
            self._records_fail = self.lines.trouble
            if self._records_fail:
                self.loop.tell("not saved", f"Records cannot be written, and wait in memory: {self._records_fail}.")
        if self.saver.is_slow():
            self.loop.tell("slow store", "A checkpoint has been under way for 30 seconds; the run goes on beside it.")
        if not self.saver.news:
            return None
        self.still_ours()  # or a save that was refused for that would count as one that failed
        self._tell()
        if self._unfit:  # what is not finite never becomes so again
            return StopReason.DIVERGED
        return StopReason.UNSAVED if self.saver.failures > self.wanted.failures else None

    def finish(self, reason: StopReason) -> StopReason:
        """Wait until the newest checkpoint is written; what the run ended with, where it is."""
        self.asked.rest()
        saved = self.saver.finish(self.wanted.grace)
        self._tell()
        self.saver.close()
        if self._unfit and reason is not StopReason.FAILED:
            return StopReason.DIVERGED
        return reason if saved or reason in (StopReason.DIVERGED, StopReason.FAILED) else StopReason.UNSAVED

    def _tell(self) -> None:
        while self.saver.news:
            news = self.saver.news.popleft()
            if news.text:
                self.loop.tell("checkpoint", f"The checkpoint of step {news.step}: {news.text}.")
            elif news.unfit:
                self._unfit = True
                self.loop.tell("not saved", news.failed, {"failed": news.step})
            elif news.failed:
                self._failing = True
                self.loop.tell(
                    "not saved",
                    f"{news.failed} The run goes on in memory; {self.saver.failures} of {self.wanted.failures} saves in a "
                    "row may fail (checkpoint.failures).",
                    {"failed": news.step},
                )
            elif self._failing:
                self._failing = False
                self.loop.tell("saved again", f"Checkpoints are saved again: step {news.step}.")

    def _before(self, job: Job) -> None:
        try:
            self.still_ours()
        except RunFolderError as err:
            raise Unfit(err.asked, err.numbers, err.remedy) from None  # trying again would not help
        if fault := unfit(job.snapshot, self._trained):
            raise Unfit(
                f"The state of step {job.step} is not saved.",
                f"{fault}.",
                "The checkpoints before it stay as they are; lower optimizer.lr.",
            )
        self.lines.make_durable(int(job.snapshot.facts["records_bytes"]))

    def _retain(self, job: Job) -> None:
        if not self._marked.exists():  # from now on, a store without checkpoints has lost them
            with suppress(OSError):  # the records lie in this folder too, and tell of it
                write_file(self._marked, b"")
        wanted = self.wanted
        kept = {"last": wanted.keep_last, "every": wanted.keep_every, "num_best": wanted.keep_best}
        self.saver.store.retain(best=job.best, **kept)
