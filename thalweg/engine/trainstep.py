"""The step for those who own their loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.checkpoint import Snapshot
from thalweg.core import Guard, Plan, Recipe, RecipeError
from thalweg.data import batch_size, split, to_device
from thalweg.device import choose, facts
from thalweg.engine.begin import take_weights
from thalweg.engine.build import build
from thalweg.engine.compiled_backend import TIME_LOST
from thalweg.engine.compiled_choice import settle_compile
from thalweg.engine.compiled_measure import Take, first_that_works
from thalweg.engine.compiled_told import fallbacks
from thalweg.engine.given import task_loss
from thalweg.engine.levers import settle_levers, use_threads
from thalweg.engine.memory import Bench, fit, settle_memory
from thalweg.engine.memory_format import lay_out
from thalweg.engine.portions import spoken
from thalweg.engine.precision import begin_precision, check_dtypes, joined, settle_precision, tell_gradients
from thalweg.engine.preflight import ModelLoss, preflight
from thalweg.engine.recompute import recomputed, tried
from thalweg.engine.regularizers import check_values
from thalweg.engine.release import check_release
from thalweg.engine.resolve import changed_model, few, loss_divisor, tell_split
from thalweg.engine.scheduled import average_lengths, scheduled, span_of
from thalweg.engine.settle import Decisions, settle_optimizer
from thalweg.engine.step import FIELDS, Step
from thalweg.engine.together import check_buffers, check_layers, check_ranks_of_step, ranks_of_step, same_state
from thalweg.optim import parameter_table
from thalweg.parallel import Ranks, on_first
from thalweg.precision import policy_for
from thalweg.regularize import set_factors
from thalweg.regularize.moments import alone

_MANY_STEPS = 1000  # that measuring should be worth, where nobody says how many there will be
_WHY_NOT = dict.fromkeys(("examples", "tokens", "epochs"), "TrainStep does not see the data ahead of it.")


def _check_in_reach(recipe: Recipe) -> None:
    """Refuse what only a loop that owns the data can do."""
    wanted, schedule = recipe.regularize, recipe.schedule
    asked = {
        "schedule.batch": schedule.batch,
        "schedule.sequence": schedule.sequence,
        "schedule.image_size": schedule.image_size,
        "initialise.whiten": recipe.initialise.whiten,
        "initialise.dirac": recipe.initialise.dirac,
        "initialise.orthogonal": recipe.initialise.orthogonal,
        "regularize.mixup": wanted.mixup,
        "regularize.cutmix": wanted.cutmix,
        "regularize.augment": wanted.augment,
        "regularize.precise": wanted.precise,
        "evaluate.patience": recipe.evaluate.patience,
        "evaluate.target": recipe.evaluate.target is not None and str(recipe.evaluate.target),
    }
    for path, value in asked.items():
        if value:
            raise RecipeError(
                f"{path} is out of TrainStep's reach.",
                f"It is {value!r}, and the data and its evaluation are your loop's.",
                "Use thalweg.train, or do it in your loop: thalweg.regularize has the pieces.",
            )
    if recipe.optimizer.unfreeze is not None:
        raise RecipeError(
            f"optimizer.unfreeze={recipe.optimizer.unfreeze!r} is out of TrainStep's reach.",
            "Layers that wait are kept out of the backward pass by thalweg.train alone.",
            "Use thalweg.train, or leave optimizer.unfreeze out.",
        )
    guard = recipe.guard
    for path, value in (("nonfinite", guard.nonfinite), ("spike", guard.spike), ("patience", guard.patience)):
        if value not in ("skip", "off", Guard().patience):
            raise RecipeError(
                f"guard.{path}={value!r} is out of TrainStep's reach.",
                "It reads no step back, and to go back or to end is your loop's.",
                f"Leave guard.{path} out, or use 'skip' and look at StepResult.skipped; thalweg.train does the rest.",
            )


@dataclass(frozen=True)
class StepResult:
    """What a step has to say, still on the device: reading a value (``float(result.loss)``) waits for it, nothing else does.

    Attributes:
        row: float64 where the device has it, in the order of ``FIELDS``.
    """

    row: Tensor

    @property
    def loss(self) -> Tensor:
        """Sum of losses over sum of weights, before the update; 0-dim."""
        return self.row[0] / self.row[1]

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the mean gradient before clipping; 0-dim."""
        return self.row[FIELDS.index("grad_norm")]

    @property
    def lr(self) -> Tensor:
        return self.row[FIELDS.index("lr")]

    @property
    def skipped(self) -> Tensor:
        """1.0 where the step was not applied and nothing was moved: not finite, or a spike (``guard.spike``)."""
        return self.row[FIELDS.index("skipped")]


