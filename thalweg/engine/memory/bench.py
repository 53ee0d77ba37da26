"""Variants of one run, predicted and tried on copies of its model: nothing of the run itself is touched."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from thalweg.core import Ledger, ModelError, ParameterRow, Plan, Recipe, ThalwegError
from thalweg.data import batch_size, split, tensors
from thalweg.device import Device, memory, ran_out
from thalweg.device.kept import same_generators
from thalweg.engine.build import build
from thalweg.engine.checks import whole_of
from thalweg.engine.memory.predict import predict, process_bytes
from thalweg.engine.memory.trace import Line, trace, trace_line
from thalweg.engine.precision import ISLANDS, gradient_dtype
from thalweg.engine.preflight import ModelLoss
from thalweg.engine.recompute import recomputed
from thalweg.engine.release import check_release
from thalweg.engine.step import Step
from thalweg.optim import named_trainable
from thalweg.optim.sizes import StateSizes, state_sizes
from thalweg.precision import Policy, Prepared, policy_for

_LEAST, _MOST = 2, 12  # steps that are timed
_TRACED = 4  # samples of the smaller of two traces


@dataclass(frozen=True)
class Cost:
    """Seconds of one micro-batch's passes, and of what a step takes besides."""

    passes: float
    rest: float

    def step(self, micro_batches: int) -> float:
        """Seconds of a step."""
        return micro_batches * self.passes + self.rest


