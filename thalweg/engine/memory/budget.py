"""A recipe that fits: what it leaves open about memory is chosen by measured price, and confirmed by a real step on a copy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from thalweg.core import Ledger, Recipe, RecipeError, divisors, human_bytes, to_bytes
from thalweg.device import memory, ran_out
from thalweg.engine.checks import whole_of
from thalweg.engine.memory.bench import Bench
from thalweg.engine.memory.prices import Prices

#: Of the memory that is there, what "auto" plans with: the prediction is good to about 5 % (benchmarks/results/memory.json).
MARGIN = 0.92
_ALIKE = 1.03  # times that differ less than this are the same


@dataclass(frozen=True)
class Choice:
    """One way to fill what was left open."""

    recipe: Recipe
    ledger: Ledger

    @property
    def plain(self) -> bool:
        """Whether it is what the run would be without a budget: nothing changed, the whole batch in one pass."""
        return self.given_up == (0, 0, -self.recipe.train.batch)

    @property
    def given_up(self) -> tuple[int, int, int]:
        """What it changes of the plain run, for an order: the maths first, then how it is computed."""
        optimizer = self.recipe.optimizer
        ways = (self.recipe.recompute != "none", optimizer.release_gradients != "off", bool(optimizer.offload))
        return int(optimizer.slots != "full"), sum(ways), -whole_of(self.recipe.train.micro_batch)


def fit(
    recipe: Recipe,
    bench: Bench,
    take: Callable[[str, Any, str], object],
    most: int | None = None,
    *,
    planning: bool = False,
) -> tuple[Recipe, Ledger]:
    """Fill what is open so that it fits ``memory_budget``, or else the memory that is there.

    Args:
        recipe: complete but for the micro-batch ("auto"), and, with a budget, slots, release of gradients, offload and
            recomputation.
        take: is told (path, value, reason) of each choice.
        most: bytes to plan with in place of those that are there.
        planning: whether nothing will run: then nothing is confirmed, and where nothing fits the least is taken.

    Raises:
        RecipeError: if nothing fits; the message says what the least is.
    """
    limit, told = _limit(recipe, bench, most)
    refused = [(one, bench.refused(one)) for one in ways(recipe)]
    possible = [one for one, why in refused if why is None]
    if not possible:
        raise next(why for _, why in refused if why is not None)
    every = [Choice(one, bench.ledger(one)) for one in possible]
    fitting = [choice for choice in every if choice.ledger.peak <= limit]
    prices = Prices(bench)
    if recipe.memory_budget is None:
        fitting.sort(key=lambda choice: -whole_of(choice.recipe.train.micro_batch))
    elif not any(choice.plain for choice in fitting):  # where nothing need be given up, nothing is measured
        fitting = cheapest_first(fitting, prices.step)
    else:
        fitting.sort(key=lambda choice: choice.given_up)
    failed: list[int] = []
    if planning and not fitting:
        fitting = [min(every, key=lambda choice: choice.ledger.peak)]
    for choice in fitting:
        try:
            if not planning:
                bench.confirm(choice.recipe)
        except Exception as err:
            if not ran_out(err):
                raise
            failed.append(whole_of(choice.recipe.train.micro_batch))
        else:
            _tell(recipe, choice, every, prices, told, failed, take, planning=planning)
            return choice.recipe, bench.ledger(choice.recipe)
        memory.release(bench.device, cycles=True)
    raise _nothing_fits(recipe, every, told, failed)


def ways(recipe: Recipe) -> Iterator[Recipe]:
    """Every way to fill what is open, possible or not. Without a budget that is the micro-batch alone."""
    budget, optimizer, micro = recipe.memory_budget is not None, recipe.optimizer, recipe.train.micro_batch
    clips = bool(recipe.train.clip or recipe.train.clip_history) or recipe.precision == "fp16" or recipe.guard.active

    def open_(given: Any, plain: Any, *others: Any) -> list[Any]:
        return [given] if given is not None else [plain, *others] if budget else [plain]

    for size, how, slots, release, away in itertools.product(
        divisors(recipe.train.batch)[::-1] if micro == "auto" else [whole_of(micro)],
        open_(recipe.recompute, "none", "ops", "blocks"),
        open_(optimizer.slots, "full", "int8", "bf16"),
        open_(optimizer.release_gradients, "off", "two-pass" if clips else "one-pass"),
        open_(optimizer.offload, False, True),
    ):
        changed = replace(optimizer, slots=slots, release_gradients=release, offload=away)
        yield replace(recipe, recompute=how, optimizer=changed, train=replace(recipe.train, micro_batch=size))


def _limit(recipe: Recipe, bench: Bench, most: int | None) -> tuple[int, str]:
    """(bytes that training may take, in words)."""
    if recipe.memory_budget is None and most is not None:
        return most, human_bytes(most)
    if recipe.memory_budget is None:
        there = memory.there(bench.device)
        return int(there * MARGIN), f"{human_bytes(int(there * MARGIN))}, {MARGIN:.0%} of what is there"
    limit = to_bytes(recipe.memory_budget, "memory_budget")
    weights = sum(p.nbytes for p in bench.model.parameters())
    if limit < weights:
        raise RecipeError(
            f"memory_budget='{recipe.memory_budget}' is under the parameters' own bytes.",
            f"{human_bytes(limit)}, and the parameters take {human_bytes(weights)}.",
            "Give a larger budget, or a smaller model.",
        )
    return limit, f"memory_budget='{recipe.memory_budget}'"


def cheapest_first(fitting: list[Choice], seconds: Callable[[Recipe], float]) -> list[Choice]:
    """By the time of a step; of those alike, what changes least first."""
    left = sorted(((seconds(choice.recipe), choice) for choice in fitting), key=lambda pair: pair[0])
    ordered: list[Choice] = []
    while left:
        alike = [pair for pair in left if pair[0] <= left[0][0] * _ALIKE]
        left = left[len(alike) :]
        ordered += sorted((choice for _, choice in alike), key=lambda choice: choice.given_up)
    return ordered


def _tell(
    recipe: Recipe,
    choice: Choice,
    every: list[Choice],
    prices: Prices,
    told: str,
    failed: list[int],
    take: Callable[[str, Any, str], object],
    *,
    planning: bool,
) -> None:
    chosen = choice.recipe
    peak = f"predicted peak {human_bytes(choice.ledger.peak)} of {told}"
    if recipe.train.micro_batch == "auto":
        sure = "not tried" if planning else "confirmed by a step on a copy"
        again = f"; {failed} did not go through" if failed else ""
        take("train.micro_batch", chosen.train.micro_batch, f"{peak}; {sure}{again}")
    if recipe.memory_budget is None:
        return
    least = min(every, key=lambda one: one.given_up)
    without = f"without, {human_bytes(least.ledger.peak)}"
    for path, given, value in (
        ("recompute", recipe.recompute, chosen.recompute),
        ("optimizer.slots", recipe.optimizer.slots, chosen.optimizer.slots),
        ("optimizer.release_gradients", recipe.optimizer.release_gradients, chosen.optimizer.release_gradients),
        ("optimizer.offload", recipe.optimizer.offload, chosen.optimizer.offload),
    ):
        if given is None:
            why = f"{peak}; {without}" if value not in ("none", "full", "off", False) else f"not needed: {peak}"
            take(path, value, f"{why}; {prices.told(path, chosen)}" if why.startswith("predicted") else why)


def _nothing_fits(recipe: Recipe, every: list[Choice], told: str, failed: list[int]) -> RecipeError:
    if failed:
        return RecipeError(
            "No micro-batch goes through.",
            f"Within {told}, {failed} were predicted to fit and ran out of memory.",
            "Free memory that other programs hold, or use a smaller model.",
        )
    least = min(every, key=lambda choice: choice.ledger.peak)
    own = {path: value for path, value, was in least.recipe.diff(recipe)}
    narrow = recipe.precision == "bf16-pure"
    numbers = ", ".join(f"{name} {human_bytes(size)}" for name, size in least.ledger.rows() if size)
    return RecipeError(
        f"Training does not fit {told}.",
        f"The least that was found takes {human_bytes(least.ledger.peak)} ({numbers}), with {own}.",
        (f"The process takes {human_bytes(least.ledger.process)} by itself. " if least.ledger.process else "")
        + "Give more memory or a smaller model"
        + ("" if narrow else ", or precision='bf16-pure'")
        + "; see thalweg plan.",
    )
