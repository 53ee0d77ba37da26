"""On a CPU: whether the rest of a run repays what compiling its step takes.

Most runs there are over before it would: they are told so by an estimate, which runs nothing. Where that leaves it open, the
eager step is timed on a copy; only where its time leaves it open too is a step compiled on one. What was found is kept for the
next run.
"""

from __future__ import annotations

import hashlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from thalweg.core import ParameterRow, Recipe
from thalweg.data import split, tensors
from thalweg.device.kept import same_generators
from thalweg.engine.blocks import kind_of, repeated_blocks
from thalweg.engine.checks import whole_of
from thalweg.engine.compiled_backend import traces_autograd
from thalweg.engine.compiled_cache import keep, kept, surroundings
from thalweg.engine.compiled_choice import OLDER
from thalweg.engine.compiled_measure import FAILED, Take, Tried, choice, fastest, first_line, first_that_works, tried
from thalweg.engine.memory import Bench

#: Seconds that a graph saves in a step, for each trained tensor: what its operators cost (benchmarks/compiled.py).
SAVED_S = 8e-5
#: Seconds until a graph is compiled: at least, and for each trained tensor; of those, the share where all is in the cache.
COMPILE_S, EACH_S, WARM = 5.0, 0.2, 0.35
#: The share of ``SAVED_S`` that is saved for a tensor in a block where blocks alone are compiled, and the update is not.
IN_BLOCKS = 0.5
#: Of an eager step, the most that a graph may save.
MOST_SAVED = 0.75
#: Of the run's expected time, the most that goes into timing the eager step.
SHARE = 0.03
_STEPS = 8
_DAY_S = 24 * 3600


def estimate(rows: Sequence[ParameterRow], steps: int) -> tuple[float, float]:
    """(seconds that a graph would save in so many steps, seconds to compile it), by the number of tensors alone."""
    return steps * SAVED_S * len(rows), COMPILE_S + EACH_S * len(rows)


def estimate_blocks(model: nn.Module, steps: int) -> tuple[float, float]:
    """The same for repeated blocks: what their tensors save, and to compile a graph for each kind of them."""
    blocks = repeated_blocks(model).values()
    sizes = {kind_of(block): _trained(block) for block in blocks}
    return steps * IN_BLOCKS * SAVED_S * sum(map(_trained, blocks)), COMPILE_S + EACH_S * sum(sizes.values())


def _trained(module: nn.Module) -> int:
    return sum(p.requires_grad for p in module.parameters())


def measured(
    recipe: Recipe,
    able: Sequence[str],
    take: Take,
    *,
    rows: Sequence[ParameterRow],
    steps: int,
    bench: Callable[[], Bench],
    alone: bool,
    model: nn.Module,
) -> str:
    """What ``compile`` becomes by trying, where a recipe leaves it open.

    Args:
        able: ways that are possible; "off" among them where all are to be tried.
        alone: whether the run has one rank.
        model: whose blocks an estimate counts.
    """
    if recipe.compile == "best":
        return first_that_works(bench(), recipe, able, take)
    if "off" in able:
        return fastest(bench(), recipe, able, steps, take)
    if not alone:
        return str(take("compile", "off", f"nothing is measured for ranks on a CPU; '{able[0]}' can be asked for"))
    if "step" in able:
        found = worth(recipe, estimate(rows, steps), f"{len(rows)} tensors", "step", steps, bench, take)
        if found.how or "blocks" not in able:
            return found.how or str(take("compile", "off", found.failed))
        take("compile", "not 'step'", found.failed)
    guess = estimate_blocks(model, steps)
    found = worth(recipe, guess, "the tensors in blocks", "blocks", steps, bench, take)
    if found.how:
        return found.how
    take("compile", "not 'blocks'", found.failed)
    return str(take("compile", "off", "nothing else works here"))


@dataclass(frozen=True)
class Worth:
    """What ``compile`` becomes, noted with its reason; or "", and why the way cannot be taken."""

    how: str = ""
    failed: str = ""