class Bench:
    """Predicts what a variant of a recipe takes in memory, and measures what it takes in time.

    Args:
        plan_of: the plan of a complete recipe; its steps and loss divisor need only be near.
        model: as the run will train it, not yet built upon; only copies of it are moved.
        window: the samples of a whole window, on the device.
        policy: of the run, for which the model has been prepared.
        check: refuses a complete recipe that the model and its data do not allow.
        data: bytes of training data on the device; ``held``: of the model as it was, which will be let go.
    """

    def __init__(
        self,
        plan_of: Callable[[Recipe], Plan],
        model: nn.Module,
        loss: ModelLoss,
        window: Any,
        device: Device,
        policy: Policy,
        *,
        check: Callable[[Recipe], None] = lambda recipe: None,
        data: int = 0,
        held: int = 0,
    ) -> None:
        self.held = held + sum(
            x.nbytes for _, x in tensors(window)
        )  # that of a run has a place of its own in the ledger
        self.plan_of, self.model, self.loss, self.window = plan_of, model, loss, window
        self.device, self.policy, self.check, self.data = device, policy, check, data
        self.process = _besides(model, device, self.held)
        self._lines: dict[str, Line] = {}
        self._sizes: dict[tuple[Any, ...], StateSizes] = {}
        self._costs: dict[str, Cost] = {}

    def refused(self, recipe: Recipe) -> ThalwegError | None:
        """Why a complete recipe is not possible at all; None where it is."""
        try:
            self.check(recipe)
            check_release(recipe, self.device.kind, self.plan_of(recipe).parameters, lambda path, value, why: None)
            self.ledger(recipe)
        except ThalwegError as err:
            return err
        return None

    def ledger(self, recipe: Recipe, feeds: int = 1) -> Ledger:
        """What a complete recipe takes, its micro-batch a number.

        Args:
            feeds: how many ways the micro-batches of a window go.
        """
        micro = whole_of(recipe.train.micro_batch)
        return predict(
            self._line(recipe).at(min(micro, batch_size(self.window))),
            self.sizes(recipe),
            self.device,
            micro_batches=-(-batch_size(self.window) // (micro * feeds)),
            buffers=sum(buffer.nbytes for buffer in self.model.buffers()),
            data=self.data,
            recompute=recipe.recompute or "none",
            process=self.process,
        )

    def _line(self, recipe: Recipe) -> Line:
        how = recipe.recompute or "none"
        if how not in self._lines:
            few = split(self.window, _TRACED)[0]
            with recomputed(self.model, how):
                self._lines[how] = trace_line(
                    self.model, self.loss, few, self.device, self.policy, seed=recipe.seed, fake=False
                )
            self.process = _besides(self.model, self.device, self.held)  # what traces need of torch is there now
        return self._lines[how]

    def sizes(self, recipe: Recipe) -> StateSizes:
        """Of the training state."""
        optimizer, several = recipe.optimizer, whole_of(recipe.train.micro_batch) < recipe.train.batch
        key = (optimizer.slots, optimizer.release_gradients, optimizer.offload, several)
        if key not in self._sizes:
            self._sizes[key] = sizes_of(recipe, self.plan_of(recipe).parameters, self.model, self.device.kind)
        return self._sizes[key]

    def at(self, precision: str) -> Bench:
        """A bench of the same run in another precision, on a copy of the model.

        Raises:
            ThalwegError: if the device or the model cannot.
        """
        policy = policy_for(precision, self.device)
        model = self._copy()
        Prepared(model, policy, self.device, ISLANDS).keep()
        other = Bench(
            self.plan_of, model, self.loss, self.window, self.device, policy, check=self.check, data=self.data
        )
        other.process = self.process
        return other

    def _copy(self) -> nn.Module:
        try:
            return copy.deepcopy(self.model)
        except Exception as err:
            raise ModelError(
                "The model cannot be copied, so nothing can be tried on a copy.",
                f"{type(err).__name__}: {err}.",
                "Give train.micro_batch as a number, and no memory_budget.",
            ) from None

    def step(self, recipe: Recipe, *, compiled: bool = False) -> Step:
        """The step of a recipe on a copy of the model.

        Args:
            compiled: as the recipe says; else by plain operators, which take the most memory and no time to begin.

        Raises:
            ModelError: if the model cannot be copied.
        """
        recipe = recipe if compiled else replace(recipe, compile="off")
        return build(self.plan_of(recipe), self._copy(), self.loss, self.device, self.policy)

    def confirm(self, recipe: Recipe) -> None:
        """One real forward and backward pass and one update on a copy; fails as the run would."""
        micro = whole_of(recipe.train.micro_batch)
        with same_generators(self.device):
            self.step(recipe).run(split(self.window, micro)[:1])
            self.device.synchronize()
        self.process = _besides(self.model, self.device, self.held)  # and what steps need

    def cost(self, recipe: Recipe, *, budget_s: float = 1.5) -> Cost:
        """Measured on a copy: medians of steps of one and of two micro-batches in turn."""
        key = repr(replace(recipe, memory_budget=None))
        if key not in self._costs:
            self._costs[key] = self._measure(recipe, budget_s)
        return self._costs[key]

    def _measure(self, recipe: Recipe, budget_s: float) -> Cost:
        parts = split(self.window, whole_of(recipe.train.micro_batch))
        with same_generators(self.device):
            step = self.step(recipe)
            one, two = parts[:1], (parts[:1] * 2)
            single = recipe.optimizer.release_gradients not in (None, "off")  # a window is one micro-batch
            times: dict[int, list[float]] = {1: [], 2: []}
            start = self._timed(step, one)  # a warm-up
            rounds = int(max(_LEAST, min(_MOST, budget_s / max(3 * start, 1e-6))))
            for _ in range(rounds):
                times[1].append(self._timed(step, one))
                if not single:
                    times[2].append(self._timed(step, two))
        first = statistics.median(times[1])
        if single:
            return Cost(first, 0.0)
        passes = min(first, max(statistics.median(times[2]) - first, 0.0))
        return Cost(passes, first - passes)

    def _timed(self, step: Step, window: list[Any]) -> float:
        self.device.synchronize()
        start = time.perf_counter()
        step.run(window)
        self.device.synchronize()
        return time.perf_counter() - start


def _besides(model: nn.Module, device: Device, held: int = 0) -> int:
    """What the process holds besides what trains and buffers, and ``held`` of it, where the device's memory is the process's."""
    mine = [
        *(p for _, p in named_trainable(model)),
        *model.buffers(),
    ]  # frozen weights have no place of their own in a ledger
    return process_bytes(device, held + sum(x.nbytes for x in mine))


def sizes_of(recipe: Recipe, rows: Sequence[ParameterRow], model: nn.Module, kind: str) -> StateSizes:
    """Bytes of the training state of a complete recipe on a device of this kind, windows of weights and all."""
    wanted = recipe.regularize
    window = wanted.average_form == "window"
    sizes = state_sizes(
        named_trainable(model),
        rows,
        recipe.optimizer,
        average=wanted.averages and not window,
        device_kind=kind,
        gradients=gradient_dtype(recipe),
    )
    kept = wanted.average_window * sizes.parameters if window else 0
    kept += sizes.parameters * (bool(wanted.sharpness) + bool(recipe.evaluate.patience))  # to come back to
    aside = sizes.parameters if wanted.averages else 0  # while averaged weights are evaluated
    gradients = sizes.gradients * (2 if recipe.exact_reduce else 1)  # of a micro-batch, and the total
    return replace(sizes, gradients=gradients, averages=sizes.averages + kept, update=max(sizes.update, aside))


def predicted(
    plan: Plan,
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    policy: Policy,
    take: Callable[[str, Any, str], object],
    *,
    data: int = 0,
    held: int = 0,
) -> Ledger | None:
    """The ledger of a run whose choices are made, from one pass of its first micro-batch; None where it cannot be followed.

    On a CPU, where the system tells a process's peak, what the pass really took is what is predicted from: live tensors, the
    holes that the C library's heap has between them, and working memory of operators. The batch lies in this process then, and
    so does its window.
    """
    recipe = plan.recipe
    num = -(-recipe.train.batch // batch_size(batch))
    memory.release(device)
    marked = device.kind == "cpu" and memory.reset_peak(device)
    try:
        with recomputed(model, recipe.recompute or "none"):
            traced = trace(model, loss, batch, device, policy, seed=recipe.seed)
    except Exception as err:
        if isinstance(err, ThalwegError) or ran_out(err):
            raise
        take("memory", "not predicted", f"the model's passes cannot be followed: {type(err).__name__}: {err}")
        return None
    most = memory.peak(device) if marked else None
    memory.release(device)
    return predict(
        traced,
        sizes_of(recipe, plan.parameters, model, device.kind),
        device,
        micro_batches=num,
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        data=data,
        recompute=recipe.recompute or "none",
        seen=None
        if most is None
        else most - memory.in_use(device),  # what was loaded in the pass stays, and is the process's
        process=_besides(model, device, held + num * traced.inputs),
    )
