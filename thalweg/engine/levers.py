"""What the CPU gives when it is asked right: precision, memory format, threads and the C library's thresholds, measured together.

Each of them changes what another is worth (channels side by side pay most in bfloat16, threads least where a pass is short), so
that ways are whole combinations, run in turn on the first micro-batch before step 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from thalweg.core import Decision, Plan, Recipe, human_bytes
from thalweg.data import batch_size, split
from thalweg.device import Device, allocator, threads
from thalweg.device.race import race, simplest
from thalweg.engine.losses import sum_and_weight
from thalweg.engine.memory_format import FORMATS, convolutions, put
from thalweg.engine.preflight import ModelLoss, untouched
from thalweg.optim import named_trainable
from thalweg.precision import POLICIES

Take = Callable[[str, Any, str], Any]  # (path, value, reason) -> value

GAIN = 1.1  # another way than the plain one is taken where it is at least this much faster
#: Measuring may take this part of the run's passes, and so many seconds at least and at most.
_PART, _LEAST_S, _MOST_S = 0.02, 0.03, 1.5
#: Convolutions of fewer operations in a forward pass are over before it matters how they lie.
_WORTH_FLOPS = 5e8
#: Fresh pages of a pass below which the C library's thresholds are not worth a word.
_WORTH_BYTES = 1 << 20
#: The first pass of all takes so many at least where later ones take any: it also loads what it needs.
_MANY_BYTES = 16 << 20
_FEW = 8  # samples of a pass that is cut short to be measured


@dataclass(frozen=True)
class Way:
    """One way of running a pass."""

    precision: str
    memory_format: str
    threads: int

    def __str__(self) -> str:
        last = " channels last" if self.memory_format == "channels_last" else ""
        return f"{self.precision}{last} on {self.threads} thread{'s' if self.threads > 1 else ''}"

    def changes(self, plain: Way) -> int:
        """How many of its parts are others than the plain way's."""
        return sum(a != b for a, b in zip(vars(self).values(), vars(plain).values()))


class _Trial:
    """Forward and backward passes of one micro-batch, timed; the model is as before but for how its kernels lie."""

    def __init__(self, model: nn.Module, loss: ModelLoss, batch: Any, device: Device) -> None:
        self.model, self.loss, self.batch, self.device = model, loss, batch, device
        self.params = [p for _, p in named_trainable(model)]
        self.layers = convolutions(model)
        self.lies = ""  # as it has been put last; "": as it came
        self.fresh = 0  # bytes of fresh pages of the last pass

    def run(self, way: Way) -> float:
        self.put(way)
        policy = POLICIES[way.precision]
        fresh, begun = allocator.fresh_bytes(), time.perf_counter()
        with policy.around(self.device):
            with policy.forward(self.device):
                total, _ = sum_and_weight(self.loss(self.model, self.batch), self.batch)
            torch.autograd.grad(total, self.params, allow_unused=True)
        del total
        seconds, self.fresh = time.perf_counter() - begun, allocator.fresh_bytes() - fresh
        return seconds

    def put(self, way: Way) -> None:
        if self.layers and way.memory_format != self.lies:
            put(self.layers, way.memory_format)
            self.lies = way.memory_format
        if torch.get_num_threads() != way.threads:
            torch.set_num_threads(way.threads)

    @contextmanager
    def flops(self) -> Iterator[list[float]]:
        """Operations of the convolutions of a forward pass inside."""
        found = [0.0]

        def hook(layer: Any, inputs: Any, output: Any) -> None:
            small = output if isinstance(layer, nn.Conv2d) else inputs[0]
            found[0] += 2.0 * small.numel() * layer.weight.numel() / layer.weight.shape[0]

        handles = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def settle_levers(
    recipe: Recipe,
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    take: Take,
    *,
    steps: int,
    fresh: int = 0,
    process: bool = True,
) -> Recipe:
    """Fill ``precision``, ``memory_format`` and ``threads`` where they are open, on the host; elsewhere they are settled otherwise.

    Args:
        batch: the first micro-batch.
        take: notes decisions.
        steps: of the run, which measuring must be worth.
        fresh: bytes of fresh pages that the first pass of all took.
        process: whether threads and thresholds, which are the whole process's, may be changed.
    """
    if not device.is_host:
        return recipe
    trial, counts = _Trial(model, loss, batch, device), [torch.get_num_threads()]
    if process and recipe.threads is None and not threads.given():
        counts = threads.numbers()
    lies = bool(trial.layers) and recipe.memory_format == "auto"
    kept = process and _may_keep(recipe) and fresh >= _MANY_BYTES
    if not (recipe.precision == "auto" or lies or len(counts) > 1 or kept):
        return recipe
    plain = Way(
        "fp32" if recipe.precision == "auto" else recipe.precision,
        "contiguous" if recipe.memory_format == "auto" else recipe.memory_format,
        counts[0],
    )
    best, told = plain, ""
    with untouched(model, device, recipe.seed):
        with trial.flops() as found:
            first = trial.run(plain)
        pays = lies and found[0] >= _WORTH_FLOPS
        precisions = [p for p in ("fp32", "tf32", "bf16") if p in device.precisions]
        formats = [*FORMATS] if pays else [plain.memory_format]
        halves = precisions if recipe.precision == "auto" else [plain.precision]
        ways = [Way(*parts) for parts in product(halves, formats, counts)]
        if len(ways) > 1:
            best, told = _fastest(trial, ways, plain, first, steps)
        trial.put(best)
        if kept:
            _settle_allocator(trial, best, take)
    return _settled(recipe, best, told, lies, pays, len(counts) > 1, take)