def worth(
    recipe: Recipe,
    guess: tuple[float, float],
    of: str,
    way: str,
    steps: int,
    bench: Callable[[], Bench],
    take: Take,
) -> Worth:
    """``way`` where it ends the run sooner, else "off".

    Args:
        recipe: complete but for ``compile``.
        guess: seconds that it may save in the run, and that it takes to compile.
        of: what that is reckoned from, in words.
        way: "step" or "blocks".
        steps: of the run.
        bench: makes what tries a recipe on copies of the model.
        take: notes the choice with its reason.
    """
    saved, cost = guess
    told = f"about {saved:.2g} s of {steps} steps would be saved, by an estimate for {of}"
    too_few = f"{told}, and to compile takes {cost:.2g} s"
    if saved < WARM * cost:
        return Worth(str(take("compile", "off", too_few)))
    if way == "step" and not traces_autograd():
        return Worth(failed=OLDER)
    here = bench()
    facts = facts_of(recipe, here) | ({} if way == "step" else {"way": way})
    around = surroundings({*map(type, here.model.modules()), _function(here.loss)})
    found = _usable(kept(facts), around, way)
    if found is None:
        if saved < cost:
            return Worth(str(take("compile", "off", too_few)))
        found = _measured(here, recipe, way, steps, cost, take)
        if found is None:
            return Worth("off")
        keep(facts, {**found, "around": around, "at": time.time()})
        text = ""
    else:
        text = " (measured in an earlier run, and kept)"
    if found.get("failed"):
        return Worth(failed=f"'{way}' {FAILED}{found['failed']}{text}")
    figures = {"off": Tried(found["off"], found["off"], 0.0), way: Tried(WARM * found["first"], found[way], 0.0)}
    return Worth(choice(figures, steps, lambda path, value, why: take(path, value, why + text)))


def _usable(found: dict[str, Any] | None, around: str, way: str) -> dict[str, Any] | None:
    """What was kept, if it is what ``worth`` keeps: others may have written there. What failed is tried again elsewhere than
    where it did, and after a day: by what it failed may have been mended."""
    if found is None:
        return None
    if isinstance(found.get("failed"), str):
        at = found.get("at")
        lasts = isinstance(at, (int, float)) and 0 <= time.time() - at < _DAY_S
        return found if lasts and found.get("around") == around else None
    figures = [found.get(name) for name in ("off", way, "first")]
    return found if all(isinstance(one, (int, float)) and 0 < one < math.inf for one in figures) else None


def _measured(bench: Bench, recipe: Recipe, way: str, steps: int, cost: float, take: Take) -> dict[str, Any] | None:
    """Seconds of a step by plain operators and as a graph, and to compile it; None where the former are enough to say no."""
    eager = eager_step(bench, recipe, steps)
    if steps * eager * MOST_SAVED < cost:
        take(
            "compile", "off", f"{steps} steps of {1e3 * eager:.3g} ms end before a graph is repaid, about {cost:.2g} s"
        )
        return None
    try:
        graph = tried(bench, replace(recipe, compile=way))
    except Exception as err:
        return {"failed": first_line(err)}
    return {"off": eager, way: graph.step, "first": graph.first}


def eager_step(bench: Bench, recipe: Recipe, steps: int) -> float:
    """Seconds of a step by plain operators, on a copy: of ``SHARE`` of the run's steps, at most of eight."""
    window = split(bench.window, whole_of(recipe.train.micro_batch))
    times = []
    with same_generators(bench.device):
        step = bench.step(replace(recipe, compile="off"))
        for _ in range(1 + max(1, min(_STEPS, int(SHARE * steps) - 1))):
            begun = time.perf_counter()
            step.run(window)
            bench.device.synchronize()
            times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


_NO_MATTER = (
    "seed",
    "weights",
    "weights_rename",
    "checkpoint",
    "evaluate",
    "data",
    "steps_per_call",
    "compile",
    "device",
)


def _function(loss: Any) -> Any:
    """The loss as it was written."""
    return getattr(loss, "function", loss)


def _code(function: Any) -> str:
    """Names the code of a function: whoever has mended what could not be traced is measured anew."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return ""
    return hashlib.sha256(code.co_code + repr((code.co_qualname, code.co_names)).encode()).hexdigest()[:16]


def facts_of(recipe: Recipe, bench: Bench) -> dict[str, Any]:
    """What the times of a step rest on."""
    tree = {name: value for name, value in recipe.to_dict().items() if name not in _NO_MATTER}
    train = {name: value for name, value in tree.get("train", {}).items() if name not in ("steps", "epochs")}
    return {
        "torch": torch.__version__,
        "machine": [platform.machine(), platform.processor(), platform.node()],
        "threads": torch.get_num_threads(),
        "model": str(bench.model),
        "loss": repr(getattr(loss := _function(bench.loss), "__qualname__", type(loss).__name__)),
        "parameters": [(name, list(p.shape), str(p.dtype)) for name, p in bench.model.named_parameters()],
        "code": sorted({_code(getattr(layer, "forward", None)) for layer in bench.model.modules()} | {_code(loss)}),
        "batch": [(name, list(t.shape), str(t.dtype)) for name, t in tensors(bench.window)],
        "recipe": {**tree, "train": train},
    }
