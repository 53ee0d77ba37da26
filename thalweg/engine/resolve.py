"""Recipe -> Plan: every gap is filled before step 1, each with its reason; what cannot work is refused here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from thalweg.core import (
    DataError,
    Feed,
    Layout,
    Ledger,
    Plan,
    Recipe,
    Task,
)
from thalweg.data import (
    WHOLE,
    ChangedFeed,
    Items,
    Share,
    SharedFeed,
    Source,
    Stream,
    Tensors,
    as_source,
    batch_size,
    image_size,
    make_feed,
    resized,
    sequence_length,
    shortened,
    to_device,
    told_of_loader,
)
from thalweg.data import split as split_batch
from thalweg.data.padded import StaticFeed
from thalweg.device import Device, allocator, choose, facts
from thalweg.engine.begin import take_weights
from thalweg.engine.checks import (
    check_average,
    check_bucket,
    check_heard,
    check_metric,
    check_same_data,
    check_sequences,
    check_smallest_batch,
    tell_guard,
    try_shortest,
    try_sizes,
    whole_of,
)
from thalweg.engine.compiled_choice import IN_PARTS, settle_compile, settle_several
from thalweg.engine.compiled_worth import measured
from thalweg.engine.given import made_model, split_of, task_loss
from thalweg.engine.initialise import initialise
from thalweg.engine.inorder import check_exact
from thalweg.engine.layout import Planned, fitting_layout, on_ranks, settle_layout
from thalweg.engine.levers import as_decided, settle_levers, use_threads
from thalweg.engine.memory import Bench, fit, predicted, settle_memory
from thalweg.engine.memory_format import lay_out
from thalweg.engine.padding import settle_padding
from thalweg.engine.precision import begin_precision, joined, settle_precision, tell_gradients
from thalweg.engine.preflight import (
    ModelLoss,
    Probe,
    as_written,
    preflight,
    untouched,
)
from thalweg.engine.recompute import recomputed, tried
from thalweg.engine.regularizers import (
    WindowChange,
    augmentation,
    change_model,
    check_values,
    mixing,
    not_used,
    what_follows_the_split,
)
from thalweg.engine.release import check_release
from thalweg.engine.scheduled import (
    batch_sizes,
    image_sizes,
    scheduled,
    sequence_lengths,
    span_of,
)
from thalweg.engine.settle import Decisions, settle_evaluation, settle_length, settle_optimizer
from thalweg.engine.tensor_plan import tensor_cuts
from thalweg.engine.together import check_buffers, check_layers, check_parts, check_ranks, tell_parts
from thalweg.engine.unfreeze import IN_TURN, check_unfreeze, tell_unfreeze, thaw_of
from thalweg.optim import parameter_table
from thalweg.parallel import ALONE, Ranks
from thalweg.precision import Policy, Prepared, policy_for
from thalweg.regularize import Change, watch_batch
from thalweg.regularize.moments import alone


@dataclass(frozen=True)
class Resolved:
    """A plan and the living things that it is about.

    Attributes:
        prepared: what the precision changed in the model, and how it is taken off again.
        bench: on which variants of the run can be tried; where one was made.
        tried: on several ranks, the first samples of the run.
    """

    plan: Plan
    model: nn.Module
    loss: ModelLoss
    feed: Feed
    test: Source | None
    device: Device
    policy: Policy
    prepared: Prepared
    bench: Bench | None = None
    tried: Any = None


def resolve(
    task: Task,
    recipe: Recipe,
    *,
    saved: Plan | None = None,
    most: int | None = None,
    planning: bool = False,
    begins: bool = True,
    ranks: Ranks = ALONE,
    layout: Layout | None = None,
) -> Resolved:
    """Fill every gap of a recipe, try the model on one micro-batch, and say what was decided.

    Args:
        saved: the plan of the run that is resumed: what was measured then is not measured again.
        most: bytes of memory to plan with; None: what is there.
        planning: whether a bench is wanted, on which variants can be tried.
        begins: whether the run begins with the recipe's weights; one that goes on from a checkpoint does not read them.
        ranks: who trains; each calls this by itself, and none waits for another in it.
        layout: how the ranks stand, where another has settled it.

    Raises:
        ThalwegError: for anything that would fail later; the model has its own dtypes then, and no hooks of ours.
    """
    undo = ExitStack()
    try:
        with alone():
            return _resolve(task, recipe, saved, most, planning, undo, begins, ranks, layout)
    except BaseException:
        undo.close()
        raise


def _resolve(
    task: Task,
    recipe: Recipe,
    saved: Plan | None,
    most: int | None,
    planning: bool,
    undo: ExitStack,
    begins: bool,
    ranks: Ranks,
    layout: Layout | None,
) -> Resolved:
    decide = Decisions()
    if saved is not None:
        recipe = saved.recipe
    recompute = recipe.recompute
    recipe = settle_optimizer(recipe, decide)
    loss = task_loss(task.loss, recipe)
    moved = scheduled(recipe, loss.known)
    device, why = choose(recipe.device)
    settled = layout or settle_layout(recipe, ranks, decide, saved)
    stand = settled or Layout(data=ranks.world)
    if ranks.world > 1:
        device = ranks.own(device)
        recipe = on_ranks(recipe, ranks.world, stand, decide)
    check_exact(recipe, device)
    if recipe.device == "auto":
        recipe = replace(recipe, device=decide.take("device", str(device.torch_device), why))
    if recipe.precision != "auto":
        policy_for(recipe.precision, device)
    if saved is not None:
        as_decided(recipe, saved.decisions, device)
    elif device.is_host:
        use_threads(recipe)
    elif recipe.threads is not None:
        decide.take("threads", recipe.threads, f"not used: {device.kind} computes, not the host")
    split, recipe = split_of(task, recipe, decide.take)
    source = as_source(split.train)
    test = None if split.test is None else as_source(split.test)
    recipe, steps, samples = settle_length(recipe, source, decide)
    sizes = batch_sizes(recipe, steps)
    check_bucket(recipe, source)
    if saved is not None:
        check_same_data(saved, samples, split.facts)
    if recipe.data.workers and not isinstance(source, Items):
        decide.take("data.workers", recipe.data.workers, "not used: only a map-style Dataset is read by workers")
    if recipe.evaluate.every and test is None:
        decide.take("evaluate.every", recipe.evaluate.every, "not used: the task has no held-out data")
    if recipe.evaluate.best != "loss" and test is None:
        decide.take("evaluate.best", recipe.evaluate.best, "not used: the task has no held-out data")
    if isinstance(source, Stream) and source.iterable is split.train and source.stateful:
        decide.take("data", type(split.train).__name__, "a resumed run goes on through its state_dict()")
    elif isinstance(split.train, DataLoader):
        told = told_of_loader(split.train, recipe.train.batch, recipe.data.workers)
        decide.take("data", "DataLoader", told)
    model = made_model(task, recipe)
    if begins:
        take_weights(model, recipe, decide.take, saved)
    model = device.move(model)
    for mended in device.mend(model):
        decide.take(*mended)
    in_parts = stand.shard > 1 or stand.tensor > 1
    recipe = lay_out(model, device, decide.take, recipe, measured=saved is None and not in_parts)
    if ranks.world > 1:
        check_layers(model, ranks.world)
    if stand.shard > 1:
        check_parts(model, recipe)
    if stand.tensor > 1:
        tensor_cuts(model, recipe, stand.tensor, decide.take)
    elif recipe.tensor_plan:
        decide.take("tensor_plan", f"{len(recipe.tensor_plan)} patterns", "not used: no layer is cut (parallel.tensor)")
    recipe, early = begin_precision(recipe, model, device, decide.take)
    if early is not None:
        undo.callback(early.undo)
    mix = mixing(recipe, task, source)
    source, test = _near(source, device, decide), None if test is None else _near(test, device, None)
    feeding = partial(
        make_feed,
        source,
        batch=recipe.train.batch,
        seed=recipe.seed,
        keep_last=recipe.train.last == "keep",
        device=torch.device("cpu") if device.static_shapes else device.torch_device,
        workers=recipe.data.workers,
        timeout=recipe.data.timeout,
        augment=augmentation(recipe, task, split.augment),
        sizes=sizes,
        bucket=recipe.data.bucket,
    )
    sized = recipe.train.micro_batch != "auto"
    feed = feeding(micro_batch=whole_of(recipe.train.micro_batch) if sized else recipe.train.batch)
    window = _first_window(feed, steps, device)
    raw = _part(window[0], sized)
    whole = sequence_length(raw)
    lengths = sequence_lengths(recipe, steps, whole)
    if lengths is not None:
        check_sequences(task, raw)
    image = image_size(raw, task.inputs)
    pixels = image_sizes(recipe, steps, image)
    initialise(model, loss, partial(_windows, feed, steps, device), recipe, device, decide.take, begins=begins)
    shrink = _shrinking(lengths, pixels, task.inputs)
    if mix is not None or shrink:
        feed = _changed(feed, mix, shrink)
        window = _first_window(feed, steps, device)
    first = _part(window[0], sized)
    num_parts = len(window) if sized else -(-batch_size(window[0]) // batch_size(first))
    with joined(recipe, model, device):
        if pixels is not None:  # they may be the first: before all that takes the model at its word
            seen = pixels if test is None or image is None else [*pixels, image]
            try_sizes(model, loss, raw, seen, task.inputs, device, recipe.seed)
        changes = changed_model(model, loss, first, device, recipe, decide)
        with tried(model, recipe.recompute, decide.take), watch_batch(model, batch_size(first)) as values:
            fresh = allocator.fresh_bytes()
            probe = preflight(model, loss, first, source, device, recipe.seed, mixed=mix is not None)
            fresh = allocator.fresh_bytes() - fresh
        if ranks.world > 1:
            check_buffers(model, loss, first, device, recipe, ranks.world)
        if lengths is not None:
            try_shortest(model, loss, raw, min(lengths), device, recipe.seed)
    common = first if ranks.world > 1 else None
    del raw  # a run holds one window at a time
    per_step, why_not = _units(task, recipe, samples, probe, batch_size(first), whole)
    span = span_of(recipe, steps, per_step, why_not, samples=samples, sequence=whole)
    check_values(moved, span)
    thaw = thaw_of(recipe, span)
    with recomputed(model, recipe.recompute or "none"):
        if saved is None:
            recipe = settle_levers(recipe, model, loss, first, device, decide.take, steps=steps, fresh=fresh)
        recipe, policy, prepared = settle_precision(recipe, model, loss, first, device, decide.take, early)

    undo.callback(prepared.undo)

    def plan_of(recipe: Recipe) -> Plan:
        return Plan(
            task=task.name,
            recipe=recipe,
            decisions=(),
            steps=steps,
            samples=samples,
            loss_divisor=loss_divisor(probe, num_parts),
            parameters=parameter_table(model, optimizer=recipe.optimizer, schedule=recipe.schedule, thaw=thaw),
            unit=task.unit,
            sizes={},
            machine={**facts(device, recipe.precision), "data": split.facts, "first_loss": probe.loss},
            per_step=per_step,
            why_not=why_not,
            sequence=whole,
            image=image or (),
            changes=tuple(map(str, changes)),
            layout=stand.to_dict() if ranks.world > 1 else {},
        )

    def check(recipe: Recipe) -> None:
        check_exact(recipe, device)
        check_unfreeze(recipe, stand)
        if ranks.world > 1:
            check_ranks(recipe, stand.feeds)
        check_smallest_batch(model, recipe, samples, sizes, values)

    ledger, bench = None if saved is None else saved.ledger, None
    data = _bytes_near(source, device)
    if planning or not sized or (recipe.memory_budget is not None and saved is None):
        if sized or sizes is not None or shrink:  # the whole, and the longest, there will be
            window = _first_window(
                _changed(feeding(micro_batch=recipe.train.batch, sizes=None), mix, []), steps, device
            )
        bench = Bench(plan_of, model, loss, window[0], device, policy, check=check, data=data, held=prepared.held)
        recipe, ledger = fit(recipe, bench, decide.take, most, planning=planning)
        feed = _changed(feeding(micro_batch=whole_of(recipe.train.micro_batch)), mix, shrink)
    else:
        recipe = settle_memory(recipe)
        if saved is None:
            if sizes is not None or shrink:
                largest = feeding(micro_batch=whole_of(recipe.train.micro_batch), sizes=None)
                first = _first_window(_changed(largest, mix, []), steps, device)[0]
            ledger = predicted(
                plan_of(recipe), model, loss, first, device, policy, decide.take, data=data, held=prepared.held
            )
    if ranks.world > 1 and (saved is None or settled is None):
        ledger_of = bench.ledger if bench else partial(_predicted, plan_of, model, loss, first, device, policy, data)
        given = None if recipe.recompute == "none" else recipe.recompute
        planned = Planned(
            replace(recipe, recompute=recompute or given), ledger, ledger_of, plan_of(recipe), model, device
        )
        stand, recipe, ledger = fitting_layout(settled, planned, ranks, decide)
    check(recipe)
    if stand.shard > 1:
        if settled is None:
            check_parts(model, recipe)
        tell_parts(recipe, stand, decide.take)
    check_release(recipe, device.kind, plan_of(recipe).parameters, decide.take)
    against = IN_PARTS if stand.shard > 1 or stand.tensor > 1 else device.against_graphs(model)
    tell_unfreeze(plan_of(recipe).parameters, recipe, decide.take)
    against = IN_TURN if thaw else against
    if saved is None:

        def trying() -> Bench:
            first = _first_window(_changed(feeding(micro_batch=recipe.train.batch, sizes=None), mix, []), steps, device)
            return bench or Bench(plan_of, model, loss, first[0], device, policy, data=data, held=prepared.held)

        measure = partial(
            measured, rows=plan_of(recipe).parameters, steps=steps, bench=trying, alone=ranks.world == 1, model=model
        )
        tried_here = None if planning else measure
        recipe = settle_compile(recipe, plan_of(recipe).parameters, device, decide.take, tried_here, against, model)
    elif recipe.compile == "auto":  # of before there was a choice
        recipe = replace(recipe, compile="off")
    elif recipe.compile != "off":  # something may have been accepted since that has no place in a graph
        recipe = settle_compile(recipe, plan_of(recipe).parameters, device, decide.take, None, against, model)
    recipe = settle_several(recipe, isinstance(source, Stream), decide.take)
    tell_gradients(recipe, decide.take)
    tell_split(model, recipe, decide)
    recipe = settle_evaluation(recipe, task, test is not None, steps, decide)
    tell_guard(recipe, decide.take)
    check_heard(moved, recipe, test is not None)
    check_average(recipe, span)
    if test is not None:
        check_metric(task, recipe, model, test, device)
    padding = settle_padding(
        model,
        loss,
        first,
        recipe,
        samples,
        device,
        decide.take,
        targets=task.targets,
        changing=sizes is not None or bool(shrink),
    )
    if recipe.train.steps != steps and saved is None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    plan = replace(plan_of(recipe), decisions=saved.decisions if saved else tuple(decide.made), ledger=ledger)
    if saved is not None:
        plan = replace(plan, loss_divisor=saved.loss_divisor)
    prepared.keep()
    if ranks.world > 1:
        micro = whole_of(recipe.train.micro_batch)
        feed = _shared(partial(feeding, micro_batch=micro), mix, shrink, (stand.feed_of(ranks.rank), stand.feeds))
    if device.static_shapes:
        feed = StaticFeed(feed, device.torch_device, padding)
    return Resolved(plan, model, loss, feed, test, device, policy, prepared, bench, common)


def _predicted(
    plan_of: Callable[[Recipe], Plan],
    model: nn.Module,
    loss: ModelLoss,
    batch: Any,
    device: Device,
    policy: Policy,
    data: int,
    recipe: Recipe,
) -> Ledger | None:
    return predicted(plan_of(recipe), model, loss, batch, device, policy, lambda *told: None, data=data)


def _near(source: Source, device: Device, decide: Decisions | None) -> Source:
    """In-memory data moves to the device where it takes little of its memory."""
    if device.kind == "cpu" or not isinstance(source, Tensors) or not _is_near(source, device):
        return source  # with static shapes as well: each window would be cut out by a program of its own
    if decide is not None:
        decide.take("data on device", True, f"{source.nbytes() >> 20} MiB, under an eighth of the device's memory")
    return source.to(device.torch_device)


def _part(batch: Any, sized: bool) -> Any:
    """A micro-batch to try things on; where its size is still open, a few samples of the window."""
    return batch if sized else split_batch(batch, few(batch))[0]


def few(batch: Any) -> int:
    """Samples of a micro-batch that fits wherever anything does."""
    return min(8, batch_size(batch))


def _bytes_near(source: Source, device: Device) -> int:
    """Bytes of training data that lie on an accelerator."""
    return source.nbytes() if device.kind != "cpu" and isinstance(source, Tensors) and _is_near(source, device) else 0


def _is_near(source: Tensors, device: Device) -> bool:
    return not device.static_shapes and source.nbytes() <= device.memory_bytes() // 8


def _first_window(feed: Feed, steps: int, device: Device) -> list[Any]:
    for window in feed.windows(0, min(steps, 1)):
        return [to_device(part, device.torch_device) for part in window] if device.static_shapes else window
    raise DataError("The data holds no sample.", "The first window is empty.", "Give at least one sample.")


def _windows(feed: Feed, steps: int, device: Device) -> Iterator[list[Any]]:
    """The windows of a run from its first step on, where the model is."""
    for window in feed.windows(0, steps):
        yield [to_device(part, device.torch_device) for part in window] if device.static_shapes else window


def _shrinking(
    lengths: list[int] | None, pixels: list[tuple[int, int]] | None, inputs: str | int
) -> list[WindowChange]:
    """What makes samples smaller, by the schedules that go by steps."""
    return [*([] if lengths is None else [shortened(lengths)]), *([] if pixels is None else [resized(pixels, inputs)])]


def _changed(feed: Feed, mix: WindowChange | None, shrink: list[WindowChange]) -> Feed:
    """The feed with what is done to whole windows."""
    changes = [*([] if mix is None else [mix]), *shrink]
    return ChangedFeed(feed, changes) if changes else feed


def _shared(feeding: Callable[..., Feed], mix: WindowChange | None, shrink: list[WindowChange], share: Share) -> Feed:
    """A rank's share of the windows; those that are mixed are read whole first."""
    if mix is None:
        return _changed(feeding(share=share), None, shrink)
    return SharedFeed(_changed(feeding(share=WHOLE), mix, shrink), share)


