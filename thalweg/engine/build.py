"""Plan -> State and Step: arenas, schedules as tables on the device, the loss scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from thalweg.core import Plan, seed_for
from thalweg.device import Device
from thalweg.engine.preflight import ModelLoss
from thalweg.engine.state import State
from thalweg.engine.step import Step, StepOptions
from thalweg.optim import make_arenas, named_trainable
from thalweg.optim.arena import How
from thalweg.precision import Policy
from thalweg.rules import RULES
from thalweg.schedules import parse


def build(plan: Plan, model: nn.Module, loss: ModelLoss, device: Device, policy: Policy) -> Step:
    """The step of a plan; the model's parameters become views of flat buffers."""
    recipe = plan.recipe
    optimizer = recipe.optimizer
    average = recipe.regularize.average > 0
    peak = optimizer.lr if optimizer.lr is not None else RULES[optimizer.rule].lr
    how = How(
        slots=optimizer.slots,
        rounding=optimizer.rounding,
        average=average,
        peak=peak or 1.0,
        seed=seed_for(recipe.seed, "rounding"),
        way=optimizer.way,
    )
    arenas = make_arenas(named_trainable(model), plan.parameters, optimizer, how)
    state = State(model, arenas, device, scaled=policy.scaled, average=average, clip_history=recipe.train.clip_history)
    factors = parse(recipe.schedule.lr).values(plan.steps)
    options = StepOptions(
        seed=recipe.seed,
        clip=recipe.train.clip,
        loss_divisor=plan.loss_divisor,
        lrs=torch.tensor([peak * factor for factor in factors], dtype=device.exact, device=device.torch_device),
        shares=average_shares(recipe.regularize.average, plan.steps, device) if average else None,
        sharpness=recipe.regularize.sharpness,
        sharpness_scaled=recipe.regularize.sharpness_scaled,
    )
    return Step(state, loss, policy, options)


def average_shares(decay: float, steps: int, device: Device) -> Tensor:
    """1 - min(decay, (1 + t)/(10 + t)) for update t = 1, 2, ...: young averages forget their beginning faster.

    The table reaches at least to where the decay is full, so that a loop without a known end keeps it from there on.
    """
    full = math.ceil((10 * decay - 1) / (1 - decay))
    updates = torch.arange(1, max(steps, full) + 1, dtype=torch.float64)
    shares = 1 - torch.minimum(torch.tensor(decay, dtype=torch.float64), (1 + updates) / (10 + updates))
    return shares.to(device.torch_device, device.exact)
