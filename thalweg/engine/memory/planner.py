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
    ParameterRow,
    Recipe,
    RecipeError,
    Task,
    ThalwegError,
    divisors,
    to_bytes,
)
from thalweg.data import as_source, make_feed, tree_map
from thalweg.device import Device, choose, memory, ran_out
from thalweg.device.chips import Chip, chip_called
from thalweg.engine.blocks import repeated_blocks
from thalweg.engine.checks import whole_of
from thalweg.engine.given import made_model, split_of, task_loss
from thalweg.engine.memory.bench import Bench, sizes_of
from thalweg.engine.memory.budget import MARGIN, Choice, cheapest_first, ways
from thalweg.engine.memory.predict import predict
from thalweg.engine.memory.prices import Prices
from thalweg.engine.memory.roofline import ARITHMETIC, Roofline
from thalweg.engine.memory.trace import CannotFake, Line, of_size, trace, trace_line
from thalweg.engine.precision import ISLANDS
from thalweg.engine.recompute import recomputed
from thalweg.engine.release import check_release
from thalweg.engine.resolve import resolve
from thalweg.engine.settle import Decisions, settle_length, settle_optimizer
from thalweg.optim import parameter_table
from thalweg.optim.sizes import StateSizes
from thalweg.precision import Policy, Prepared, policy_for

_HOST_LINK = 20e9  # bytes a second between a chip and its host (PCIe 4.0 x16, about two thirds of what it states)


# ---------------------------------------------------------------------------------------------- on this machine


