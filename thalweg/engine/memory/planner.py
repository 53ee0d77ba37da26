"""``thalweg plan`` for chips that are not here: the model is made on the meta device, and its passes run on shapes alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from thalweg.core import (
    Change,
    Forecast,
    Form,
    Layout,
    Ledger,
    ParameterRow,
    Recipe,
    RecipeError,
    Task,
    ThalwegError,
    divisors,
    to_bytes,
)
from thalweg.core.parallel import layout_of
from thalweg.data import as_source, make_feed, tree_map
from thalweg.device import Device, choose
from thalweg.device.chips import Chip, chip_called
from thalweg.engine.checks import whole_of
from thalweg.engine.given import made_model, split_of, task_loss
from thalweg.engine.memory.bench import sizes_of
from thalweg.engine.memory.budget import MARGIN, Choice, cheapest_first, ways
from thalweg.engine.memory.forms import Way, forms_of, pick, tell_form
from thalweg.engine.memory.here import cheapest_changes_first, largest_that_fits, smaller_variants
from thalweg.engine.memory.layouts import MACHINE, NETWORK, candidates, gathered, on_rank, rank_sizes, talk_seconds
from thalweg.engine.memory.predict import predict
from thalweg.engine.memory.roofline import ARITHMETIC, Roofline
from thalweg.engine.memory.trace import CannotFake, Line, of_size, trace, trace_line
from thalweg.engine.precision import ISLANDS
from thalweg.engine.recompute import recomputed
from thalweg.engine.release import check_release
from thalweg.engine.settle import Decisions, settle_length, settle_optimizer
from thalweg.optim import parameter_table
from thalweg.optim.sizes import StateSizes
from thalweg.precision import Policy, Prepared, policy_for

_HOST_LINK = 20e9  # bytes a second between a chip and its host (PCIe 4.0 x16, about two thirds of what it states)


@dataclass(frozen=True)
class _There:
    """What is planned with, for chips that are not here."""

    model: nn.Module
    loss: Any
    window: Any  # a few samples
    chip: Chip
    layout: Layout
    here: Device
    models: dict[Any, nn.Module] = field(default_factory=dict)
    lines: dict[Any, Line] = field(default_factory=dict)
    times: dict[Any, float] = field(default_factory=dict)  # seconds of one micro-batch's passes
    states: dict[Any, StateSizes] = field(default_factory=dict)

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

    def sizes(self, recipe: Recipe, layout: Layout | None = None) -> StateSizes:
        """Of the training state on one device; by default, on one that holds all of it."""
        optimizer = recipe.optimizer
        key = recipe.precision, recipe.islands, optimizer.slots, optimizer.release_gradients, optimizer.offload, layout
        if key not in self.states:
            model, rows, kind = self.of(recipe), self.rows(recipe), self.chip.kind
            if layout is None:
                self.states[key] = sizes_of(recipe, rows, model, kind)
            else:
                self.states[key] = rank_sizes(recipe, rows, model, kind, layout, self.sizes(recipe))
        return self.states[key]

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
        whole = gathered(model, self.layout, sizes.gradients, -(-recipe.train.batch // micro))
        return on_rank(ledger, self.sizes(recipe, self.layout), whole)

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
        sizes = self.sizes(recipe, self.layout)
        moved = 2 * (sizes.parameters + sizes.slots + sizes.averages + sizes.offloaded) + sizes.gradients
        update = moved / self.chip.bandwidth + 2 * sizes.offloaded / _HOST_LINK
        passes = -(-recipe.train.batch // micro)
        passes *= 2 if recipe.optimizer.release_gradients == "two-pass" else 1
        passes *= 2 if recipe.regularize.sharpness else 1
        weights, gradients = sum(p.nbytes for p in model.parameters()), self.sizes(recipe).gradients
        return passes * self.times[key] + update + talk_seconds(self.chip, self.layout, weights, gradients, passes)

    def step(self, recipe: Recipe) -> float:
        """Seconds of a step of a complete recipe."""
        return self.seconds(recipe, whole_of(recipe.train.micro_batch))


def _as_here(precision: str) -> str:
    """A precision of this machine with the same dtypes of activations."""
    return {"tf32": "fp32", "fp8": "bf16"}.get(precision, precision)


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
        sharded: spread parameters, gradients and slots over them, as ``parallel = "fsdp"`` does.
        most: bytes to plan with on each, in place of the chip's memory.
        timed: as for ``plan_here``.

    Raises:
        ThalwegError: for a chip that is not known, a recipe that is not possible, a model that cannot be made without values.
    """
    chip = chip_called(chip_name)
    asked = layout_of("fsdp" if sharded else recipe.parallel, devices, MACHINE) if devices > 1 else Layout()
    feeds = devices if asked is None else asked.feeds
    if devices < 1 or recipe.train.batch % feeds:
        raise RecipeError(
            f"{feeds} devices do not share train.batch={recipe.train.batch}.",
            f"{recipe.train.batch}/{max(feeds, 1)} = {recipe.train.batch / max(feeds, 1):.2f}.",
            f"Use one of {', '.join(map(str, divisors(recipe.train.batch)))}.",
        )
    decide = Decisions()
    recipe = settle_optimizer(recipe, decide)
    if recipe.precision == "auto":
        best = "bf16" if "bf16" in chip.rates else "fp16" if "fp16" in chip.rates else "fp32"
        recipe = replace(recipe, precision=decide.take("precision", best, f"{chip.name} has it; a run would measure"))
    chip.rate(recipe.precision)
    split, recipe = split_of(task, recipe, decide.take)
    source = as_source(split.train)
    recipe, steps, _ = settle_length(recipe, source, decide)
    recipe = _on_each(recipe, feeds, decide)
    here, _ = choose("cpu")
    few = min(8, recipe.train.batch)
    feed = make_feed(source, batch=few, micro_batch=few, seed=recipe.seed, keep_last=True, device=here.torch_device)
    window = tree_map(lambda x: x.to("meta"), next(iter(feed.windows(0, 1)))[0])
    with torch.device("meta"):
        model = _without_memory(made_model(task, recipe))
    limit = int(chip.memory * MARGIN) if most is None else most
    there = _There(model, task_loss(task.loss, recipe), window, chip, asked or Layout(data=devices), here)
    there, recipe, forms = _shared(there, recipe, asked, devices, limit, decide, timed=timed)
    check_release(recipe, chip.kind, there.rows(recipe), decide.take)
    micro = whole_of(recipe.train.micro_batch)
    seconds = there.step(recipe) if timed and there.layout.tensor == 1 else None
    ledger = there.ledger(recipe, micro)
    changes = []
    for what, one, note in smaller_variants(recipe, micro, chip.kind) if seconds else ():
        if there.refused(one) is None:
            peak = there.ledger(one, whole_of(one.train.micro_batch)).peak
            if peak < ledger.peak:
                changes.append(Change(what, peak, there.step(one) / (seconds or 1), peak <= limit, note))
    return Forecast(
        task=task.name,
        machine=chip.name,
        devices=devices,
        sharded=there.layout.shard > 1,
        ledger=ledger,
        memory=limit,
        batch=recipe.train.batch * feeds,
        steps=steps,
        largest=largest_that_fits(recipe.train.batch, lambda m: there.ledger(recipe, m).peak, limit),
        seconds=seconds,
        timed=_how_timed(chip, devices, there.layout),
        decisions=tuple((d.path, d.value, d.reason) for d in decide.made),
        changes=tuple(cheapest_changes_first(changes)),
        forms=forms,
    )


