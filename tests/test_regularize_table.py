"""Every regularizer and schedule, in every precision, split, compiled or not, interrupted or not: C1 to C4 hold.

The table is in ``tests/table_models.py``. Regularizers and scheduled values run in the full product of precision and split,
interrupted and not; in half precision, entries take turns in which split is interrupted. Transforms of images and shapes of
the rate never meet the precision (one acts before the model, the other is a table of numbers), so each of them is tried in
one precision, in turn: every pair of values still occurs.
What lives in the model is also compiled, and recomputed in the backward pass.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import assert_same_bits, state_bits
from tests.table_models import BATCH, REGULARIZERS, TABLE, Entry, recipe_of, task_of
from tests.test_resume import steps_of, weights_of
from thalweg import regularize
from thalweg.core import ModelError, Recipe
from thalweg.core.recipe import AVERAGES, DECAY_FORMS, Regularize, Schedule
from thalweg.data import tree_map
from thalweg.engine import Step, build, resolve
from thalweg.engine.step import FIELDS
from thalweg.regularize import PENALTIES, TRANSFORMS
from thalweg.regularize.dropout import Drop
from thalweg.run import Result, train_task
from thalweg.schedules import COMPOSITIONS, FOREIGN, SHAPES

PRECISIONS = {"fp32": torch.float64, "bf16": torch.float32, "fp16": torch.float32}  # fp32 leaves float64 as it is


def _cells() -> list[Any]:
    """(entry, precision): all, but for entries that never meet the precision."""
    cells = []
    for number, (name, entry) in enumerate(TABLE.items()):
        apart = name.startswith(("augment", "schedule of lr"))
        for precision in [list(PRECISIONS)[number % 3]] if apart else PRECISIONS:
            cells.append(pytest.param(name, entry, precision, id=f"{name}-{precision}"))
    return cells


CELLS = _cells()


# ---------------------------------------------------------------------- nothing is missing


def test_every_field_of_the_recipe_has_an_entry() -> None:
    changed = {path for entry in TABLE.values() for path in recipe_of(entry, "fp32", BATCH).flat()}
    changed -= set(Recipe().flat())
    given = {path for entry in TABLE.values() for path in entry.changes} | changed
    for table, name in ((Regularize, "regularize"), (Schedule, "schedule")):
        for field in dataclasses.fields(table):
            path = f"{name}.{field.name}"
            assert any(one == path or one.startswith(f"{path}.") for one in given), f"{path} is in no entry"


def test_every_registered_name_has_an_entry() -> None:
    recipes = [recipe_of(entry, "fp32", BATCH) for entry in TABLE.values()]
    rates = " ".join(recipe.schedule.lr for recipe in recipes)
    missing = [name for name in [*SHAPES, *COMPOSITIONS] if f"{name}(" not in rates]
    missing += [room for room in FOREIGN if f"{room}." not in rates]
    missing += [name for name in PENALTIES if not any(name in r.regularize.penalties for r in recipes)]
    moved = [r.schedule.penalties for r in recipes]
    missing += [name for name in ("l1", "spectral") if not any(name in table for table in moved)]
    missing += [form for form in DECAY_FORMS if not any(r.optimizer.decay_form == form for r in recipes)]
    missing += [form for form in AVERAGES if not any(r.regularize.average_form == form for r in recipes)]
    augments = [text for r in recipes for text in r.regularize.augment]
    missing += [name for name in TRANSFORMS if not any(text.split("(")[0] == name for text in augments)]
    assert not missing, f"no entry for {missing}"


def test_every_layer_has_an_entry() -> None:
    """Ours that drop, and those of batch normalization."""
    kinds = set()
    for name, entry in TABLE.items():
        if name.startswith("layer") or name in ("ghost", "batchnorm frozen"):
            kinds |= {type(module) for module in built(entry, "fp32", BATCH)[0].state.model.modules()}
    ours = [kind for kind in vars(regularize).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    apart = {regularize.SyncedBatchNorm}  # needs ranks: tests/test_normalization.py
    missing = [k for k in ours if k not in apart and not any(issubclass(kind, k) for kind in kinds)]
    assert not missing and any(issubclass(kind, Drop) for kind in ours)


# ---------------------------------------------------------------------- C1 and C3


def run(entry: Entry, precision: str, micro: int, folder: Path, resume: bool | int = False) -> tuple[Result, Any]:
    """A run, and all that it left but times: weights, slots, averages, records, the model that it gave."""
    task = task_of(entry, PRECISIONS[precision])
    result = train_task(task, recipe_of(entry, precision, micro), folder=folder, resume=resume)
    last = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    given = {name: t.numpy().tobytes() for name, t in result.model.state_dict().items()}
    return result, (last, weights_of(folder, last), steps_of(folder), given)


@pytest.mark.parametrize(("name", "entry", "precision"), CELLS)
def test_c1_and_c3(name: str, entry: Entry, precision: str, tmp_path: Path) -> None:
    """Both splits are the same run, or told apart; and each, resumed from its middle, ends in the same bits."""
    results = []
    for place, micro in enumerate((BATCH, entry.small)):
        folder = tmp_path / str(micro)
        result, left = run(entry, precision, micro, folder)
        if precision == "fp32" or place == len(name) % 2:  # in half precision one split of each entry, in turn
            torch.manual_seed(micro)  # whatever state this process has
            _, again = run(entry, precision, micro, folder, resume=entry.steps // 2)
            assert again == left, "C3"
        results.append(result)
    told = {d.path for d in results[1].plan.decisions if d.path in ("regularize.by_sample", "regularize.ghost")}
    assert bool(told) == bool(entry.split), "the plan says by name what follows the split, and nothing else"
    if entry.split:
        gaps = [abs(a.loss - b.loss) for a, b in zip(results[0].records, results[1].records)]
        assert max(gaps) > 1e-3, "the reason given is none"
    elif precision == "fp32":
        check_same_run(*results, loss=1e-12, norm=1e-12, moved=1e-10)
    else:
        check_same_run(*results, loss=0.01, norm=0.1, moved=0.25)


def check_same_run(a: Result, b: Result, *, loss: float, norm: float, moved: float) -> None:
    assert len(a.records) == len(b.records) and len(a.evaluations) == len(b.evaluations) > 0
    for x, y in zip(a.records, b.records):
        assert x.loss == pytest.approx(y.loss, rel=loss) and x.grad_norm == pytest.approx(y.grad_norm, rel=norm)
        assert x.weight == y.weight and x.lr == y.lr and x.applied == y.applied and x.values == y.values
    for x, y in zip(a.evaluations, b.evaluations):
        assert x.metrics["loss"] == pytest.approx(y.metrics["loss"], rel=loss) and x.best == y.best
    start = [p.detach() for p in start_of(a).parameters()]
    ends = [[p.detach() for p in result.model.parameters()] for result in (a, b)]
    way = _length([p - q for p, q in zip(ends[0], start)])
    assert _length([p - q for p, q in zip(*ends)]) <= moved * way, "the weights"
    if loss < 1e-9:
        for one, other in zip(a.model.buffers(), b.model.buffers()):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def start_of(result: Result) -> nn.Module:
    """The model as a run like this one began with."""
    options = tuple(sorted(result.plan.recipe.model.items()))
    return _start(result.plan.unit == "tokens", next(result.model.parameters()).dtype, options)


@cache
def _start(tokens: bool, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    task = task_of(Entry(tokens=tokens), dtype)
    recipe = dataclasses.replace(Recipe(), model=dict(options))
    return resolve(task, recipe.override({"precision": "fp32", "train.steps": 1, "train.batch": BATCH})).model


def _length(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.flatten().double() for t in tensors]).norm())


def without(entry: Entry) -> Entry:
    """What an entry is compared with: a schedule with the value that stands still, all else with the bare model."""
    changes = dict(entry.changes)
    groups = {
        pattern: {key: value for key, value in group.items() if key != "schedule"}
        for pattern, group in changes.pop("optimizer.groups", {}).items()
    }
    if groups:
        changes["optimizer.groups"] = {pattern: group for pattern, group in groups.items() if group}
    elif any(path.startswith("schedule.") for path in changes):
        changes = {path: value for path, value in changes.items() if not path.startswith("schedule.")}
    else:
        changes = {
            path: value for path, value in changes.items() if path in ("model.norm", "train.clip", "optimizer.lr")
        }
    return Entry(changes, tokens=entry.tokens, steps=entry.steps)


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("nothing", "batchnorm pooled")])
def test_every_entry_does_something(name: str) -> None:
    """Else what holds for it says nothing."""
    entry = TABLE[name]
    runs = [train_task(task_of(one), recipe_of(one, "fp32", BATCH)) for one in (entry, without(entry))]
    told = [[(r.loss, r.grad_norm, r.lr, r.weight) for r in result.records] for result in runs]
    ends = [torch.cat([t.double().flatten() for t in result.model.state_dict().values()]) for result in runs]
    assert told[0] != told[1] or ends[0].shape != ends[1].shape or not torch.equal(*ends)


def test_c1_pooled_statistics_are_those_of_the_window_whatever_the_split() -> None:
    """What batch normalization sees first does not hang on the split: its statistics are those of torch over all of it."""
    for micro in (8, 4, 2):
        step, feed = built(REGULARIZERS["batchnorm pooled"], "fp32", micro, dtype=torch.float64)
        model = step.state.model
        window = next(iter(feed.windows(0, 1)))
        with torch.no_grad():
            seen = model.stem(torch.cat([part["images"] for part in window])).transpose(0, 1).flatten(1)
        step.run(window)
        layer = model.blocks[0].branch[0]
        torch.testing.assert_close(layer.running_mean, 0.1 * seen.mean(1), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * seen.var(1), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- C4


def built(
    entry: Entry,
    precision: str,
    micro: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    **changes: Any,
) -> tuple[Step, Any]:
    """The step of an entry and its feed; ``backend``: of a compiled model."""
    task = task_of(entry, dtype)
    if backend is not None:
        task = dataclasses.replace(
            task, model=lambda **options: torch.compile(task_of(entry, dtype).model(**options), backend=backend)
        )
    resolved = resolve(task, recipe_of(entry, precision, micro, **changes))
    return build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy), resolved.feed


def poisoned(batch: Any) -> Any:
    """Its gradient is infinite or NaN."""
    bad = tree_map(lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() and t.ndim == 1 else t, batch)
    return {**bad, **({"images": batch["images"] * float("nan")} if "images" in batch else {})}


@pytest.mark.parametrize(("name", "entry", "precision"), CELLS)
def test_c4_a_skipped_step_moves_nothing(name: str, entry: Entry, precision: str) -> None:
    """Not the weights, slots, averages, statistics, what schedules have heard; and no schedule goes on."""
    micro = (BATCH, entry.small)[len(name) % 2]
    step, feed = built(entry, precision, micro)
    windows = list(feed.windows(0, 5))
    for window in windows[:3]:
        step.run(window)
    before = state_bits(step)
    bad = [*windows[3][:-1], poisoned(windows[3][-1])]
    skipped = dict(zip(step.fields, step.run(bad).tolist()))
    after = state_bits(step)
    scale = {key for key in before if key.startswith("state/loss_scale")}
    assert skipped["skipped"] == 1 and bool(scale) == (precision == "fp16")
    moved = {key for key in before if not torch.equal(before[key], after[key])} - scale
    assert not moved
    following = dict(zip(step.fields, step.run(windows[4]).tolist()))
    moves = ["applied", "lr", *step.fields[len(FIELDS) :]]
    assert following["skipped"] == 0 and {k: following[k] for k in moves} == {k: skipped[k] for k in moves}
    assert step.state.timetable.now["lr"] == following["lr"] and int(step.state.applied) == 4


# ---------------------------------------------------------------------- compiled, and recomputed

IN_MODEL = [
    "all in one",
    "plain dropout",
    *(name for name in REGULARIZERS if name.startswith("layer")),
    "dropout behind branches",
    "dropout before the head",
    "stochastic depth by row",
    "stochastic depth by batch",
    "batchnorm pooled",
    "batchnorm frozen",
    "ghost",
    "sam",
    "schedule of dropout",
    "schedule of stochastic depth",
]


def trained(step: Step, feed: Any, num: int = 4) -> list[list[float]]:
    return [step.run(window).tolist() for window in feed.windows(0, num)]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", IN_MODEL)
def test_recomputed_blocks_are_the_same_run(name: str) -> None:
    """Activation checkpointing: the same masks when a block is run again, and its statistics are not counted again."""
    entry = TABLE[name]
    plain, feed = built(entry, "fp32", 4)
    again, _ = built(entry, "fp32", 4, **{"model.recompute": True})
    assert trained(plain, feed) == trained(again, feed)
    assert_same_bits(state_bits(plain), state_bits(again))


def test_a_layer_that_is_called_twice_and_recomputed_is_refused_by_name() -> None:
    step, feed = built(TABLE["r-drop"], "fp32", 4, **{"model.recompute": True})
    with pytest.raises(ModelError, match=r"'blocks\.\d\.branch\.2' is recomputed"):
        trained(step, feed, 1)


@pytest.mark.parametrize("name", [*IN_MODEL, "ema", "window"])
def test_a_compiled_model_is_the_same_run_and_compiles_once(name: str) -> None:
    """Given compiled, as a user does: the same masks, statistics and names; a rate that moves compiles nothing anew."""
    entry = TABLE[name]
    eager, feed = built(entry, "fp32", 4, dtype=torch.float64)
    torch._dynamo.reset()
    compiled, _ = built(entry, "fp32", 4, dtype=torch.float64, backend="aot_eager")
    before = graphs()
    wanted = trained(eager, feed)
    windows = list(feed.windows(0, 4))
    rows = [compiled.run(windows[0]).tolist()]
    made = graphs()
    rows += [compiled.run(window).tolist() for window in windows[1:]]
    assert graphs() == made > before
    for row, want in zip(rows, wanted):
        assert row == pytest.approx(want, rel=1e-9)
    bits = state_bits(compiled), state_bits(eager)
    assert bits[0].keys() == bits[1].keys()
    for key, value in bits[1].items():
        torch.testing.assert_close(bits[0][key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, when inductor is imported
def test_kernels_of_the_compiler_draw_the_same_masks() -> None:
    """One run through inductor, with all that lives in a model."""
    entry = TABLE["all in one"]
    eager, feed = built(entry, "fp32", 4)
    torch._dynamo.reset()
    compiled, _ = built(entry, "fp32", 4, backend="inductor")
    for row, want in zip(trained(compiled, feed), trained(eager, feed)):
        assert row == pytest.approx(want, rel=1e-4)