def _fastest(trial: _Trial, ways: Sequence[Way], plain: Way, first: float, steps: int) -> tuple[Way, str]:
    """The way to take, and what all took, for people."""
    budget, whole = min(_MOST_S, max(_LEAST_S, _PART * steps * first)), trial.batch
    size = batch_size(whole)
    few = max(min(_FEW, size), int(size * budget / (4 * len(ways) * first)))
    if few < size:
        trial.batch = split(whole, few)[0]

    def run(way: Way) -> float:
        try:
            return trial.run(way)
        except (RuntimeError, TypeError):  # a model need not run in half precision
            if way.precision == plain.precision:
                raise
            return math.inf

    try:
        seconds = race(ways, run, budget)
    except Exception:  # what a batch may not be cut to
        if trial.batch is whole:
            raise
        trial.batch = whole
        seconds = race(ways, run, budget)
    num = batch_size(trial.batch)
    trial.batch = whole
    words = {way: f"{1e3 * found:.3g}" if found < math.inf else "does not run" for way, found in seconds.items()}
    told = ", ".join(f"{way} {words[way]}" for way in sorted(seconds, key=seconds.__getitem__))
    return simplest(seconds, lambda way: way.changes(plain), GAIN), f"ms a pass of {num} samples: {told}"


def _settled(recipe: Recipe, best: Way, told: str, lies: bool, pays: bool, many: bool, take: Take) -> Recipe:
    why = f"measured here, {told}; what is faster is taken from {GAIN:g} times on"
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=take("precision", best.precision, why if told else "this CPU has no other"))
        why = "measured together with precision"
    if lies:
        small = "the convolutions are too small for it to matter"
        recipe = replace(recipe, memory_format=take("memory_format", best.memory_format, why if pays else small))
        why = "measured together with memory_format" if pays and told in why else why
    if many:
        recipe = replace(recipe, threads=take("threads", best.threads, why))
    return recipe


def _may_keep(recipe: Recipe) -> bool:
    """Whether nobody counts bytes, and it is not so already."""
    return recipe.memory_budget is None and recipe.train.micro_batch != "auto" and not allocator.is_raised()


def _settle_allocator(trial: _Trial, way: Way, take: Take) -> None:
    """Freed memory stays with the process where a pass would take it anew."""
    seconds, fresh = trial.run(way), trial.fresh
    if fresh < _WORTH_BYTES:
        return
    told = f"a pass took {human_bytes(fresh)} of fresh pages and {1e3 * seconds:.3g} ms"
    if reason := allocator.against():
        take("allocator", "as it is", f"{told}; {reason}")
        return
    if not allocator.raise_thresholds():
        return
    trial.run(way)  # fills the heap
    seconds = trial.run(way)
    told += f", and takes {human_bytes(trial.fresh)} and {1e3 * seconds:.3g} ms where freed memory stays"
    if trial.fresh > fresh / 2:
        allocator.lower_thresholds()
        take("allocator", "as it is", told)
    else:
        take("allocator", KEEPS, f"{told}; {allocator.VARIABLE}=keep leaves the C library as it is")


KEEPS = "keeps what is freed"


def as_decided(recipe: Recipe, decisions: Sequence[Decision], device: Device) -> None:
    """A resumed run computes with the threads of its plan, and keeps freed memory where that was worth it."""
    if not device.is_host:
        return
    use_threads(recipe)
    if any(made.path == "allocator" and made.value == KEEPS for made in decisions):
        allocator.raise_thresholds()


def told_threads(before: Plan, now: Plan, device: Device) -> list[tuple[str, str]]:
    """(name, text) of what a person should know of the threads that a run goes on with."""
    began, goes_on = before.machine.get("threads"), now.machine["threads"]
    if not device.is_host or began is None:
        return []
    if began != goes_on:
        text = f"The run began on {began} threads, and goes on with {goes_on}: torch cuts sums by its threads."
        return [("threads", f"{text} The last digits may differ from those of a run that was not stopped.")]
    if goes_on > threads.cores():
        text = f"The run goes on with {goes_on} threads, as it began, on {threads.cores()} processors: the same bits, slower."
        return [("threads", text)]
    return []


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards the process has as many threads as before, and the C library the thresholds that it had."""
    raised = allocator.is_raised()
    try:
        with threads.kept():
            yield
    finally:
        if not raised:
            allocator.lower_thresholds()


def use_threads(recipe: Recipe) -> None:
    """As many threads as the recipe says, where it does."""
    if recipe.threads is not None and torch.get_num_threads() != recipe.threads:
        torch.set_num_threads(recipe.threads)
