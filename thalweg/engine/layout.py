"""How the ranks of a run stand: what the recipe asks for, or what its memory asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from thalweg.core import Layout, Ledger, Plan, Recipe, RecipeError, ThalwegError
from thalweg.core.parallel import layout_of, told
from thalweg.device import Device, memory
from thalweg.engine.checks import whole_of
from thalweg.engine.memory.bench import sizes_of
from thalweg.engine.memory.budget import MARGIN
from thalweg.engine.memory.forms import Way, pick, tell_form
from thalweg.engine.memory.layouts import candidates, gathered, on_rank, rank_sizes
from thalweg.engine.settle import Decisions
from thalweg.engine.together import check_parts, check_ranks, settle_micro_batch
from thalweg.parallel import Ranks, ranks_on_each


def settle_layout(recipe: Recipe, ranks: Ranks, decide: Decisions, saved: Plan | None) -> Layout | None:
    """How the ranks stand; None where the memory plan has to say.

    Args:
        saved: of the run that is resumed; what it had chosen by itself, it keeps, on as many ranks as there are now.

    Raises:
        RecipeError: for what these ranks cannot be.
    """
    asked = recipe.parallel
    if ranks.world == 1:
        if asked != "auto":
            decide.take("parallel", told(asked), "not used: one rank holds all of it, and it is the same run")
        return Layout()
    layout = layout_of(asked, ranks.world, ranks_on_each(ranks.world))
    if layout is None and saved is not None and saved.layout:
        return _again(Layout(**saved.layout), ranks.world)
    if layout is not None:
        check_layout(layout, recipe)
    return layout


def _again(before: Layout, world: int) -> Layout:
    """The same form on another number of ranks."""
    if before.ranks == world:
        return before
    return Layout(data=world) if before.shard == 1 else Layout(shard=world)


def check_layout(layout: Layout, recipe: Recipe) -> None:
    """Refuse what does not go with cut layers.

    Raises:
        RecipeError: naming it.
    """
    if layout.tensor == 1:
        return
    asked = f"parallel={told(recipe.parallel)}"
    refused = [
        (layout.shard > 1, f"shard={layout.shard}", "parallel={data=..., tensor=...}, or parallel='fsdp'"),
        (recipe.exact_reduce, "exact_reduce=true", "exact_reduce=false: layers in parts add up in another order"),
        (recipe.regularize.sharpness > 0, "regularize.sharpness", "regularize.sharpness=0"),
        (recipe.regularize.average_form == "window", "regularize.average_form='window'", "average_form='ema'"),
        (recipe.regularize.precise > 0, "regularize.precise", "regularize.precise=0"),
        (bool(recipe.regularize.penalties), "regularize.penalties", "optimizer.weight_decay"),
        (recipe.recompute not in (None, "none"), f"recompute='{recipe.recompute}'", "recompute='none'"),
        (recipe.precision in ("bf16-pure", "fp8"), f"precision='{recipe.precision}'", "precision='bf16'"),
        (recipe.memory_budget is not None, "memory_budget", "train.micro_batch as a number"),
        (recipe.train.micro_batch == "auto", "train.micro_batch='auto'", "train.micro_batch as a number"),
    ]
    for is_there, what, instead in refused:
        if is_there:
            raise RecipeError(
                f"{asked} does not go with {what}.",
                f"{layout.tensor} ranks compute each layer together, and have parts of its weights and activations.",
                f"Use {instead}, or another parallel.",
            )


@dataclass(frozen=True)
class Planned:
    """What is known of a run when its ranks are told how to stand.

    Attributes:
        recipe: complete, but for ``recompute`` where it is left open.
        whole: what one process takes that holds everything; None where it could not be predicted.
        ledger_of: the same of another recipe.
        plan: of the recipe; the model as it will be trained.
    """

    recipe: Recipe
    whole: Ledger | None
    ledger_of: Callable[[Recipe], Ledger | None]
    plan: Plan
    model: nn.Module
    device: Device

    def way(self, layout: Layout, recipe: Recipe) -> Way | None:
        """What a rank takes in one form."""
        recipe = replace(recipe, recompute=recipe.recompute or "none")
        assert self.whole is not None
        ledger = self.whole if recipe.recompute == self.whole.recompute else self.ledger_of(recipe)
        if ledger is None:
            return None
        if layout.shard > 1 or layout.tensor > 1:
            rows, kind = self.plan.parameters, self.device.kind
            sizes = sizes_of(recipe, rows, self.model, kind)
            num = -(-recipe.train.batch // whole_of(recipe.train.micro_batch))
            kept = gathered(self.model, layout, sizes.gradients, -(-num // layout.feeds))
            ledger = on_rank(ledger, rank_sizes(recipe, rows, self.model, kind, layout, sizes), kept)
        return Way(layout, recipe, ledger)


def fitting_layout(
    settled: Layout | None, planned: Planned, ranks: Ranks, decide: Decisions
) -> tuple[Layout, Recipe, Ledger | None]:
    """What was asked for; or the simplest form that fits this rank's memory, or the least where none does.

    Returns:
        The layout, the complete recipe, and the ledger of a rank.
    """
    recipe = planned.recipe
    complete = replace(recipe, recompute=recipe.recompute or "none")
    if planned.whole is None:
        if settled is None:
            decide.take("parallel", "ddp", "what training takes is not predicted, so that nothing else can be planned")
        return settled or Layout(data=ranks.world), complete, None
    if settled is not None:
        way = planned.way(settled, complete)
        return settled, complete, None if way is None else way.ledger
    limit, tried = _limit(planned.device, ranks.world), []
    why_not = _why_no_parts(planned.model, recipe)
    for layout, one in candidates(recipe, planned.model, ranks.world, ranks_on_each(ranks.world)):
        way = None if layout.shard > 1 and why_not else planned.way(layout, one)
        tried += [] if way is None else [way]
        if way is not None and way.ledger.peak <= limit:
            break
    chosen = pick(tried, None, limit)
    tell_form(tried, chosen, limit, decide.take)
    if chosen.ledger.peak > limit and why_not:
        decide.take("parallel='fsdp'", "not possible", why_not)
    return chosen.layout, chosen.recipe, chosen.ledger


def _why_no_parts(model: nn.Module, recipe: Recipe) -> str:
    """Why parameters cannot lie in parts; "" where they can."""
    try:
        check_parts(model, recipe)
    except ThalwegError as err:
        return err.asked
    return ""


def _limit(device: Device, world: int) -> int:
    """Bytes that a rank may take; ranks of one machine share its memory where they train on the CPU."""
    there = memory.there(device)
    if device.kind == "cpu":
        there = memory.in_use(device) + (there - memory.in_use(device)) // ranks_on_each(world)
    return int(there * MARGIN)


def on_ranks(recipe: Recipe, world: int, layout: Layout, decide: Decisions) -> Recipe:
    """What several ranks decide of a recipe, and refuse."""
    recipe, why = settle_micro_batch(recipe, layout.feeds)
    if why:
        decide.take("train.micro_batch", recipe.train.micro_batch, why)
    check_ranks(recipe, layout.feeds)
    by = "processes" if layout.tensor == 1 else f"groups of {layout.tensor} processes"
    decide.take(
        "ranks", world, f"the micro-batches of a step go round {layout.feeds} {by}, and their sums make one update"
    )
    return recipe