def plan_here(task: Task, recipe: Recipe, *, most: int | None = None, timed: bool = True) -> Forecast:
    """The plan of a run on this machine; steps are timed on copies of the model, and nothing is trained.

    Args:
        most: bytes to plan with, in place of what is there.
        timed: whether time is of interest, and what would make it smaller.

    Raises:
        ThalwegError: for what training itself would refuse.
    """
    resolved = resolve(task, recipe, most=most, planning=True)
    plan, bench = resolved.plan, resolved.bench
    assert plan.ledger is not None and bench is not None
    left = memory.available(resolved.device)
    there = most if left is None and most is not None else memory.there(resolved.device)
    limit = there if most is None else most
    prices = Prices(bench)
    seconds, how = None, "not timed: it does not fit" if timed else "not timed"
    if timed and plan.ledger.peak <= min(limit, there):
        seconds, how = prices.step(plan.recipe), "measured here, on a copy"
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
        timed=how,
        decisions=tuple((d.path, d.value, d.reason) for d in plan.decisions),
        changes=tuple(_changes_here(plan.recipe, bench, prices, seconds, micro, limit)) if timed else (),
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
    window: Any  # a few samples
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

    def rows(self, recipe: Recipe) -> tuple[ParameterRow, ...]:
        return tuple(parameter_table(self.of(recipe), optimizer=recipe.optimizer, schedule=recipe.schedule))

    def sizes(self, recipe: Recipe) -> StateSizes:
        return sizes_of(recipe, self.rows(recipe), self.of(recipe), self.chip.kind)

    def refused(self, recipe: Recipe) -> ThalwegError | None:
        """Why a complete recipe is not possible at all; None where it is."""
        try:
            self.chip.rate(recipe.precision)
            check_release(recipe, self.chip.kind, self.rows(recipe), lambda path, value, why: None)
            self.ledger(recipe, whole_of(recipe.train.micro_batch))
        except CannotFake:
            raise
        except ThalwegError as err:
            return err
        return None

    def ledger(self, recipe: Recipe, micro: int) -> Ledger:
        model, sizes = self.of(recipe), self.sizes(recipe)
        ledger = predict(
            self.line(recipe).at(micro),
            sizes,
            self.here,
            micro_batches=-(-recipe.train.batch // micro),
            buffers=sum(b.nbytes for b in model.buffers()),
            recompute=recipe.recompute or "none",
            process=0,
            accelerator=self.chip.kind != "cpu",
        )
        return self._spread(ledger) if self.sharded else ledger

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
        weights = sum(p.nbytes for p in model.parameters())
        sizes, parts = self.sizes(recipe), self.devices if self.sharded else 1
        moved = 2 * (sizes.parameters + sizes.slots + sizes.averages + sizes.offloaded) + sizes.gradients
        update = moved / parts / self.chip.bandwidth + 2 * sizes.offloaded / parts / _HOST_LINK
        passes = -(-recipe.train.batch // micro)
        passes *= 2 if recipe.optimizer.release_gradients == "two-pass" else 1
        passes *= 2 if recipe.regularize.sharpness else 1
        return passes * self.times[key] + update + self._talk(weights)

    def step(self, recipe: Recipe) -> float:
        """Seconds of a step of a complete recipe."""
        return self.seconds(recipe, whole_of(recipe.train.micro_batch))

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
    task: Task,
    recipe: Recipe,
    chip_name: str,
    *,
    devices: int = 1,
    sharded: bool = False,
    most: int | None = None,
    timed: bool = True,
) -> Forecast:
    """The plan of a run on chips that are not here. The model is made on the meta device, and its passes run on shapes alone.

    Args:
        chip_name: as in ``thalweg.device.chips``.
        devices: how many; each takes an equal share of every step's samples.
        sharded: spread parameters, gradients and slots over them.
        most: bytes to plan with on each, in place of the chip's memory.
        timed: as for ``plan_here``.

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
    recipe = _on_each(recipe, devices, decide)
    here, _ = choose("cpu")
    few = min(8, recipe.train.batch)
    feed = make_feed(source, batch=few, micro_batch=few, seed=recipe.seed, keep_last=True, device=here.torch_device)
    window = tree_map(lambda x: x.to("meta"), next(iter(feed.windows(0, 1)))[0])
    with torch.device("meta"):
        model = _without_memory(made_model(task, recipe))
    limit = int(chip.memory * MARGIN) if most is None else most
    there = _There(model, task_loss(task.loss, recipe), window, chip, devices, sharded, here)
    recipe = _chosen(there, recipe, limit, decide)
    check_release(recipe, chip.kind, there.rows(recipe), decide.take)
    micro = whole_of(recipe.train.micro_batch)
    seconds = there.step(recipe) if timed else None
    ledger = there.ledger(recipe, micro)
    changes = []
    for what, one, note in _variants(recipe, micro, chip.kind) if seconds else ():
        if there.refused(one) is None:
            peak = there.ledger(one, whole_of(one.train.micro_batch)).peak
            if peak < ledger.peak:
                changes.append(Change(what, peak, there.step(one) / (seconds or 1), peak <= limit, note))
    return Forecast(
        task=task.name,
        machine=chip.name,
        devices=devices,
        sharded=sharded,
        ledger=ledger,
        memory=limit,
        batch=recipe.train.batch * devices,
        steps=steps,
        largest=_largest(recipe.train.batch, lambda m: there.ledger(recipe, m).peak, limit),
        seconds=seconds,
        timed=f"computed: {ARITHMETIC:.0%} of what the {chip.source} states",
        decisions=tuple((d.path, d.value, d.reason) for d in decide.made),
        changes=tuple(_cheapest_first(changes)),
    )


def _without_memory(model: nn.Module) -> nn.Module:
    """The model on the meta device; one that lies in memory, given as it is, stays there untouched."""
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        if x.device.type != "meta":
            empty = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
            memo[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(model, memo) if memo else model


def _on_each(recipe: Recipe, devices: int, decide: Decisions) -> Recipe:
    """The recipe as each of the devices sees it: its share of every step's samples, its micro-batch a part of that."""
    share, micro = recipe.train.batch // devices, recipe.train.micro_batch
    if isinstance(micro, int) and share % micro:
        fitting = max(d for d in divisors(share) if d <= micro)
        micro = decide.take("train.micro_batch", fitting, f"of {micro}: each device has {share} samples of a step")
    return replace(recipe, train=replace(recipe.train, batch=share, micro_batch=micro))


def _chosen(there: _There, recipe: Recipe, limit: int, decide: Decisions) -> Recipe:
    """What is left open is filled: the largest micro-batch that fits, or, with a budget, what is fastest within it."""
    budget = recipe.memory_budget
    limit = limit if budget is None else min(limit, to_bytes(budget, "memory_budget"))
    refused = [(one, there.refused(one)) for one in ways(recipe)]
    every = [Choice(one, there.ledger(one, whole_of(one.train.micro_batch))) for one, why in refused if why is None]
    if not every:
        raise next(why for _, why in refused if why is not None)
    fitting = [choice for choice in every if choice.ledger.peak <= limit]
    if budget is not None:
        fitting = cheapest_first(fitting, there.step)
    chosen = fitting[0].recipe if fitting else min(every, key=lambda choice: choice.ledger.peak).recipe
    told = "predicted to fit" if fitting else "the least; it does not fit"
    before = recipe.flat()
    for path in (
        "train.micro_batch",
        "recompute",
        "optimizer.slots",
        "optimizer.release_gradients",
        "optimizer.offload",
    ):
        if before.get(path) in (None, "auto") and (budget is not None or path == "train.micro_batch"):
            decide.take(path, chosen.flat()[path], told)
    return chosen
