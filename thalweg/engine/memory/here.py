"""``thalweg plan`` on this machine: steps are timed on copies of the model, and nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from thalweg.core import (
    Change,
    Forecast,
    Layout,
    Plan,
    Recipe,
    Task,
    divisors,
)
from thalweg.core.parallel import layout_of
from thalweg.device import memory, ran_out
from thalweg.engine import levers
from thalweg.engine.checks import whole_of
from thalweg.engine.memory.bench import Bench
from thalweg.engine.memory.forms import Way, forms_of, pick, rank_ledger, tell_form
from thalweg.engine.memory.layouts import candidates
from thalweg.engine.memory.prices import Prices
from thalweg.engine.resolve import resolve
from thalweg.engine.settle import Decisions
from thalweg.engine.together import check_ranks, settle_micro_batch


@levers.kept()
def plan_here(task: Task, recipe: Recipe, *, most: int | None = None, timed: bool = True, ranks: int = 1) -> Forecast:
    """The plan of a run on this machine; steps are timed on copies of the model, and nothing is trained.

    Args:
        most: bytes to plan with, in place of what is there.
        timed: whether time is of interest, and what would make it smaller.
        ranks: how many processes of this machine share the run.

    Raises:
        ThalwegError: for what training itself would refuse.
    """
    asked = layout_of(recipe.parallel, ranks, ranks) if ranks > 1 else Layout()
    if ranks > 1:
        recipe, _ = settle_micro_batch(recipe, ranks if asked is None else asked.feeds)
        check_ranks(recipe, ranks if asked is None else asked.feeds)
    resolved = resolve(task, replace(recipe, parallel="auto"), most=most, planning=True)
    plan, bench = resolved.plan, resolved.bench
    assert plan.ledger is not None and bench is not None
    left = memory.available(resolved.device)
    there = most if left is None and most is not None else memory.there(resolved.device)
    limit = there if most is None else most
    prices = Prices(bench)
    if ranks > 1:
        open_ = replace(plan, recipe=replace(plan.recipe, recompute=recipe.recompute))
        return _on_ranks_here(open_, bench, prices, asked, ranks, limit, most, timed=timed)
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
        largest=largest_that_fits(plan.recipe.train.batch, lambda m: _at(bench, plan.recipe, m), limit),
        seconds=seconds,
        timed=how,
        decisions=tuple((d.path, d.value, d.reason) for d in plan.decisions),
        changes=tuple(_changes_here(plan, bench, prices, seconds, micro, limit)) if timed else (),
    )


def _on_ranks_here(
    plan: Plan,
    bench: Bench,
    prices: Prices,
    asked: Layout | None,
    ranks: int,
    limit: int,
    most: int | None,
    *,
    timed: bool,
) -> Forecast:
    """The same on several processes of this machine, each with a device of its own, or a share of the host's memory."""
    recipe, decide = plan.recipe, Decisions()
    if most is None and bench.device.kind == "cpu":
        limit //= ranks
    open_ = list(candidates(recipe, bench.model, ranks, ranks))
    if asked is not None and all(layout != asked for layout, _ in open_):
        open_.insert(0, (asked, recipe))
    ways_to = [Way(layout, one, rank_ledger(bench, one, layout)) for layout, one in open_]
    chosen = pick(ways_to, asked, limit)
    if asked is None:
        tell_form(ways_to, chosen, limit, decide.take)
    num = -(-recipe.train.batch // whole_of(recipe.train.micro_batch))
    seconds = None
    if timed:
        seconds = prices.bench.cost(recipe).step(-(-num // chosen.layout.feeds))
    at = lambda m: rank_ledger(bench, replace(recipe, train=replace(recipe.train, micro_batch=m)), chosen.layout).peak
    return Forecast(
        task=plan.task,
        machine=str(plan.machine["name"]),
        devices=ranks,
        sharded=chosen.layout.shard > 1,
        ledger=chosen.ledger,
        memory=limit,
        batch=recipe.train.batch,
        steps=plan.steps,
        largest=largest_that_fits(recipe.train.batch // chosen.layout.feeds, at, limit),
        seconds=seconds,
        timed="measured here, on a copy, alone: without what ranks send and wait" if timed else "not timed",
        decisions=tuple((d.path, d.value, d.reason) for d in (*plan.decisions, *decide.made)),
        forms=forms_of(ways_to, chosen, limit, lambda way: None),
    )


def _at(bench: Bench, recipe: Recipe, micro: int) -> int:
    return bench.ledger(replace(recipe, train=replace(recipe.train, micro_batch=micro))).peak


def largest_that_fits(batch: int, peak: Callable[[int], int], limit: int) -> int:
    return next((m for m in divisors(batch)[::-1] if peak(m) <= limit), 0)


def smaller_variants(recipe: Recipe, micro: int, kind: str) -> Iterator[tuple[str, Recipe, str]]:
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
    plan: Plan, bench: Bench, prices: Prices, seconds: float | None, micro: int, limit: int
) -> list[Change]:
    """Peaks are told as what they save of the plan's: each trial since has left something in this process."""
    assert plan.ledger is not None
    recipe, found = plan.recipe, []
    for what, one, note in smaller_variants(recipe, micro, bench.device.kind):
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
        now, then = bench.ledger(recipe), there.ledger(one)
        saved = (now.peak - now.process) - (then.peak - then.process)
        if saved > 0:
            peak = plan.ledger.peak - saved
            price = (prices if there is bench else Prices(there)).step(one) / seconds if seconds else None
            found.append(Change(what, peak, price, peak <= limit, note))
    return cheapest_changes_first(found)


def cheapest_changes_first(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda c: (round(c.price, 2) if c.price is not None else math.inf, c.peak))
