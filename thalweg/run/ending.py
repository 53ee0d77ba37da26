"""What is left to do when a run is over, however it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from thalweg.core import Sink, StopReason
from thalweg.engine import Step
from thalweg.regularize import PreciseStatistics, set_factors
from thalweg.run.best import BestWeights
from thalweg.run.saving import Saving


def wind_up(reason: StopReason, saving: Saving | None, step: Step, sinks: Sequence[Sink]) -> StopReason:
    """Nothing follows but what must be done: each part of it, whatever another raises; the first error is passed on."""
    found: list[BaseException] = []
    if saving is not None:
        try:
            reason = saving.finish(reason)
        except BaseException as err:
            reason, found = StopReason.FAILED, [err]
    if step.recomputation is not None:
        step.recomputation.release()
    for sink in sinks:
        try:
            sink.stop(reason)
        except BaseException as err:
            found.append(err)
    if found:
        raise found[0]
    return reason


def hand_over(step: Step, precise: PreciseStatistics | None, keeper: BestWeights | None) -> None:
    """The model has the weights that were evaluated."""
    step.state.adopt_average()
    if precise is not None:
        with step.state.whole():
            found = precise.estimate(version=step.state.step)
        found.put(step.state.model)
    if keeper is not None:
        keeper.adopt()
    if step.state.fully is not None:
        step.state.fully.release()


def give_back(step: Step) -> None:
    """The model is the user's again, however the run has ended; its layers draw from torch's generator."""
    if step.recomputation is not None:
        step.recomputation.release()
    if step.waiting is not None:
        step.waiting.release()
    if step.state.fully is not None:
        step.state.fully.release(together=False)  # where the run came to its end, it is done already
    if step.streams is not None:
        step.streams.release()
        set_factors(step.state.model, {"dropout": None, "stochastic_depth": None})