def _how_timed(chip: Chip, devices: int, layout: Layout) -> str:
    if layout.tensor > 1:
        return "not computed: layers are cut, and their sums run in the middle of passes"
    text = f"computed: {ARITHMETIC:.0%} of what the {chip.source} states"
    between = f"; {MACHINE} chips a machine, {NETWORK / 1e9:.0f} GB/s a chip between machines"
    return text + between if devices > MACHINE else text


def _shared(
    there: _There,
    recipe: Recipe,
    asked: Layout | None,
    devices: int,
    limit: int,
    decide: Decisions,
    *,
    timed: bool,
) -> tuple[_There, Recipe, tuple[Form, ...]]:
    """How the devices share the model: as asked, or the simplest way that fits; and every way, to choose from."""
    if devices == 1:
        return there, _chosen(there, recipe, limit, decide), ()
    open_ = list(candidates(recipe, there.model, devices)) if timed or asked is None else []
    if asked is not None and all(layout != asked for layout, _ in open_):
        open_.insert(0, (asked, recipe))
    tried: list[tuple[Way, _There, Decisions]] = []
    for layout, one in open_:
        elsewhere, made = replace(there, layout=layout), Decisions()
        filled = _chosen(elsewhere, one, limit, made)
        ledger = elsewhere.ledger(filled, whole_of(filled.train.micro_batch))
        tried.append((Way(layout, filled, ledger), elsewhere, made))
    ways_to = [way for way, _, _ in tried]
    chosen = pick(ways_to, asked, limit)
    mine = next(one for one in tried if one[0] is chosen)
    decide.made += mine[2].made
    if asked is None:
        tell_form(ways_to, chosen, limit, decide.take)
    places = {id(way): elsewhere for way, elsewhere, _ in tried}
    seconds = lambda way: places[id(way)].step(way.recipe) if timed and way.layout.tensor == 1 else None
    return mine[1], chosen.recipe, forms_of(ways_to, chosen, limit, seconds)


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
