"""Which way of compiling is fastest in this run: steps on copies of the model, the time to compile charged to the steps ahead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thalweg.core import Recipe, ThalwegError
from thalweg.data import split
from thalweg.device.kept import same_generators
from thalweg.engine.checks import whole_of
from thalweg.engine.memory import Bench
from thalweg.engine.step import Step

Take = Callable[[str, Any, str], Any]

#: Within the reason of a decision: what follows is the error's own line.
FAILED = "failed when it was tried: "

_STEPS, _WARM = 12, 3
_NEAR = 2e-2  # how far gradient norms may be apart: half precision in another order, and no gradient that is missing


@dataclass(frozen=True)
class Tried:
    """Steps of one way: seconds until the first was done, seconds of one afterwards, and the norm of the first gradient."""

    first: float
    step: float
    norm: float

    def whole(self, steps: int) -> float:
        """Seconds of a run of so many steps."""
        return self.first + self.step * max(steps - 1, 0)


def fastest(bench: Bench, recipe: Recipe, able: Sequence[str], steps: int, take: Take) -> str:
    """Try ``able`` ways in turn, and tell the one that ends a run of ``steps`` steps first.

    Args:
        able: "off" first.
        take: notes what each took, and the choice with its reason.
    """
    found: dict[str, Tried] = {}
    for how in able:
        try:
            one = tried(bench, replace(recipe, compile=how))
        except Exception as err:
            if how == "off":
                raise
            take("compile", f"not '{how}'", f"it {FAILED}{first_line(err)}")
            continue
        if how != "off" and abs(one.norm - found["off"].norm) > _NEAR * abs(found["off"].norm):
            text = f"its gradient has norm {one.norm:.4g}, and that of plain operators {found['off'].norm:.4g}"
            take("compile", f"not '{how}'", f"it computes something else: {text}")
            continue
        found[how] = one
    return choice(found, steps, take)


def choice(found: dict[str, Tried], steps: int, take: Take) -> str:
    """The way of the shortest run, noted with the figures of all."""
    best = min(found, key=lambda how: found[how].whole(steps))
    told = "; ".join(f"{how} {1e3 * t.step:.3g} ms a step, {t.first:.2g} s to the first" for how, t in found.items())
    take("compile", best, f"the shortest run of {steps} steps: {told}")
    return best


def tried(bench: Bench, recipe: Recipe) -> Tried:
    """Steps of a recipe on a copy of the model, several by one call where the run would take them so."""
    window = split(bench.window, whole_of(recipe.train.micro_batch))
    with same_generators(bench.device):
        step = bench.step(recipe, compiled=True)
        begun = time.perf_counter()
        norm = float(step.run(window)[2])
        bench.device.synchronize()
        first = time.perf_counter() - begun
        for _ in range(_WARM):
            begun = time.perf_counter()
            step.run(window)
        bench.device.synchronize()
        windows = [window] * _in_a_call(step, time.perf_counter() - begun)
        step.run_several(windows)
        times = []
        for _ in range(_STEPS):
            bench.device.synchronize()
            begun = time.perf_counter()
            step.run_several(windows)
            bench.device.synchronize()
            times.append((time.perf_counter() - begun) / len(windows))
    return Tried(first, statistics.median(times), norm)


def _in_a_call(step: Step, seconds: float) -> int:
    """Steps that a call takes where one step takes so many seconds."""
    return max(1, min(step.per_call, int(step.call_s / seconds))) if step.call_s else step.per_call


def first_that_works(bench: Bench, recipe: Recipe, able: Sequence[str], take: Take) -> str:
    """The first of ``able`` that a step on a copy can be taken by; "off", with the reasons of all, where none can."""
    for how in able:
        try:
            tried(bench, replace(recipe, compile=how))
        except Exception as err:
            take("compile", f"not '{how}'", f"it {FAILED}{first_line(err)}")
            continue
        return str(take("compile", how, "asked for, and it works on a copy of the model"))
    return str(take("compile", "off", "nothing else works here"))


def first_line(err: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(err, ThalwegError):
        return " ".join(f"{err.asked} {err.numbers}".split())[:400]
    line = (str(err).strip() or type(err).__name__).splitlines()[0]
    return f"{type(err).__name__}: {line[:160]}"