def changed_model(
    model: nn.Module, loss: ModelLoss, batch: Any, device: Device, recipe: Recipe, decide: Decisions
) -> list[Change]:
    """Layers as the recipe asks, and what cannot be as it asks, by name."""
    if not model.training:  # as a whole; parts that were put in evaluation mode, to freeze them, stay there
        model.train()

    def run() -> None:
        with untouched(model, device, recipe.seed), as_written():
            loss(model, batch)

    changes, left = change_model(model, run, recipe)
    for name in left:
        decide.take("regularize.dropout", name, "stays torch's own: its masks follow the micro-batch and no schedule")
    for path, value, why in not_used(model, recipe):
        decide.take(path, value, why)
    return changes


def tell_split(model: nn.Module, recipe: Recipe, decide: Decisions) -> None:
    """What makes the run depend on how a window is cut into micro-batches."""
    for path, value, why in what_follows_the_split(model, recipe):
        decide.take(path, value, why)


def _units(
    task: Task, recipe: Recipe, samples: int, probe: Probe, num: int, whole: int
) -> tuple[dict[str, float], dict[str, str]]:
    """(what a whole batch takes of each unit, why others are not known)."""
    batch, per_step, why_not = float(recipe.train.batch), {}, {}
    per_step["examples"] = batch
    if task.unit == "tokens":
        per_step["tokens"] = probe.weight / num * batch
    else:
        why_not["tokens"] = f"A weight of 1 is one of the task's {task.unit}, and no token."
    if samples:
        windows = samples / recipe.train.batch
        whole_windows = math.ceil(windows) if recipe.train.last == "keep" else math.floor(windows)
        per_step["epochs"] = 1.0 / max(1, whole_windows)
    else:
        why_not["epochs"] = "The data is a stream that does not say how long an epoch is."
    return per_step, why_not


def loss_divisor(probe: Probe, micro_batches: int) -> float:
    """A power of two near the weight of a window: dividing by it never rounds."""
    return 2.0 ** round(math.log2(max(probe.weight * micro_batches, 1.0)))
