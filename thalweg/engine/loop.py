"""The loop, on one screen: steps in order; records, evaluations and checkpoints at their times; an end that is a value."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from thalweg.core import Evaluation, Event, Feed, Plan, Record, Sink, StopReason
from thalweg.core.goodput import BESIDE, WAITING
from thalweg.device import ran_out
from thalweg.engine.evaluate import Interrupted
from thalweg.engine.guard import Tripped, Warden
from thalweg.engine.memory.measured import STEPS
from thalweg.engine.portions import Failure, in_update, spoken
from thalweg.engine.stall import Stall, advice
from thalweg.engine.step import FIELDS, RING, Step
from thalweg.engine.stopping import EarlyStop, Target
from thalweg.parallel import ALONE, Ranks

_FLUSH_SECONDS = 0.25
_FLUSH_STEPS = 16


class Loop:
    """Runs a step over a feed from where the state stands.

    Args:
        evaluate: gives metrics, or None where there is no held-out data.
        save: hands over a checkpoint of this moment; told whether it must be kept.
        stop: asked between steps: whether someone wants the run to end.
        watch: asked between steps, for what goes on beside the run; a reason ends it.
        best: told after an evaluation better than all before.
        ranks: who trains; they end after the same step.
    """

    def __init__(
        self,
        plan: Plan,
        step: Step,
        feed: Feed,
        sinks: Sequence[Sink],
        *,
        evaluate: Callable[[], dict[str, float]] | None = None,
        save: Callable[[bool], None] = lambda must: None,
        stop: Callable[[], bool] = lambda: False,
        best: Callable[[], None] = lambda: None,
        watch: Callable[[], StopReason | None] = lambda: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.plan, self.step, self.feed, self.sinks = plan, step, feed, sinks
        self.evaluate, self.save, self.stop, self.best, self.watch = evaluate, save, stop, best, watch
        self.ranks, self.talk = ranks, ranks.talk()
        # A step that holds up the run is dealt with on all ranks after the same step: none reads its rows by itself then.
        self._alone = ranks.world == 1 or not plan.recipe.guard.trips
        wanted = plan.recipe.evaluate
        self.early = EarlyStop(wanted.patience, wanted.goal or "min", wanted.min_delta)
        self.target = Target(wanted.target, wanted.goal or "min")
        self.ranking: list[tuple[float, int]] = []  # (value of the chosen metric, step), best first
        self.streak = 0  # bad steps in a row
        # Whether they have ever been too many: good ones after them, read together with them, change nothing.
        self.gave_up = False
        self.guard = Warden(step, feed, self.tell, plan.recipe.guard)
        self._began = time.perf_counter()
        self._flushed_at = self._began
        # (seconds, of which it waited for data) of the steps whose rows are still on the device
        self._pending: list[tuple[float, float]] = []
        self.stall = Stall()
        self._waits: list[float] = []  # for the windows of one call
        self._saved = -1
        self._step_s, self._noted_at, self._noted_step = 0.0, self._began, step.state.step  # of the steps last noted
        self.owed = False  # whether this step is still to be evaluated
        self.agree: Callable[[], None] = lambda: None  # before a checkpoint: raises where ranks hold other states
        self.spent = dict.fromkeys(BESIDE, 0.0)  # seconds beside the steps
        self.measured: Callable[[], str] = lambda: ""  # the peak of memory beside what was predicted

    def run(self, until: int | None = None) -> StopReason:
        """Train up to step ``until`` (the plan's end if None)."""
        state = self.step.state
        last = self.plan.steps if until is None else min(until, self.plan.steps)
        settled, tripped = state.step + STEPS, None
        if self.early.is_over():  # a run that stopped early is at its end
            return self._end(StopReason.STOPPED_EARLY)
        if self.target.is_reached() and state.step < last:  # likewise
            return self._end(StopReason.REACHED)
        for limit in state.limits():
            if limit.most:
                self.tell("out of memory", f"Memory ran out earlier: a {limit.what} has at most {limit.most} samples.")
        self.guard.begin()
        while True:
            try:
                if tripped is not None:
                    if reason := self.guard.act(tripped):
                        return self._end(reason)
                    tripped, self.owed = None, self._evaluation_is_due()
                    if reason := self._after_step():
                        return self._end(reason)
                elif self.owed and (reason := self._after_step()):
                    return self._end(reason)
                for windows in self._calls(self.stall.timed(self.feed.windows(state.step, last)), last, settled):
                    if len(windows) == 1:
                        self.step.run(windows[0])
                    else:
                        self._several(windows)
                    self.owed = self._evaluation_is_due()  # before what can fail: a resumed run makes up for it
                    self._note()
                    if state.limit.news and (self._alone or not self._pending):
                        self._tell_of_memory()
                    while self.step.news:
                        self.tell("compiled", self.step.news.pop(0))
                    self.spent["compiling"] = self.step.compiled_s
                    if state.step == settled and (text := self.measured()):
                        self.tell("memory", text)
                    if self.guard.is_due():
                        self.flush()
                        self.guard.copy()
                    if reason := self._after_step():
                        return self._end(reason)
                if state.step < last and self.stop():  # heard while the feed waited for data
                    self._save(must=True)
                    return self._end(StopReason.INTERRUPTED)
                return self._end(StopReason.FINISHED)
            except Tripped as trip:
                tripped = trip.bad
            except Exception as err:
                self._rescue()
                if not ran_out(err):
                    raise
                failure = Failure.of(err, "the run, outside of its steps")
                break
        raise in_update(failure, moved=False)

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """What this takes is no part of the steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - began

    def _calls(self, windows: Iterator[list[Any]], last: int, settled: int) -> Iterator[list[list[Any]]]:
        """The windows of one call of the step at a time: of those steps that have nothing due between them."""
        while True:
            taken: list[list[Any]] = []
            self._waits = []
            for window in itertools.islice(windows, self._ahead(last, settled)):
                taken.append(window)
                self._waits.append(self.stall.last)
            if not taken:
                return
            yield taken

    def _ahead(self, last: int, settled: int) -> int:
        """Steps of the next call."""
        step, now, recipe = self.step, self.step.state.step, self.plan.recipe
        if step.per_call == 1:
            return 1
        most = step.per_call
        if step.call_s:
            most = 1 if not self._step_s else max(1, min(most, int(step.call_s / self._step_s)))
        stops = [now + most, now + RING - len(self._pending), max(last, now + 1)]
        stops += [settled] if settled > now else []
        wanted = (recipe.evaluate.every, recipe.checkpoint.every, recipe.guard.every if recipe.guard.rewinding else 0)
        stops += [now - now % every + every for every in wanted if every]
        return min(stops) - now

    def _several(self, windows: list[list[Any]]) -> None:
        """One call; its time is shared out evenly, but for the last step, which is noted as always."""
        began, done, num = time.perf_counter(), self.step.state.step, len(windows) - 1
        try:
            self.step.run_several(windows)
        except BaseException:
            num = self.step.state.step - done  # those before the one that broke off
            raise
        finally:
            each = (time.perf_counter() - began) / len(windows)
            self._pending += [(began - self._began + each * (k + 1), self._waits[k]) for k in range(num)]

    def _is_due(self, every: int | None) -> bool:
        return self.step.state.step == self.plan.steps or bool(every and self.step.state.step % every == 0)

    def _evaluation_is_due(self) -> bool:
        return self.evaluate is not None and self._is_due(self.plan.recipe.evaluate.every)

    def _after_step(self) -> StopReason | None:
        """What is due between this step and the next; a reason where there is to be no next."""
        going_on = self.step.state.step < self.plan.steps
        if self.owed:
            try:
                self._evaluate()
            except Interrupted:
                self._save(must=True)  # it stands in the checkpoint that this evaluation is still owed
                return StopReason.INTERRUPTED
        if self._is_due(self.plan.recipe.checkpoint.every) or self._is_best_now():
            self._check_agreement()
            self._save(must=not going_on or self._is_best_now())
        if self.early.is_over() and going_on:
            self._save(must=True)
            return StopReason.STOPPED_EARLY
        if self.target.is_reached() and going_on:
            self._save(must=True)
            return StopReason.REACHED
        diverged, asked, unsaved = self._wishes()
        if diverged:
            return StopReason.DIVERGED
        if asked and going_on:
            self._save(must=True)
            return StopReason.INTERRUPTED
        return StopReason.UNSAVED if unsaved and going_on else None

    def _check_agreement(self) -> None:
        try:
            self.agree()
        except Exception:
            self._saved = self.step.state.step  # what ranks hold differently is not kept
            raise

    def _wishes(self) -> tuple[bool, bool, bool]:
        """Whether to give up, to stop, to end because nothing is saved any more: what any rank wished a step ago, so that all
        of them end after the same one.

        What memory has taught one rank goes the same way: windows are cut alike on all.
        """
        reason = self.watch()
        diverged = self.gave_up or reason is StopReason.DIVERGED
        wishes = diverged, self.stop(), reason is StopReason.UNSAVED
        if self.ranks.world == 1:
            return wishes
        limit = self.step.state.limit
        heard = self.talk.say(*wishes, 1 / limit.most if limit.most else 0.0)
        if heard[3]:
            limit.lower(round(1 / heard[3]))
        return bool(heard[0]), bool(heard[1]), bool(heard[2])

    def flush(self) -> None:
        """Read the rows of all steps since the last flush, in one copy, and pass them on.

        Raises:
            Tripped: where one of them holds up the run; what came after it is thrown away.
        """
        if not self._pending:
            return
        count, end = len(self._pending), self.step.state.step
        rows = self.step.ring.tolist()
        rows = [rows[(i - 1) % RING] for i in range(end - count + 1, end + 1)]
        records = [self._record(end - count + 1 + k, row, self._pending[k]) for k, row in enumerate(rows)]
        self._pending.clear()
        self._flushed_at = time.perf_counter()
        records = self.guard.look(records, rows)
        for record, row in zip(records, rows):
            self.streak = self.guard.in_a_row(self.streak, record, row)
            self.gave_up |= self.streak >= self.plan.recipe.guard.patience
        for sink in self.sinks:
            sink.steps(records)
        self._count_waits()
        self.guard.after()

    def _count_waits(self) -> None:
        """What steps waited for data so far is known to all that ask, and told where it is much."""
        self.spent[WAITING] = self.stall.waited
        beside = sum(self.spent.values()) - self.stall.waited
        if text := self.stall.news(beside, lambda: advice(self.feed, self.plan.recipe)):
            self.tell("data", text, {"waited": round(self.stall.waited, 4)})

    def tell(self, name: str, text: str, detail: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Something that a person should know goes to every sink; of ``step``, or of the last one."""
        for sink in self.sinks:
            sink.event(Event(self.step.state.step if step is None else step, name, text, detail or {}))

    def _tell_of_memory(self) -> None:
        """Passes that memory did not suffice for, in their place among the records."""
        self.flush()
        for limit in self.step.state.limits():
            for text, detail in spoken(limit, self.step.state.model, self.plan.recipe):
                self.tell("out of memory", text, detail)

    def _note(self) -> None:
        now = time.perf_counter()
        self._step_s = (now - self._noted_at) / max(self.step.state.step - self._noted_step, 1)
        self._noted_at, self._noted_step = now, self.step.state.step
        self._pending.append((now - self._began, self.stall.last))
        self.ranks.at = self.step.state.step
        due = now - self._flushed_at > _FLUSH_SECONDS if self._alone else self.step.state.step % _FLUSH_STEPS == 0
        if due or len(self._pending) == RING:
            self.flush()

    def _record(self, step: int, row: list[float], times: tuple[float, float]) -> Record:
        losses, weight, norm, skipped, lr, scale, applied = row[: len(FIELDS)]
        told = self.step.state.timetable.told
        return Record(
            step=step,
            epoch=self.feed.epoch_of(step - 1),
            loss=losses / weight if weight else float("nan"),
            weight=weight,
            grad_norm=norm,
            lr=lr,
            applied=int(applied) + (not skipped),
            skipped=bool(skipped),
            scale=scale,
            seconds=round(times[0], 4),
            waited=round(times[1], 4),
            values={name: number * by for (name, by), number in zip(told.items(), row[len(FIELDS) :])} if told else {},
        )

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        self.flush()
        with self.spending("evaluating"):
            metrics = self.evaluate()
        if self.step.state.evaluation_limit.news:
            self._tell_of_memory()
        wanted = self.plan.recipe.evaluate
        now = self.step.state.step
        value = metrics[wanted.best]
        value = value if math.isfinite(value) else math.nan  # infinite is as good as no number
        if value == value:
            self.ranking.append((value, now))
            self.ranking.sort(key=lambda pair: (pair[0] if wanted.goal == "min" else -pair[0], pair[1]))
        seconds = round(time.perf_counter() - self._began, 4)
        if wanted.every and now % wanted.every == 0:  # the one at a run's end comes out of turn, and is not counted
            self._listen(value if wanted.goal == "min" else -value)
            self.early.tell(value)
            self.target.tell(value)
        self.owed = False  # it has been taken note of: whoever fails to hear of it, it does not count twice
        evaluation = Evaluation(now, metrics, self.best_steps()[:1] == [now], seconds)
        if evaluation.best:
            self.best()
        for sink in self.sinks:
            sink.evaluation(evaluation)

    def _listen(self, value: float) -> None:
        """Schedules that follow evaluations hear of this one; the update before decides whether their piece still lasts."""
        state = self.step.state
        if state.timetable.feedback.hears("evaluation"):
            heard = torch.full((), value, dtype=state.device.exact, device=state.device.torch_device)
            state.timetable.feedback.hear("evaluation", heard, (state.applied - 1).clamp(min=0))

    def best_steps(self) -> list[int]:
        """Steps of the best evaluations so far, best first."""
        return [step for _, step in self.ranking]

    def _is_best_now(self) -> bool:
        return self.step.state.step in self.best_steps()[: self.plan.recipe.checkpoint.keep_best]

    def _save(self, *, must: bool) -> None:
        if self._saved != self.step.state.step:
            self.flush()
            with self.spending("saving"):
                self.save(must)
            self._saved = self.step.state.step

    def _rescue(self) -> None:
        """A step broke off before its update: the state is that of the step before, and is kept; a half moved one is not."""
        self.step.state.statistics.restore()
        with suppress(Exception):  # what broke the step is the error that counts, whatever a sink says
            try:
                self._tell_of_memory()
            except Tripped as trip:
                if self.guard.act(trip.bad) is not None:
                    return  # the newest checkpoint is from before the step that holds up the run
                self.owed = self._evaluation_is_due()
        if self.step.state.step and self.step.state.fully is None:  # parts are put together by all ranks or by none
            with suppress(Exception):
                try:
                    self._save(must=True)
                except Exception as err:
                    self.tell("not saved", str(err) or type(err).__name__)

    def _end(self, reason: StopReason) -> StopReason:
        self.talk.end()
        self.flush()
        if self.step.state.limit.news:
            self._tell_of_memory()
        return reason
