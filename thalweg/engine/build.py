"""Plan -> State and Step: arenas, schedules as one table on the device, the loss scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import Plan, seed_for
from thalweg.device import Device
from thalweg.engine.fully import FullySharded, cut
from thalweg.engine.host_step import HostStep, suits
from thalweg.engine.precision import gradient_dtype
from thalweg.engine.preflight import ModelLoss
from thalweg.engine.recompute import recompute
from thalweg.engine.regularizers import TaskLoss, make_streams
from thalweg.engine.release import Release
from thalweg.engine.released import ReleasedStep
from thalweg.engine.scheduled import (
    Scheduled,
    average_lengths,
    scheduled,
    span_of,
)
from thalweg.engine.sharded_step import ShardedStep
from thalweg.engine.spread import Spread
from thalweg.engine.state import State
from thalweg.engine.step import Step, StepOptions
from thalweg.engine.tensor import TensorParallel, cut_layers
from thalweg.engine.tensor_step import TensorStep
from thalweg.engine.timetable import Timetable
from thalweg.optim import make_arenas, named_trainable
from thalweg.optim.arena import How
from thalweg.optim.weights import average_share
from thalweg.parallel import ALONE, Ranks
from thalweg.precision import Policy
from thalweg.regularize import swa_shares
from thalweg.rules import RULES
from thalweg.schedules import Span


def build(
    plan: Plan,
    model: nn.Module,
    loss: ModelLoss,
    device: Device,
    policy: Policy,
    ranks: Ranks = ALONE,
    tried: Any = None,
) -> Step:
    """The step of a plan; the model's parameters become views of flat buffers.

    Args:
        tried: a micro-batch that is the same on all ranks, to look at a model whose layers are cut.
    """
    recipe = plan.recipe
    optimizer, regularize = recipe.optimizer, recipe.regularize
    in_update = regularize.averages and regularize.average_form != "window"
    peak = optimizer.lr if optimizer.lr is not None else RULES[optimizer.rule].lr
    releases = optimizer.release_gradients not in (None, "off")
    how = How(
        slots=optimizer.slots or "full",
        rounding=optimizer.rounding,
        average=in_update,
        peak=peak or 1.0,
        seed=seed_for(recipe.seed, "rounding"),
        way=optimizer.way,
        release=releases,
        offload=bool(optimizer.offload),
        gradients=gradient_dtype(recipe),
        take=(on_host := suits(recipe, policy, device, ranks)),
    )
    fully: FullySharded | TensorParallel | None = None
    if plan.layout.get("tensor", 1) > 1 and ranks.world > 1:
        fully, feeds = cut_layers(model, plan, device, ranks, loss, policy, tried)
        arenas = fully.arenas(plan.parameters, optimizer, how)
    elif ranks.world == 1 or plan.layout.get("shard", 1) == 1:
        arenas = make_arenas(named_trainable(model), plan.parameters, optimizer, how)
    else:
        fully = cut(model, plan, device, ranks)
        arenas = make_arenas(fully.parts(), plan.parameters, optimizer, how, fully.arena)
        fully.take(arenas)
    span = run_span(plan)
    timetable = make_timetable(plan, span, device, loss)
    state = State(
        model,
        arenas,
        device,
        timetable,
        scaled=policy.scaled,
        average=in_update,
        clip_history=recipe.train.clip_history,
        window=average_times(plan, span) if regularize.average_form == "window" else None,
        guard=recipe.guard,
        fully=fully,
    )
    if isinstance(loss, TaskLoss):
        loss.move(timetable.now)
    options = StepOptions(
        seed=recipe.seed,
        clip=recipe.train.clip,
        loss_divisor=plan.loss_divisor,
        sharpness=regularize.sharpness,
        sharpness_scaled=regularize.sharpness_scaled,
        micro_batch=recipe.train.micro_batch if isinstance(recipe.train.micro_batch, int) else 0,
        exact=recipe.exact_reduce,
    )
    streams = make_streams(model, recipe, device.torch_device, timetable.now)
    again = recompute(model, recipe.recompute or "none")
    release = Release(arenas, two_pass=optimizer.release_gradients == "two-pass") if releases else None
    if recipe.compile in ("off", "auto"):  # a variant that is tried has no compiler
        if release is not None:
            return ReleasedStep(state, loss, policy, options, streams, again, release=release)
        if isinstance(fully, TensorParallel):
            state.spread = Spread(state, ranks)
            step = TensorStep(state, loss, policy, options, streams, again, feeds)
            step.tensor = fully
            return step
        if fully is not None:
            state.spread = Spread(state, ranks)
            return ShardedStep(state, loss, policy, options, streams, again, ranks, fully=fully)
        return (HostStep if on_host else Step)(state, loss, policy, options, streams, again, ranks)
    from thalweg.engine.compiled_build import compiled_step  # it imports torch's compiler

    several = recipe.steps_per_call
    return compiled_step(recipe.compile, state, loss, policy, options, streams, again, ranks, release, several)


def run_span(plan: Plan) -> Span:
    """The run as its schedules see it."""
    return span_of(plan.recipe, plan.steps, plan.per_step, plan.why_not, samples=plan.samples, sequence=plan.sequence)


def make_timetable(plan: Plan, span: Span, device: Device, loss: ModelLoss) -> Timetable:
    """A row for each number of applied updates; beyond the end, the last one stays."""
    moved = scheduled(plan.recipe, loss.known if isinstance(loss, TaskLoss) else None)
    rows = {one.name: one.row(span) for one in moved if one.name != "average"}
    shares = average_shares(plan, span, next((one for one in moved if one.name == "average"), None))
    if shares:
        rows["share"] = shares
    heard = [(one.name, piece) for one in moved if one.name != "average" for piece in one.schedule.listening(span)]
    scales = {one.name: one.told for one in moved if one.name not in ("lr", "average")}
    return Timetable(rows, device, heard, scales)


def average_shares(plan: Plan, span: Span, moved: Scheduled | None) -> list[float]:
    """How far the average moves towards the weights at each update; empty where none moves in the update.

    An exponential average's table reaches at least to where its decay is full, so that a loop without a known end keeps it
    from there on.
    """
    wanted = plan.recipe.regularize
    if wanted.average_form == "swa":
        _, start, every = average_times(plan, span)
        return [*swa_shares(plan.steps, start, every), 0.0]  # past the end it stays as it is
    if not wanted.average:
        return []
    full = min(math.ceil((10 * wanted.average - 1) / (1 - wanted.average)), _LONGEST_YOUTH)
    updates = torch.arange(1, max(plan.steps, full) + 1, dtype=torch.float64)
    decay: float | Tensor = wanted.average
    if moved is not None:
        decays = moved.values(span)
        decay = torch.tensor([*decays, *[decays[-1]] * (len(updates) - len(decays))], dtype=torch.float64)
    shares: list[float] = average_share(decay, updates).tolist()
    return shares


_LONGEST_YOUTH = 200_000  # updates; a decay that is not full by then stays as it is past the end of the run


def average_times(plan: Plan, span: Span) -> tuple[int, int, int]:
    """(weights in the window, first update or step whose weights count, updates between two)."""
    return plan.recipe.regularize.average_window, *average_lengths(plan.recipe, span)
