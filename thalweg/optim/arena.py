"""One flat buffer for all parameters of a dtype, one for their gradients, one for each slot and for the average.

Parameters and gradients are views of the buffers: zeroing and the norm are each one call, however many tensors the model
has. Parameters that share their rule and hyper-parameters lie side by side: a rule that works element by element sees each
such segment as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import ParameterRow, seed_for
from thalweg.device import exact_dtype
from thalweg.device.lanes import in_host_memory
from thalweg.optim.batch import Batch, evaluation_weights, is_dense, new_slots, normal_like
from thalweg.optim.codecs import CODECS, Part
from thalweg.optim.lower import WORTH_COMPILING, Update, lower
from thalweg.optim.offload import Offload, Staging
from thalweg.optim.pieces import elements, one_of
from thalweg.optim.program import Program, due_now
from thalweg.optim.shared import first_values, settle_over
from thalweg.rules import RULES, STAGES

_ALIGN = 256  # elements: a block of the 8-bit codec, and more than the widest vector


@dataclass(frozen=True)
class Treatment:
    """How a segment's parameters are updated: all that their rows of the table say, but for their names.

    Attributes:
        lr: factor on the scheduled rate.
        moves: (what, name in the timetable) of what a schedule moves: "lr", "weight_decay", or an option.
        thaws: updates that leave it alone; its own are counted from there.
    """

    rule: str
    options: tuple[tuple[str, Any], ...]
    stages: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    lr: float
    weight_decay: float
    decay_form: str
    fold: str
    moves: tuple[tuple[str, str], ...] = ()
    thaws: int = 0


@dataclass(frozen=True)
class How:
    """What holds for all parameters of a run.

    Attributes:
        release: gradients are used as they come (``engine/release.py``): there is no buffer for them.
        offload: slots lie in the CPU's memory.
        gradients: what gradients are added up in, if not in the parameters' own dtype, which may be narrower.
        take: large arenas take over what a backward pass has made, instead of having it added (``take_gradients``).
    """

    slots: str = "full"
    rounding: str = "auto"
    average: bool = False
    peak: float = 1.0
    seed: int = 0
    way: str | None = None
    release: bool = False
    offload: bool = False
    gradients: torch.dtype | None = None
    take: bool = False


def aligned(elements: int) -> int:
    """Elements up to where the next parameter begins."""
    return -(-elements // _ALIGN) * _ALIGN


@dataclass
class Segment:
    """A run of the arena that shares its treatment, its program, its slots and how it is updated."""

    treatment: Treatment
    names: list[str]
    program: Program
    batch: Batch
    update: Update


class Arena:
    """The flat buffers of the parameters of one dtype.

    Args:
        named: (name, parameter); each becomes a view of the arena, strides kept.
        treatments: by name.
        how: what holds for all of them.

    Attributes:
        torn: whether an update has begun and not come to its end: after an error, weights may be half moved.
        takes: whether it takes over what the first backward pass of a window makes.
    """

    takes = False

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], treatments: Mapping[str, Treatment], how: How
    ) -> None:
        first = named[0][1]
        self.dtype, self.device, self.how = first.dtype, first.device, how
        self.scalar_dtype = exact_dtype(self.device)
        self.places: dict[str, tuple[int, nn.Parameter]] = {}
        groups: dict[Treatment, list[str]] = {}
        for name, _ in named:
            groups.setdefault(treatments[name], []).append(name)
        params, size = dict(named), 0
        borders: list[tuple[int, int]] = []
        for names in groups.values():
            begin = size
            for name in names:
                self.places[name] = (size, params[name])
                size += aligned(self._room(name, params[name]))
            borders.append((begin, size))
        self.params = torch.zeros(size, dtype=self.dtype, device=self.device)
        wanted = torch.promote_types(how.gradients or self.dtype, self.dtype)
        self.grads = torch.zeros(0 if how.release else size, dtype=wanted, device=self.device)
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        for name, (_, p) in self.places.items():
            view = self.view(self.params, name)
            view.copy_(p.detach())
            p.data = view
            p.grad = None
            if p.grad_dtype != wanted:
                p.grad_dtype = wanted  # autograd adds to a wider gradient than the parameter
            if not how.release:
                p.grad = self.view(self.grads, name)
                self._views.append((p, p.grad))
        self.torn = False
        self.takes = how.take and size >= WORTH_COMPILING and wanted == self.dtype and not how.release
        self._loose = False  # whether the next backward pass makes gradients of its own
        self.shared: dict[str, dict[str, Tensor]] = {}
        self.staging = Staging(self.device) if how.offload else None
        self._cleared = -1  # version of the gradients when they were last known to be zero
        self.segments = [
            self._segment(treatment, names, border) for (treatment, names), border in zip(groups.items(), borders)
        ]

    def _room(self, name: str, p: Tensor) -> int:
        """Elements that a parameter takes."""
        return p.numel()

    def _segment(self, treatment: Treatment, names: list[str], border: tuple[int, int]) -> Segment:
        program = self._program(treatment, border[1] - border[0])
        if program.reads == "element":
            start, stop = border
            ps, gs, folds = [self.params[start:stop]], [self.grads[start:stop]], ["batch"]
        else:
            ps = [self.view(self.params, name) for name in names]
            gs = [] if self.how.release else [self.view(self.grads, name) for name in names]
            folds = [treatment.fold] * len(names)
        slots, lowered = self._slots_and_way(program, ps, folds, border[1] - border[0])
        return Segment(treatment, names, program, Batch(ps, gs, slots, folds), lowered)

    def _program(self, treatment: Treatment, elements: int) -> Program:
        """The update of a segment of so many elements."""
        rule, how = RULES[treatment.rule], self.how
        options = dict(treatment.options)
        for what, _ in treatment.moves:
            if what in options:  # a number of the step, no constant
                at = "cpu" if self.device.type == "meta" else self.device  # slots may follow its value
                options[what] = torch.tensor(options[what], dtype=self.scalar_dtype, device=at)
        return Program(
            rule,
            options,
            stages=[(STAGES[name], STAGES[name].options(dict(given))) for name, given in treatment.stages],
            decay_form=treatment.decay_form if treatment.weight_decay else None,
            dtype=self.dtype,
            rounding=how.rounding,
            codec=CODECS[how.slots],
            average=how.average,
            unscale=True,
            clear=not (how.release or self.takes) and self.device.type == "cpu" and elements >= WORTH_COMPILING,
            seed=how.seed,
            exact=self.scalar_dtype,
        )

    def _slots_and_way(
        self, program: Program, ps: Sequence[Tensor], folds: Sequence[str], elements: int
    ) -> tuple[list[list[Tensor]], Update]:
        """What is remembered of ``ps``, and how an update of so many elements runs."""
        how = self.how
        home = torch.device("cpu") if how.offload else self.device
        slots = [
            new_slots(program, part, ps, folds, self.device if part.shape == "uniform" else home)
            for part in program.parts
        ]
        lowered = lower(program, device=self.device.type, elements=elements, way=how.way)
        if how.offload:
            slots = [
                mine if part.shape == "uniform" else [in_host_memory(x, self.device) for x in mine]
                for part, mine in zip(program.parts, slots)
            ]
            assert self.staging is not None
            away = Offload(program, lowered.run, self.staging)
            lowered = Update(away, lowered.how, f"{lowered.why}; slots come from the CPU's memory in portions")
        return slots, lowered

    def view(self, flat: Tensor, name: str, *, offset: int = 0) -> Tensor:
        """The part of a flat buffer that belongs to the parameter ``name``, in its shape and strides.

        Args:
            offset: where the buffer begins in the arena.
        """
        start, p = self.places[name]
        part = flat[start - offset : start - offset + p.numel()]
        dense = p.numel() and is_dense(p)
        return part.as_strided(p.shape, p.stride(), part.storage_offset()) if dense else part.view(p.shape)

    def clear_gradients(self) -> None:
        """Zeros, for the backward passes to add to; the last update left them, unless someone has written since."""
        if self.takes:
            for p, _ in self._views:
                p.grad = None
            self._loose = True
        elif self._cleared != self.grads._version:
            self.grads.zero_()

    def left_clear(self) -> None:
        """Whoever wrote the gradients has left zeros."""
        self._cleared = self.grads._version

    def hold_gradients(self) -> None:
        """Gradients that someone replaced or set to None go back into the arena."""
        for p, view in self._views:
            if p.grad is not view:
                if p.grad is not None:
                    view.copy_(p.grad)
                p.grad = view

    def take_gradients(self) -> None:
        """The first backward pass of a window is over: what it made becomes what the arena holds, and others add to it.

        Added to zeros, it would be read and written once more, and so would the zeros: 3 to 5 ms of a step of 2.8 million
        parameters. Zeros with a sign may differ.
        """
        if not self._loose:
            return
        self._loose = False
        views, made = [], []
        for p, view in self._views:
            if p.grad is None:
                view.zero_()
            elif p.grad.is_sparse:
                view.copy_(p.grad.to_dense())
            elif p.grad is not view:
                views.append(view)
                made.append(p.grad)
            p.grad = view
        if made:
            torch._foreach_copy_(views, made)

    def let_go_of_gradients(self) -> None:
        """Gradients of another dtype than their parameters' lie here alone: a tracer takes no such ``grad``."""
        if self.grads.dtype != self.params.dtype:
            for p, _ in self._views:
                p.grad = None

    def scalars(self, segment: Segment, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a segment's update is given: the numbers of the step, at its own rate and decay."""
        treatment = segment.treatment
        numbers = dict(given)
        table = numbers.pop("moved", None) or {}
        moved = {what: table[name] for what, name in treatment.moves}
        lr, decay = moved.pop("lr", numbers["lr"]), moved.pop("weight_decay", None)
        if treatment.thaws:
            waits = (numbers["t"] <= treatment.thaws).to(numbers["skipped"].dtype)
            numbers["skipped"] = torch.maximum(numbers["skipped"], waits)
            numbers["t"] = (numbers["t"] - treatment.thaws).clamp(min=1)
        return {
            **numbers,
            "lr": lr if treatment.lr == 1 else lr * treatment.lr,
            "wd": treatment.weight_decay if decay is None else treatment.weight_decay * decay,
            "peak": self.how.peak * treatment.lr,
            **moved,
            **self.shared.get(treatment.rule, {}),
        }

    def prepare(self) -> None:
        """An update begins: what it reads is where it reads it."""

    def total(self, value: Tensor) -> Tensor:
        """A sum over all that there is of the parameters, from the sum over what this process has."""
        return value

    def run(self, given: Mapping[str, Any], *, due: int) -> None:
        """One update of every segment.

        Args:
            given: numbers of the step, as for ``update``.
            due: steps attempted before this one: what periodic work is timed by.
        """
        waiting = False
        for segment in self.segments:
            thaws = segment.treatment.thaws
            if due < thaws:  # updates are at most as many as steps: it waits for certain
                waiting = True
                continue
            self.run_one(segment, self.scalars(segment, given), due=due - thaws)
        self.updated(waiting=waiting)

    def updated(self, *, waiting: bool = False) -> None:
        """An update has come to its end; ``waiting``: a segment was left alone."""
        self.torn = False
        if not waiting and all(segment.program.clear for segment in self.segments):
            self.left_clear()

    def run_one(self, segment: Segment, scalars: Mapping[str, Any], *, due: int) -> None:
        """One update of a segment, by what ``scalars`` gives for it."""
        program = segment.program
        now = due_now(program.rule, program.options, due)
        extra = {"noise": self._noise(segment, due)} if "noise" in program.tensors else None
        segment.update.run(segment.batch, scalars, due=now, extra=extra)

    def _noise(self, segment: Segment, step: int) -> list[Tensor]:
        """What ``noise`` gives, shaped like the segment's batch."""
        drawn = [self.noise(segment, k, step) for k in range(len(segment.names))]
        if segment.program.reads != "element":
            return drawn
        p = segment.batch.ps[0]
        whole = torch.zeros(p.shape, dtype=segment.program.wide, device=p.device)
        offset = self.places[segment.names[0]][0]
        for name, numbers in zip(segment.names, drawn):
            start = self.places[name][0] - offset
            whole[start : start + numbers.numel()] = numbers
        return [whole]

    def noise(self, segment: Segment, k: int, step: int) -> Tensor:
        """Standard normal numbers for parameter ``k`` of a segment, named by (seed, place, step); flat for element rules."""
        name = segment.names[k]
        flat = segment.program.reads == "element"
        like = self.view(self.params, name).reshape(-1) if flat else segment.batch.ps[k]
        return normal_like(like, segment.program.wide, seed_for(self.how.seed, "noise", segment.names[0], k, step))

    def alone(self, segment: Segment, k: int) -> Batch:
        """Parameter ``k`` of a segment as a batch of its own, without its gradient."""
        if segment.program.reads != "element":
            return one_of(segment.program, segment.batch, k)
        offset = self.places[segment.names[0]][0]
        start, p = self.places[segment.names[k]]
        return elements(segment.program, segment.batch, start - offset, p.numel())

    # ------------------------------------------------------------------ what is kept, by name

    def wait(self) -> None:
        """Slots that are on their way to the CPU's memory have arrived: they can be read there."""
        if self.staging is not None:
            self.staging.lanes.synchronize()

    def average_views(self) -> dict[str, Tensor]:
        """The kept average of each parameter, in its shape and strides; empty where none is kept."""
        self.wait()
        found: dict[str, Tensor] = {}
        for segment in self.segments:
            for place, part in enumerate(segment.program.parts):
                if part.name == "average":
                    found.update(self._part_views(segment, part, place))
        return found

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """(weights to evaluate, live) tensors of every segment that has others than the live ones."""
        self.wait()
        pairs = []
        for segment in self.segments:
            weights = evaluation_weights(segment.program, segment.batch)
            pairs += [] if weights is None else list(zip(weights, segment.batch.ps))
        return pairs

    def slots(self) -> dict[str, Tensor]:
        """Everything that the rules remember, as "part/parameter"; what a segment shares, as "part/first parameter"."""
        self.wait()
        found: dict[str, Tensor] = {}
        for segment in self.segments:
            for place, part in enumerate(segment.program.parts):
                if part.name != "average":
                    views = self._part_views(segment, part, place)
                    found.update({f"{part.name}/{name}": tensor for name, tensor in views.items()})
        return found

    def _part_views(self, segment: Segment, part: Part, place: int) -> dict[str, Tensor]:
        mine = segment.batch.slots[place]
        if part.shape == "uniform":
            return {segment.names[0]: mine[0]}
        if segment.program.reads != "element":
            return dict(zip(segment.names, mine))
        offset = self.places[segment.names[0]][0]
        if part.shape == "block":
            views = {}
            for name in segment.names:
                start, p = self.places[name]
                first = (start - offset) // _ALIGN
                views[name] = mine[0][first : first + -(-p.numel() // _ALIGN)]
            return views
        if part.shape == "tensor":
            return {segment.names[0]: mine[0]}
        return {name: self.view(mine[0], name, offset=offset) for name in segment.names}

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose; "offloaded" are those slots and averages that lie in the CPU's memory instead of the device's."""
        sizes = {"parameters": self.params.nbytes, "gradients": self.grads.nbytes, "slots": 0, "average": 0}
        for segment in self.segments:
            for part, mine in zip(segment.program.parts, segment.batch.slots):
                away = self.how.offload and part.shape != "uniform"
                purpose = "offloaded" if away else "average" if part.name == "average" else "slots"
                sizes[purpose] = sizes.get(purpose, 0) + sum(x.nbytes for x in mine)
        return sizes


def update(
    arenas: Sequence[Arena],
    *,
    lr: Tensor,
    t: Tensor,
    divisor: Tensor,
    skipped: Tensor,
    share: Tensor | None = None,
    moved: Mapping[str, Tensor] | None = None,
    due: int = 0,
) -> None:
    """One update of every parameter, unless ``skipped``.

    Args:
        lr: the scheduled rate; t: the number of this update, from 1.
        divisor: what gradients are divided by: weight of the window, loss scale and clipping in one number.
        share: how far the average moves towards the weights.
        moved: what schedules move besides, by the names that treatments have for it.
        due: steps attempted before this one.
    """
    given = numbers_of(arenas[0].scalar_dtype, lr, t, divisor, skipped, share, moved)
    for arena in arenas:
        arena.torn = True
        arena.prepare()
    for rule in arenas[0].shared:
        _settle(arenas, rule, given)
    for arena in arenas:
        arena.run(given, due=due)
    for arena in arenas:
        arena.torn = False


def numbers_of(
    exact: torch.dtype,
    lr: Tensor,
    t: Tensor,
    divisor: Tensor,
    skipped: Tensor,
    share: Tensor | None,
    moved: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """The numbers of a step as segments ask for them (``Arena.scalars``); arguments as for ``update``."""
    given: dict[str, Any] = {"lr": lr.to(exact), "t": t, "divisor": divisor.to(exact), "skipped": skipped}
    given["moved"] = moved
    given["single divisor"] = divisor.to(torch.float32)  # for torch's fused operators, once for all segments
    if share is not None:
        given["share"] = share.to(exact)
    return given


def _settle(arenas: Sequence[Arena], rule: str, given: Mapping[str, Any]) -> None:
    """New values of the numbers that belong to all parameters of a rule."""
    mine = [(arena, s) for arena in arenas for s in arena.segments if s.treatment.rule == rule]
    measured = [(segment.program, segment.batch, arena.scalars(segment, given)) for arena, segment in mine]
    rates = [scalars["lr"] for _, _, scalars in measured]
    settle_over(measured, arenas[0].shared[rule], rates=rates, skipped=given["skipped"], total=arenas[0].total)


def make_arenas(
    named: Sequence[tuple[str, nn.Parameter]],
    rows: Sequence[ParameterRow],
    optimizer: Any,
    how: How,
    make: Callable[[Sequence[tuple[str, nn.Parameter]], Mapping[str, Treatment], How], Arena] = Arena,
) -> list[Arena]:
    """An arena for each dtype and device among the parameters.

    Args:
        rows: the parameter table, with the rule, options and rate of each parameter.
        optimizer: the recipe's optimizer section.
        make: makes one; of parameters that are sharded, another kind of them.
    """
    treatments = {row.name: treatment_of(row, optimizer) for row in rows}
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
    for name, p in named:
        groups.setdefault((p.dtype, p.device), []).append((name, p))
    arenas = [make(group, treatments, how) for group in groups.values()]
    for arena in arenas:
        for segment in arena.segments:
            program = segment.program
            if program.rule.shared and program.rule.name not in arenas[0].shared:
                arenas[0].shared[program.rule.name] = first_values(
                    program.rule, program.options, arena.device, program.exact
                )
        arena.shared = arenas[0].shared
    return arenas


def treatment_of(row: ParameterRow, optimizer: Any) -> Treatment:
    """What a row of the table and the recipe say of a parameter."""
    rule = RULES[row.rule]
    options = rule.options(row.options)
    form = optimizer.decay_form if row.rule == optimizer.rule and optimizer.decay_form else rule.decay_form
    stages = tuple((name, tuple(sorted(given.items()))) for name, given in optimizer.stages.items())
    decay = row.weight_decay if row.decays else 0.0
    moves = tuple(row.moves.items())
    return Treatment(row.rule, tuple(options.items()), stages, row.lr, decay, form, row.fold, moves, row.thaws)