class TrainStep:
    """One call is one training step: forward, backward, accumulation, clipping, update, schedule and average.

    Args:
        model: an ``nn.Module``; it is moved to the recipe's device, and its parameters become views of flat buffers.
        loss: ``loss(model, batch)`` gives ``Loss(total, weight)`` or a scalar mean.
        recipe: a ``Recipe``, or what differs from the default one by dotted path. Its data, evaluation and checkpoint
            tables have no use here.
        steps: updates that the schedule spans; needed unless the schedule is constant.
        ranks: who trains, from ``thalweg.parallel.join()``. Every rank is called with the same batch, and computes its share of the
            micro-batches: the step is that of one process. None: this process alone.

    Raises:
        ThalwegError: at construction for a recipe that is not possible, at the first call for a loss or model that is not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ModelLoss,
        recipe: Recipe | Mapping[str, Any] | None = None,
        *,
        steps: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks_of_step(ranks)
        given = recipe if isinstance(recipe, Recipe) else Recipe().override(recipe or {})
        self._decide = Decisions()
        self.recipe = settle_optimizer(given, self._decide)
        self.steps = steps or self.recipe.train.steps
        _check_in_reach(self.recipe)
        self.loss = task_loss(loss, self.recipe)
        moved = scheduled(self.recipe, self.loss.known)
        for one in moved:
            if "evaluation" in one.schedule.feedback or (one.schedule.feedback and self.steps is None):
                raise RecipeError(
                    f"schedule.{one.name}='{one.schedule}' listens to what TrainStep does not have.",
                    f"Evaluations are your loop's; steps={self.steps}.",
                    "Use loss_plateau() with steps=..., or thalweg.train.",
                )
            if self.steps is None and len(set(one.schedule.values(7))) > 1:
                raise RecipeError(
                    f"The schedule '{one.schedule}' needs the length of the run.",
                    "TrainStep was given no steps.",
                    f"Give steps=..., or schedule.{one.name}='constant()'.",
                )
        if self.ranks.world > 1:
            check_ranks_of_step(self.recipe, self.ranks)
        self.device = self.ranks.own(choose(self.recipe.device)[0])
        take_weights(model, self.recipe, self._decide.take, None)
        self.model = self.device.move(model)
        for told in self.device.mend(self.model):
            self._decide.take(*told)
        self.recipe = lay_out(self.model, self.device, self._decide.take, self.recipe)
        self.rows = parameter_table(model, optimizer=self.recipe.optimizer, schedule=self.recipe.schedule)
        span = span_of(self.recipe, self.steps or 1, {}, _WHY_NOT)
        check_values(moved, span)
        average_lengths(self.recipe, span)
        if self.steps is None and self.recipe.regularize.average_form != "ema":
            raise RecipeError(
                f"regularize.average_form='{self.recipe.regularize.average_form}' needs the length of the run.",
                "TrainStep was given no steps.",
                "Give steps=..., or average_form='ema'.",
            )
        if self.recipe.precision != "auto":
            policy_for(self.recipe.precision, self.device)
        check_dtypes(self.recipe, self.model)
        self._step: Step | None = None
        self._finished = False
        self._threads = torch.get_num_threads()  # of the process, before it is ours
        use_threads(self.recipe)  # the last thing: what is refused leaves them alone

    def __call__(self, batch: Any) -> StepResult:
        """Train on one batch, cut into micro-batches of ``recipe.train.micro_batch`` samples.

        Args:
            batch: a tree of tensors whose first dimension counts samples; any number of them. From the first one a
                micro-batch of "auto" is measured, and what ``memory_budget`` leaves open is chosen.
        """
        if self._finished:
            raise RecipeError("TrainStep is finished.", "finish() was called.", "Make a new one.")
        if self._step is None:
            self._step = self._build(to_device(batch, self.device.torch_device))
        mine = self._cut(batch)[self.ranks.rank :: self.ranks.world]
        window = [to_device(part, self.device.torch_device) for part in mine]
        row = self._step.run(window).clone()
        if self._step.state.limit.news:
            for text, _ in spoken(self._step.state.limit, self.model, self.recipe):
                warnings.warn(text, stacklevel=2)
        while self._step.news:
            if TIME_LOST in (text := self._step.news.pop(0)):
                warnings.warn(text, stacklevel=2)
        return StepResult(row)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the averaged weights."""
        return self._built().state.averaged()

    def snapshot(self) -> Snapshot:
        """All of the state, for a ``thalweg.checkpoint.Store``."""
        return self._built().state.snapshot({})

    def load(self, snapshot: Snapshot, batch: Any) -> None:
        """Go on from a snapshot of the same model and recipe; ``batch`` is any batch, used for the checks before step 0."""
        if self._step is None:
            self._step = self._build(to_device(batch, self.device.torch_device))
        self._step.state.load(snapshot)
        same_state(self._step.state, snapshot, self.ranks)

    def finish(self) -> nn.Module:
        """The model, plain again: what precision, recomputation and named streams put around it is taken off.

        Its weights are the live ones (see ``averaged``), in the dtypes that they were trained in. Torch computes with as many
        threads as before, where ``threads`` of the recipe was another number.
        """
        step = self._built()
        self._step, self._finished = None, True
        if torch.get_num_threads() == self.recipe.threads:  # nobody has said otherwise since
            torch.set_num_threads(self._threads)
        if step.recomputation is not None:
            step.recomputation.release()
        if step.streams is not None:  # its layers draw from torch's generator again
            step.streams.release()
            set_factors(self.model, {"dropout": None, "stochastic_depth": None})
        self.prepared.undo()
        return self.model

    def _built(self) -> Step:
        if self._step is None:
            raise RecipeError("TrainStep has not taken a step.", "Its state is built from the first batch.", "Call it.")
        return self._step

    def _cut(self, batch: Any) -> list[Any]:
        given = self.recipe.train.micro_batch
        return split(batch, given if isinstance(given, int) else batch_size(batch))

    def _build(self, batch: Any) -> Step:
        undo = ExitStack()
        try:
            with alone():
                step = on_first(self.ranks, lambda: self._checked(batch, undo))
                recipe = self.ranks.from_first("" if step is None else self.recipe.to_toml())
                if step is None:  # what is measured, the first rank decides for all
                    self.recipe = Recipe.from_toml(recipe)
                step = self.ranks.together(lambda: step or self._checked(batch, undo))
            self.ranks.use(self.device)
            same_state(step.state, None, self.ranks)
            return step
        except BaseException:
            undo.close()
            raise

    def _checked(self, batch: Any, undo: ExitStack) -> Step:
        seed, steps, given = self.recipe.seed, self.steps or 1, self.recipe.train.micro_batch
        opened = given == "auto" or (given is None and self.recipe.memory_budget is not None)
        window = split(batch, few(batch)) if opened else self._cut(batch)
        size = batch_size(batch)
        if self.ranks.world > 1:
            window, given = self._on_ranks(batch, size)
        # A short last micro-batch counts as one; where the size is given, later batches may be cut even if this one is not.
        least = 2 if self.recipe.optimizer.release_gradients in (None, "off") else 1
        whole = max(least, -(-size // given)) * given if isinstance(given, int) else size
        self.recipe = replace(self.recipe, train=replace(self.recipe.train, batch=whole))
        self.recipe, early = begin_precision(self.recipe, self.model, self.device, self._decide.take)
        if early is not None:
            undo.callback(early.undo)
        with joined(self.recipe, self.model, self.device):
            changes = changed_model(self.model, self.loss, window[0], self.device, self.recipe, self._decide)
            self.rows = parameter_table(self.model, optimizer=self.recipe.optimizer, schedule=self.recipe.schedule)
            with tried(self.model, self.recipe.recompute, self._decide.take):
                probe = preflight(self.model, self.loss, window[0], None, self.device, seed)
        with recomputed(self.model, self.recipe.recompute or "none"):
            recipe = settle_levers(
                self.recipe,
                self.model,
                self.loss,
                window[0],
                self.device,
                self._decide.take,
                steps=self.steps or _MANY_STEPS,
                process=False,
            )
            recipe, policy, self.prepared = settle_precision(
                recipe, self.model, self.loss, window[0], self.device, self._decide.take, early
            )
        undo.callback(self.prepared.undo)
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))

        def plan_of(recipe: Recipe) -> Plan:
            return Plan(
                task="step",
                recipe=recipe,
                decisions=(),
                steps=steps,
                samples=0,
                loss_divisor=loss_divisor(probe, len(window)),
                parameters=parameter_table(self.model, optimizer=recipe.optimizer, schedule=recipe.schedule),
                unit="samples",
                sizes={},
                machine=facts(self.device, recipe.precision),
                why_not=_WHY_NOT,
                changes=tuple(map(str, changes)),
            )

        bench = partial(Bench, plan_of, self.model, self.loss, batch, self.device, policy, held=self.prepared.held)
        ledger = None
        if opened or self.recipe.memory_budget is not None:
            train = replace(recipe.train, micro_batch="auto" if opened else recipe.train.micro_batch)
            self._decide.take("memory", f"{size} samples", "of the first batch; what is chosen holds for all that come")
            recipe, ledger = fit(replace(recipe, train=train), bench(), self._decide.take)
        recipe = settle_memory(recipe)
        tell_split(self.model, recipe, self._decide)
        check_release(recipe, self.device.kind, self.rows, self._decide.take)
        against = self.device.against_graphs(self.model)
        asked = recipe.compile

        def works(recipe: Recipe, able: Sequence[str], take: Take) -> str:
            whole = replace(recipe, train=replace(recipe.train, micro_batch=recipe.train.micro_batch or size))
            return first_that_works(bench(), whole, able, take)

        measure = works if asked == "best" else None
        recipe = settle_compile(recipe, self.rows, self.device, self._decide.take, measure, against, self.model)
        for text in fallbacks(self._decide.made, asked, recipe.compile):
            warnings.warn(text, stacklevel=2)
        if recipe.steps_per_call not in ("auto", 1):
            self._decide.take("steps_per_call", recipe.steps_per_call, "not used: a call of TrainStep is one step")
        tell_gradients(recipe, self._decide.take)
        self.recipe = recipe
        self.plan = replace(plan_of(recipe), decisions=tuple(self._decide.made), ledger=ledger)
        self.prepared.keep()
        return build(self.plan, self.model, self.loss, self.device, policy, self.ranks)

    def _on_ranks(self, batch: Any, size: int) -> tuple[list[Any], int]:
        """The micro-batches of the first batch, and their size: there is one for each rank, unless the recipe says otherwise."""
        given = self.recipe.train.micro_batch
        micro = given if isinstance(given, int) else -(-size // self.ranks.world)
        self.recipe = replace(self.recipe, train=replace(self.recipe.train, micro_batch=micro))
        check_layers(self.model, self.ranks.world)
        window = self._cut(batch)
        check_buffers(self.model, self.loss, window[0], self.device, self.recipe, self.ranks.world)
        return window, micro
