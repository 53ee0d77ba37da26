"""What share of a chip's arithmetic a run used: its model's floating-point operations a second over those that are stated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from thalweg.core.plan import Plan
from thalweg.core.record import Evaluation, Record

#: Of the steps, those that come first and are not counted: compiling, warming up, measuring.
_FIRST = 0.2
#: (step, seconds of training since the process began)
Time = tuple[int, float]


def training_times(lines: Iterable[Record | Evaluation]) -> list[Time]:
    """When the last process of a run had done each step, what evaluations took left out.

    Args:
        lines: in the order in which they came; seconds begin again where a run was resumed.
    """
    times: list[Time] = []
    before = away = 0.0
    for line in lines:
        if line.seconds < before:
            times, away = [], 0.0
        if isinstance(line, Evaluation):
            away += max(0.0, line.seconds - before)
        else:
            times.append((line.step, line.seconds - away))
        before = line.seconds
    return times


def flops_use(plan: Plan, times: Sequence[Time]) -> float | None:
    """Model FLOPs use of a run, as PaLM counts it (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Products of the forward pass count three times, for the backward pass too; what is computed again counts nothing. None where
    the chip's data sheet is not known, the operations were not counted, or batches change their size.
    """
    peak, flops = plan.machine.get("peak_flops"), 0.0 if plan.ledger is None else plan.ledger.flops
    times = times[int(_FIRST * len(times)) :]
    schedule = plan.recipe.schedule
    if not peak or not flops or schedule.batch or schedule.sequence or len(times) < 2 or times[-1][1] <= times[0][1]:
        return None
    ranks = next((made.value for made in plan.decisions if made.path == "ranks"), 1)
    steps = (times[-1][0] - times[0][0]) / (times[-1][1] - times[0][1])
    return float(steps * plan.recipe.train.batch * flops / (peak * int(ranks)))


def told_use(plan: Plan, times: Sequence[Time]) -> str:
    """The same as a sentence; empty where it is not known."""
    share = flops_use(plan, times)
    if share is None:
        return ""
    stated = f"{plan.machine['peak_flops'] / 1e12:g} TFLOP/s that {plan.machine['chip']} has in {plan.recipe.precision}"
    return f"Model FLOPs use: {share:.1%} of the {stated}."
