"""``thalweg plan``: what a run will take in memory and time, on this machine or on one that is not here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from thalweg.core import (
    Change,
    Forecast,
    Ledger,
    Recipe,
    RecipeError,
    Task,
    ThalwegError,
    divisors,
)
from thalweg.data import as_source, make_feed, tree_map
from thalweg.device import Device, choose, memory, ran_out
from thalweg.device.chips import Chip, chip_called
from thalweg.engine.blocks import repeated_blocks
from thalweg.engine.checks import whole_of
from thalweg.engine.given import made_model, split_of, task_loss
from thalweg.engine.memory.bench import Bench
from thalweg.engine.memory.budget import MARGIN
from thalweg.engine.memory.predict import predict
from thalweg.engine.memory.prices import Prices
from thalweg.engine.memory.roofline import ARITHMETIC, Roofline
from thalweg.engine.memory.settle import settle_memory
from thalweg.engine.memory.trace import Line, of_size, trace, trace_line
from thalweg.engine.precision import ISLANDS, gradient_dtype
from thalweg.engine.recompute import recomputed
from thalweg.engine.resolve import resolve
from thalweg.engine.settle import Decisions, settle_length, settle_optimizer
from thalweg.optim import named_trainable, parameter_table
from thalweg.optim.sizes import state_sizes
from thalweg.precision import Policy, Prepared, policy_for

_HOST_LINK = 20e9  # bytes a second between a chip and its host (PCIe 4.0 x16, about two thirds of what it states)


# ---------------------------------------------------------------------------------------------- on this machine


def plan_here(task: Task, recipe: Recipe, *, most: int | None = None) -> Forecast:
    """The plan of a run on this machine; steps are timed on copies of the model, and nothing is trained.

    Args:
        most: bytes to plan with, in place of what is there.

    Raises:
        ThalwegError: for what training itself would refuse.
    """
    resolved = resolve(task, recipe, most=most, planning=True)
    plan, bench = resolved.plan, resolved.bench
    assert plan.ledger is not None and bench is not None
    there = memory.in_use(resolved.device) + memory.available(resolved.device)
    limit = there if most is None else most
    prices = Prices(bench)
    seconds: float | None = None
    timed = "not timed: it does not fit"
    if plan.ledger.peak <= min(limit, there):
        seconds, timed = prices.step(plan.recipe), "measured here, on a copy"
    micro = whole_of(plan.recipe.train.micro_batch)
    return Forecast(
        task=plan.task,
        machine=str(plan.machine["name"]),
        devices=1,
        sharded=False,
        ledger=plan.ledger,
        memory=limit,
        batch=plan.recipe.train.batch,
        steps=plan.steps,
        largest=_largest(plan.recipe.train.batch, lambda m: _at(bench, plan.recipe, m), limit),
        seconds=seconds,
        timed=timed,
        decisions=tuple((d.path, d.value, d.reason) for d in plan.decisions),
        changes=tuple(_changes_here(plan.recipe, bench, prices, seconds, micro, limit)),
    )


def _at(bench: Bench, recipe: Recipe, micro: int) -> int:
    return bench.ledger(replace(recipe, train=replace(recipe.train, micro_batch=micro))).peak


def _largest(batch: int, peak: Callable[[int], int], limit: int) -> int:
    return next((m for m in divisors(batch)[::-1] if peak(m) <= limit), 0)


def _variants(recipe: Recipe, micro: int, kind: str) -> Iterator[tuple[str, Recipe, str]]:
    """(what, recipe, what else it changes) of single changes that make a run smaller."""

    def changed(path: str, value: Any, note: str = "") -> tuple[str, Recipe, str]:
        return f"{path}={value}", recipe.override({path: value}), note

    smaller = [d for d in divisors(micro) if d < micro]
    if smaller:
        yield changed("train.micro_batch", min(smaller, key=lambda d: abs(d - micro / 2)))
    if recipe.recompute == "none":
        yield changed("recompute", "ops")
        yield changed("recompute", "blocks")
    if recipe.optimizer.slots == "full":
        yield changed("optimizer.slots", "int8", "slots are rounded, at random and right on average")
    if recipe.optimizer.release_gradients == "off" and micro == recipe.train.batch:
        yield changed("optimizer.release_gradients", "two-pass" if recipe.train.clip else "one-pass")
    if recipe.precision == "fp32":
        yield changed("precision", "bf16", "products in bfloat16")
        yield changed("precision", "bf16-pure", "weights in bfloat16, rounded at random")
    if not recipe.optimizer.offload and kind != "cpu":
        yield changed("optimizer.offload", "true")


def _changes_here(
    recipe: Recipe, bench: Bench, prices: Prices, seconds: float | None, micro: int, limit: int
) -> list[Change]:
    found = []
    for what, one, note in _variants(recipe, micro, bench.device.kind):
        there = bench
        if one.precision != recipe.precision:
            try:
                there = bench.at(one.precision)
                there.ledger(one)
            except Exception as err:  # a model that does not run in it: no change to offer
                if ran_out(err):
                    raise
                continue
        if there.refused(one) is not None:
            continue
        peak = there.ledger(one).peak
        if peak < bench.ledger(recipe).peak:
            price = (prices if there is bench else Prices(there)).step(one) / seconds if seconds else None
            found.append(Change(what, peak, price, peak <= limit, note))
    return _cheapest_first(found)


def _cheapest_first(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda c: (round(c.price, 2) if c.price is not None else math.inf, c.peak))


# ---------------------------------------------------------------------------------------------- on a machine elsewhere


@dataclass(frozen=True)
class _There:
    """What is planned with, for chips that are not here."""

    model: nn.Module
    loss: Any
    window: Any  # samples of one device's window, small: as many as were read
    recipe: Recipe
    chip: Chip
    devices: int
    sharded: bool
    here: Device
    models: dict[Any, nn.Module] = field(default_factory=dict)
    lines: dict[Any, Line] = field(default_factory=dict)
    times: dict[Any, float] = field(default_factory=dict)  # seconds of one micro-batch's passes

    def of(self, recipe: Recipe) -> nn.Module:
        """The model as a precision prepares it: a copy, which takes nothing."""
        key = recipe.precision, recipe.islands
        if key not in self.models:
            narrow = _as_here(recipe.precision) != "fp32"
            model = copy.deepcopy(self.model)
            islands = ISLANDS if narrow and recipe.islands is None else recipe.islands or ()
            Prepared(model, self.policy(recipe), self.here, islands).keep()
            self.models[key] = model
        return self.models[key]

    def policy(self, recipe: Recipe) -> Policy:
        return policy_for(_as_here(recipe.precision), self.here, recipe.islands)

    def line(self, recipe: Recipe) -> Line:
        key = recipe.precision, recipe.islands, recipe.recompute
        if key not in self.lines:
            model = self.of(recipe)
            with recomputed(model, recipe.recompute or "none"):
                self.lines[key] = trace_line(
                    model, self.loss, self.window, self.here, self.policy(recipe), seed=recipe.seed, fake=True
                )
        return self.lines[key]

    def ledger(self, recipe: Recipe, micro: int) -> Ledger:
        optimizer, model = recipe.optimizer, self.of(recipe)
        rows = parameter_table(model, optimizer=optimizer, schedule=recipe.schedule)
        wanted = recipe.regularize
        sizes = state_sizes(
            named_trainable(model),
            rows,
            optimizer,
            average=wanted.averages and wanted.average_form != "window",
            device_kind=self.chip.kind,
            gradients=gradient_dtype(recipe),
        )
        ledger = predict(
            self.line(recipe).at(micro),
            sizes,
            self.here,
            micro_batches=-(-self._share(recipe) // micro),
            buffers=sum(b.nbytes for b in model.buffers()),
            recompute=recipe.recompute or "none",
            process=0,
            accelerator=self.chip.kind != "cpu",
        )
        return self._spread(ledger) if self.sharded else ledger

    def _share(self, recipe: Recipe) -> int:
        """Samples of a step on one device."""
        return recipe.train.batch // self.devices

    def _spread(self, whole: Ledger) -> Ledger:
        """Every device holds its part of the state; a block's parameters are gathered while it runs, the next one's ahead."""
        n = self.devices
        parts = {k: -(-getattr(whole, k) // n) for k in ("parameters", "gradients", "slots", "averages")}
        saved = sum(getattr(whole, k) for k in parts) - sum(parts.values())
        gathered = 3 * _largest_block(self.model)  # two blocks' parameters and one block's gradients, whole
        return replace(whole, **parts, temporary=whole.temporary + gathered, peak=whole.peak - saved + gathered)

    def seconds(self, recipe: Recipe, micro: int) -> float:
        """Seconds of a step."""
        model = self.of(recipe)
        key = recipe.precision, recipe.islands, recipe.recompute, micro
        if key not in self.times:
            mode = Roofline(self.chip, recipe.precision)
            batch = of_size(self.window, micro)
            with recomputed(model, recipe.recompute or "none"):
                trace(model, self.loss, batch, self.here, self.policy(recipe), fake=True, also=mode)
            self.times[key] = mode.seconds
        passes = -(-self._share(recipe) // micro)
        weights = sum(p.nbytes for p in model.parameters())
        state = self.ledger(recipe, micro)
        update = 2 * (state.parameters + state.slots + state.averages) + state.gradients
        update_s = update / self.chip.bandwidth
        if recipe.optimizer.offload:
            update_s += 2 * state.slots / _HOST_LINK
        twice = 2 if recipe.optimizer.release_gradients == "two-pass" else 1
        return twice * passes * self.times[key] + update_s + self._talk(weights)

    def _talk(self, weights: int) -> float:
        """Seconds of talk between the devices in a step: gradients summed, or blocks gathered twice and scattered once."""
        n = self.devices
        return 0.0 if n == 1 else (3 if self.sharded else 2) * (n - 1) / n * weights / self.chip.link


def _as_here(precision: str) -> str:
    """A precision of this machine with the same dtypes of activations."""
    return {"tf32": "fp32", "fp8": "bf16"}.get(precision, precision)


def _largest_block(model: nn.Module) -> int:
    """Bytes of the parameters of the largest block that would be gathered at once."""
    blocks = list(repeated_blocks(model).values())
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    return max([outside, *(sum(p.nbytes for p in block.parameters()) for block in blocks)])


def plan_there(
    task: Task, recipe: Recipe, chip_name: str, *, devices: int = 1, sharded: bool = False, most: int | None = None
) -> Forecast:
    """The plan of a run on chips that are not here. The model is made on the meta device, and its passes run on shapes alone.

    Args:
        chip_name: as in ``thalweg.device.chips``.
        devices: how many; each takes an equal share of every step's samples.
        sharded: spread parameters, gradients and slots over them.
        most: bytes to plan with on each, in place of the chip's memory.

    Raises:
        ThalwegError: for a chip that is not known, a recipe that is not possible, a model that cannot be made without values.
    """
    chip = chip_called(chip_name)
    if devices < 1 or recipe.train.batch % devices:
        raise RecipeError(
            f"{devices} devices do not share train.batch={recipe.train.batch}.",
            f"{recipe.train.batch}/{max(devices, 1)} = {recipe.train.batch / max(devices, 1):.2f}.",
            f"Use one of {', '.join(map(str, divisors(recipe.train.batch)))}.",
        )
    decide = Decisions()
    recipe = settle_optimizer(recipe, decide)
    if recipe.precision == "auto":
        best = "bf16" if "bf16" in chip.rates else "fp16" if "fp16" in chip.rates else "fp32"
        recipe = replace(recipe, precision=decide.take("precision", best, f"{chip.name} has it; a run would measure"))
    chip.rate(recipe.precision)
    split = split_of(task, recipe)
    source = as_source(split.train)
    recipe, steps, _ = settle_length(recipe, source, decide)
    here, _ = choose("cpu")
    few = min(8, recipe.train.batch // devices)
    feed = make_feed(source, batch=few, micro_batch=few, seed=recipe.seed, keep_last=True, device=here.torch_device)
    window = tree_map(lambda x: x.to("meta"), next(iter(feed.windows(0, 1)))[0])
    with torch.device("meta"):
        model = made_model(task, recipe)
    limit = int(chip.memory * MARGIN) if most is None else most
    there = _There(model, task_loss(task.loss, recipe), window, recipe, chip, devices, sharded, here)
    recipe, micro = _micro_there(there, recipe, limit, decide)
    seconds = there.seconds(recipe, micro)
    ledger = there.ledger(recipe, micro)
    changes = []
    for what, one, note in _variants(recipe, micro, chip.kind):
        try:
            size = whole_of(one.train.micro_batch)
            peak, price = there.ledger(one, size).peak, there.seconds(one, size) / seconds
        except ThalwegError:
            continue
        if peak < ledger.peak:
            changes.append(Change(what, peak, price, peak <= limit, note))
    return Forecast(
        task=task.name,
        machine=chip.name,
        devices=devices,
        sharded=sharded,
        ledger=ledger,
        memory=limit,
        batch=recipe.train.batch,
        steps=steps,
        largest=_largest(recipe.train.batch // devices, lambda m: there.ledger(recipe, m).peak, limit),
        seconds=seconds,
        timed=f"computed: {ARITHMETIC:.0%} of what the {chip.source} states",
        decisions=tuple((d.path, d.value, d.reason) for d in decide.made),
        changes=tuple(_cheapest_first(changes)),
    )


def _micro_there(there: _There, recipe: Recipe, limit: int, decide: Decisions) -> tuple[Recipe, int]:
    """The micro-batch on each device: as given, or the largest that fits."""
    share = recipe.train.batch // there.devices
    complete = settle_memory(recipe)
    if recipe.train.micro_batch != "auto":
        given = whole_of(recipe.train.micro_batch)
        micro = max(d for d in divisors(share) if d <= given)
        if micro != given:
            decide.take("train.micro_batch", micro, f"{given} of {share} samples on each device")
    else:
        micro = _largest(share, lambda m: there.ledger(complete, m).peak, limit) or 1
        decide.take("train.micro_batch", micro, "the largest that is predicted to fit")
    return replace(complete, train=replace(complete.train, micro_batch=micro)), micro
