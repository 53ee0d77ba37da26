"""What a way of saving memory costs in time, measured on copies at small micro-batches and scaled."""

from __future__ import annotations

from dataclasses import replace

from thalweg.core import Recipe, divisors
from thalweg.engine.checks import whole_of
from thalweg.engine.memory.bench import Bench
from thalweg.engine.memory.settle import settle_memory

_TRIED = 8  # samples of the micro-batch that is timed, at most


class Prices:
    """Seconds of a step of any variant, from few measurements.

    Passes take a + b * samples, from two sizes; recomputation multiplies them by what it was measured to; the update, with
    its slots, release and offload, is measured as a whole.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def step(self, recipe: Recipe) -> float:
        """Seconds of a step of a complete recipe."""
        micro, batch = whole_of(recipe.train.micro_batch), recipe.train.batch
        return -(-batch // micro) * self._passes(recipe, micro) + self._rest(recipe)

    def told(self, path: str, recipe: Recipe) -> str:
        """What the value at ``path`` costs, in words."""
        plain = {"recompute": "none", "optimizer.slots": "full", "optimizer.release_gradients": "off"}.get(path, False)
        without = self.step(recipe.override({path: plain}))
        return f"{self.step(recipe) / without:.2f} times the time of a step without, measured"

    def _small(self, recipe: Recipe) -> int:
        return max(d for d in divisors(recipe.train.batch) if d <= _TRIED)

    def _plain(self, recipe: Recipe, size: int, how: str) -> Recipe:
        """Nothing but passes of ``size`` samples, recomputed as ``how`` says, is of interest."""
        optimizer = replace(recipe.optimizer, slots="full", release_gradients="off", offload=False)
        train = replace(recipe.train, micro_batch=size)
        return settle_memory(replace(recipe, optimizer=optimizer, train=train, recompute=how))

    def _passes(self, recipe: Recipe, micro: int) -> float:
        small = self._small(recipe)
        high = self.bench.cost(self._plain(recipe, small, "none")).passes
        if small > 1:
            half = max(d for d in divisors(recipe.train.batch) if d < small)
            low = self.bench.cost(self._plain(recipe, half, "none")).passes
            slope = min(max((high - low) / (small - half), 0.0), high / small)
        else:
            slope = high
        plain = high + slope * (micro - small)
        again = self.bench.cost(self._plain(recipe, small, recipe.recompute or "none")).passes
        twice = 2 if recipe.optimizer.release_gradients == "two-pass" else 1
        return plain * twice * max(again / high, 1.0) if high else 0.0

    def _rest(self, recipe: Recipe) -> float:
        """Seconds of a step besides its passes. What saves memory is never taken to be faster than what does not: that is noise."""
        plain = self.bench.cost(self._plain(recipe, self._small(recipe), "none")).rest
        return max(self._own_rest(recipe), plain)

    def _own_rest(self, recipe: Recipe) -> float:
        small = self._small(recipe)
        train = replace(recipe.train, micro_batch=small)
        own = replace(recipe, recompute="none", train=train)
        if recipe.optimizer.release_gradients == "off":
            return self.bench.cost(own).rest
        passes = self.bench.cost(self._plain(recipe, small, "none")).passes
        twice = 2 if recipe.optimizer.release_gradients == "two-pass" else 1
        whole = self.bench.cost(replace(own, train=replace(train, batch=small))).passes  # a window of one micro-batch
        return max(whole - twice * passes, 0.0)
