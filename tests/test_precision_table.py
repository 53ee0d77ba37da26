"""{precision} x {codec} x {recompute} x {micro-batch, release} on digits and pycode: C1, C3, C4, C5 and the ledger hold.

Small models on the tasks' own data. A cell of the table is one task, precision and codec; in it run all splits of the window
and forms of release that are possible, each with every form of recomputation. What is not possible is refused, by the same
words however it is asked for. What a new precision, codec, form of recomputation or release lacks here, fails.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import three_parts
from tests.models import assert_same_bits, state_bits
from tests.test_resume import steps_of, weights_of
from thalweg.core import DeviceError, Loss, LossError, ModelError, Recipe, RecipeError, Split, Task, ThalwegError
from thalweg.core.ledger import STATE
from thalweg.core.recipe import PRECISIONS, RECOMPUTED, RELEASES, SLOT_FORMS
from thalweg.device import Device, choose
from thalweg.engine import Step, build, resolve
from thalweg.engine.memory import Bench
from thalweg.engine.memory.planner import plan_there
from thalweg.engine.release import why_not_released
from thalweg.engine.resolve import Resolved
from thalweg.optim.codecs import CODECS
from thalweg.precision import POLICIES
from thalweg.recipes import digits, pycode
from thalweg.run import train_task
from thalweg.testing.reads import no_reads

BATCH, STEPS = 16, 2
BASE = {
    "device": "cpu",
    "train.steps": 6,
    "train.batch": BATCH,
    "train.clip": 0.5,
    "schedule.lr": "warmup(2) >> cosine(to=0.1)",
    "regularize.by_sample": True,
    "regularize.average": 0.9,
    "evaluate.every": 0,
    "checkpoint.every": 3,
    "checkpoint.keep_last": 9,
}
#: How far two splits of a window may be apart, relative: the gradient's norm at the first step, and losses and weights behind
#: the last, of the way that the weights went.
BARS = {
    "fp32": (2e-6, 2e-6, 1e-3),
    "tf32": (1e-3, 1e-3, 0.05),
    "bf16": (5e-3, 5e-3, 0.05),
    "fp16": (5e-4, 2e-4, 0.03),
    "bf16-pure": (5e-3, 5e-3, 0.05),
    "fp8": (1e-1, 5e-2, 0.3),
}
SLOTS = ("full", "bf16", "bf16+error", "int8")
#: Forms of recomputation by task: digits is a row of layers without blocks, and neither is compiled.
RECOMPUTES = {"digits": ("none",), "pycode": ("none", "blocks", "ops")}
CELLS = [(name, precision, slots) for name in RECOMPUTES for precision in BARS for slots in SLOTS]
HERE = choose("cpu")[0].precisions
#: For whole runs.
PAIRS = [(precision, slots) for precision in BARS if precision in HERE for slots in SLOTS]


@dataclass(frozen=True)
class Form:
    """How the window is gone through: in how many micro-batches, what becomes of gradients, whether they are clipped."""

    parts: int = 1
    release: str = "off"
    clip: bool = True

    def __str__(self) -> str:
        return f"{self.parts} parts, release {self.release}, {'clipped' if self.clip else 'not clipped'}"


WHOLE, BARE = Form(), Form(clip=False)
FORMS = [WHOLE, Form(2), Form(4), Form(release="two-pass"), BARE, Form(release="one-pass", clip=False)]


def possible(form: Form, precision: str) -> bool:
    return form.release != "one-pass" or not POLICIES[precision].scaled


# ---------------------------------------------------------------------- small tasks, and what spoils a step


class Spoil:
    """What a test makes infinite: the gradient of the first parameter, or the loss; both stay tensors."""

    gradient, loss = torch.ones(()), torch.zeros(())

    @classmethod
    def put(cls, *, gradient: float = 1.0, loss: float = 0.0) -> None:
        cls.gradient.fill_(gradient)
        cls.loss.fill_(loss)


@pytest.fixture(autouse=True)
def nothing_spoiled() -> Iterator[None]:
    yield
    Spoil.put()


@functools.cache
def task_of(name: str) -> Task:
    """The embedded task, on 28 samples: windows of 16 and 12."""
    task, split = (
        (digits.TASK, digits.data(max_shift=0))
        if name == "digits"
        else (pycode.TASK, pycode.data(context=16, limit_bytes=10_000))
    )
    own: Callable[..., Any] = task.loss
    few = {part: _some(data, num) for part, data, num in (("train", split.train, 28), ("test", split.test, 8))}

    @functools.wraps(own)
    def loss(model: Any, batch: Any, **options: Any) -> Loss:
        total, weight = own(model, batch, **options)
        return Loss(total + Spoil.loss, weight)

    return replace(task, data=Split(**few), loss=loss)


def _some(data: Any, num: int) -> dict[str, Tensor]:
    """The first samples of a table of tensors, or of a source."""
    if isinstance(data, dict):
        return {key: value[:num].clone() for key, value in data.items()}
    rows: dict[str, Tensor] = data.gather(torch.arange(num))
    return rows


SMALL = {
    "digits": {"model.width": 4, "regularize.ghost": 4},  # groups of 4, whatever the micro-batch
    "pycode": {"model.width": 16, "model.heads": 2, "model.layers": 2, "model.context": 16, "model.dropout": 0.1},
}


@functools.cache
def base_of(name: str) -> Recipe:
    own = {path: value for path, value in task_of(name).recipe.items() if path != "train.epochs"}
    return Recipe().override({**own, **BASE, **SMALL[name]})


def recipe_of(name: str, precision: str, slots: str, form: Form, recompute: str = "none") -> Recipe:
    base = base_of(name)
    clip = base.train.clip if form.clip else 0.0
    return replace(
        base,
        precision=precision,
        recompute=recompute,
        train=replace(base.train, micro_batch=BATCH // form.parts, clip=clip),
        optimizer=replace(base.optimizer, slots=slots, release_gradients=form.release),
    )


# ---------------------------------------------------------------------- running a cell


def step_of(found: Resolved, how: str) -> Step:
    """A fresh step of a plan, with another form of recomputation."""
    plan = replace(found.plan, recipe=replace(found.plan.recipe, recompute=how))
    step = build(plan, copy.deepcopy(found.model), found.loss, found.device, found.policy)
    first = next(step.state.model.parameters())
    first.register_hook(lambda g: g * Spoil.gradient.to(g.dtype))
    return step


@dataclass
class Ran:
    """What ``STEPS`` steps left."""

    rows: list[dict[str, float]]
    bits: dict[str, Tensor]
    way: float


def run(name: str, precision: str, slots: str, form: Form) -> Ran:
    """A form in every recomputation; all but C1, which takes two of them, is checked on the way."""
    found = resolve(task_of(name), recipe_of(name, precision, slots, form))
    windows = list(found.feed.windows(0, STEPS + 2))
    assert [len(window) for window in windows[:2]] == [form.parts, -(-3 * form.parts // 4)]
    ran: list[Ran] = []
    hows = RECOMPUTES[name]
    for how in hows:
        step = step_of(found, how)
        start = weights(state_bits(step))
        rows = [row_of(step, windows[k]) for k in range(STEPS - 1)]
        middle = step.state.snapshot({})
        kept = {group: {n: t.clone() for n, t in part.items()} for group, part in middle.groups.items()}
        in_turn = how == hows[FORMS.index(form) % len(hows)]
        with no_reads() if in_turn else nullcontext():  # C5
            last = step.run(windows[STEPS - 1])
        rows.append(dict(zip(step.fields, last.tolist())))
        bits = state_bits(step)
        ran.append(Ran(rows, bits, float((weights(bits) - start).norm())))
        assert rows == ran[0].rows, f"recompute='{how}': {form}"
        assert_same_bits(bits, ran[0].bits)
        if in_turn:
            check_bytes(found, step)
            check_resumed(step_of(found, how), replace(middle, groups=kept), windows[STEPS - 1], rows[-1], bits)
            check_skipped(step, form, windows[STEPS:])
    return ran[0]


def weights(bits: dict[str, Tensor]) -> Tensor:
    """All weights in a row, float64."""
    return torch.cat([t.double().flatten() for key, t in bits.items() if key.startswith("weights/")])


def row_of(step: Step, window: Any) -> dict[str, float]:
    return dict(zip(step.fields, step.run(window).tolist()))


def check_bytes(found: Resolved, step: Step) -> None:
    """What the plan says of the training state is what lies there: purpose by purpose, and in all, counted by storage."""
    ledger, real = found.plan.ledger, step.state.nbytes()
    assert ledger is not None
    told = {("average" if name == "averages" else name): getattr(ledger, name) for name in STATE if name != "data"}
    assert told == {name: real.get(name, 0) for name in told}
    arenas = step.state.arenas
    lying = [*step.state.model.parameters(), *step.state.model.buffers(), *(arena.grads for arena in arenas)]
    lying += [t for arena in arenas for t in (*arena.slots().values(), *arena.average_views().values())]
    lying += [p.grad for p in step.state.model.parameters() if p.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in lying if t.numel()}
    assert sum(storages.values()) == ledger.state


def check_resumed(step: Step, middle: Any, window: Any, row: dict[str, float], bits: dict[str, Tensor]) -> None:
    """C3: from a snapshot of the middle, in a process whose generators stand anywhere, the same bits."""
    torch.manual_seed(97)
    step.state.load(middle)
    assert row_of(step, window) == row
    assert_same_bits(state_bits(step), bits)


def check_skipped(step: Step, form: Form, windows: list[Any]) -> None:
    """C4: a gradient that is not finite moves nothing and no schedule goes on; fp16's scale is halved, and that is all.

    In one pass, what has a finite gradient moves; a loss that is not finite skips the step there too.
    """
    before = state_bits(step)
    bad, good = windows
    first = next(iter(step.state.weights()))
    loss_alone = form.release == "one-pass"
    if loss_alone:
        Spoil.put(gradient=float("inf"))
        row = row_of(step, bad)
        after = state_bits(step)
        own = {key for key in before if key.endswith(f"/{first}")}
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert row["skipped"] == 0 and not moved & own
        weights = {f"weights/{name}" for name, _ in step.state.model.named_parameters()}
        assert weights - moved == {f"weights/{first}"}
        before = after
    Spoil.put(**({"loss": float("inf")} if loss_alone else {"gradient": float("inf")}))
    skipped = row_of(step, bad)
    after = state_bits(step)
    Spoil.put()
    scaled = {key for key in before if key.startswith("state/loss_scale")}
    assert bool(scaled) == step.policy.scaled and skipped["skipped"] == 1
    assert not {key for key in before if not torch.equal(before[key], after[key])} - scaled
    if scaled:
        assert float(after["state/loss_scale"]) == float(before["state/loss_scale"]) / 2
        assert int(after["state/loss_scale_streak"]) == 0 < int(before["state/loss_scale_streak"])
    following = row_of(step, good)
    assert following["skipped"] == 0 and following["applied"] == skipped["applied"]
    assert following["lr"] == skipped["lr"]


def check_same_run(precision: str, whole: Ran, other: Ran, form: Form) -> None:
    """C1: another split of the window, or another time of the update, is the same run up to rounding."""
    norm, loss, moved = BARS[precision]
    for a, b in zip(whole.rows, other.rows):
        assert a["weight"] == b["weight"] and a["lr"] == b["lr"] and a["applied"] == b["applied"], form
        assert a["skipped"] == b["skipped"] == 0, form
        assert b["loss_sum"] == pytest.approx(a["loss_sum"], rel=loss), form
    assert other.rows[0]["grad_norm"] == pytest.approx(whole.rows[0]["grad_norm"], rel=norm), form
    gap = float((weights(whole.bits) - weights(other.bits)).norm()) / whole.way
    assert gap <= moved, f"{form}: {gap:.4f}"


#: All of digits; of pycode, whose steps take longer, every precision and every kind of slot.
RUN = [c for c in CELLS if c[1] in HERE and (c[0] == "digits" or c[2] == "full" or c[1] == "bf16")]


@pytest.mark.parametrize(("name", "precision", "slots"), RUN, ids=str)
def test_the_contracts_hold(name: str, precision: str, slots: str) -> None:
    ran = {form: run(name, precision, slots, form) for form in FORMS if possible(form, precision)}
    for form, one in ran.items():
        check_same_run(precision, ran[WHOLE if form.clip else BARE], one, form)
    bare, whole = ran[BARE].bits, ran[WHOLE].bits
    assert any(not torch.equal(bare[key], whole[key]) for key in bare if key.startswith("state/m")), (
        "nothing was clipped"
    )


@pytest.mark.parametrize(("number", "precision", "slots"), [(k, p, s) for k, (p, s) in enumerate(PAIRS)])
def test_c3_a_whole_run_goes_on_from_its_files(number: int, precision: str, slots: str, tmp_path: Path) -> None:
    """Records, checkpoints in files, and the end: tasks, forms and recomputation take turns."""
    name = list(RECOMPUTES)[(number + number // len(SLOTS)) % 2]
    how = RECOMPUTES[name][number % len(RECOMPUTES[name])]
    forms = [form for form in FORMS if possible(form, precision)]
    recipe = recipe_of(name, precision, slots, forms[number % len(forms)], how)
    left = []
    for resume in (False, 3):
        torch.manual_seed(number + resume)
        result = train_task(task_of(name), recipe, folder=tmp_path / "run", resume=resume)
        model = {key: t.numpy(force=True).tobytes() for key, t in result.model.float().state_dict().items()}
        left.append((weights_of(tmp_path / "run", 6), steps_of(tmp_path / "run"), model))
    assert left[0] == left[1] and len(result.records) == 3


# ---------------------------------------------------------------------- nothing is missing


def test_every_word_of_the_recipe_has_an_entry() -> None:
    assert set(BARS) == set(PRECISIONS) == set(POLICIES)
    assert set(SLOTS) == set(SLOT_FORMS) == set(CODECS)
    assert {how for hows in RECOMPUTES.values() for how in hows} | {"compiled"} == set(RECOMPUTED)
    assert {form.release for form in FORMS} == set(RELEASES)
    assert {"fp32", "bf16", "fp16", "bf16-pure"} <= set(HERE)


# ---------------------------------------------------------------------- what is refused


def parts_of(kind: type[ThalwegError], name: str, recipe: Recipe) -> tuple[str, str, str]:
    """Of the error that resolving raises."""
    with pytest.raises(kind) as caught:
        resolve(task_of(name), recipe)
    return three_parts(caught.value)


def test_every_release_that_is_not_possible_is_refused() -> None:
    """Over all precisions, splits and clipping; what is possible is in the table above."""
    met = set()
    for precision, parts, release, clip in itertools.product(BARS, (1, 2, 4), RELEASES, (True, False)):
        form = Form(parts, release, clip)
        recipe = recipe_of("pycode", precision, "full", form)
        against = None if release == "off" else why_not_released(recipe, release, ())
        if release == "off" or (parts == 1 and (release == "two-pass" or (not clip and precision != "fp16"))):
            assert against is None
            continue
        asked, numbers, remedy = three_parts(against)
        reason = "over several micro-batches" if parts > 1 else "with clipping" if clip else "with a loss scale"
        number = f"train.micro_batch={BATCH // parts}" if parts > 1 else "train.clip=0.5" if clip else "'fp16'"
        assert asked == f"optimizer.release_gradients='{release}' is not possible {reason}."
        assert number in numbers and "optimizer.release_gradients='" in remedy
        if (reason, release) not in met and precision in HERE:  # each reason once through the whole
            met.add((reason, release))
            assert parts_of(RecipeError, "pycode", recipe) == (asked, numbers, remedy)
    assert len(met) == 4


@pytest.mark.parametrize("name", RECOMPUTES)
@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputation_that_is_not_possible_is_refused(name: str, how: str) -> None:
    if how in RECOMPUTES[name]:
        return
    asked, numbers, remedy = parts_of(ModelError, name, recipe_of(name, "fp32", "full", WHOLE, how))
    if how == "compiled":
        assert asked == "recompute='compiled' was asked for, and the model is not compiled."
        assert "modules of" in numbers and "torch.compile(model)" in remedy
    else:
        assert asked == f"recompute='{how}' was asked for, and the model has no repeated blocks."
        assert "BatchNorm2d" in numbers and "recompute='none'" in remedy


@pytest.mark.parametrize("precision", [p for p in BARS if p not in HERE])
def test_precisions_that_the_device_lacks_are_refused(precision: str) -> None:
    asked, numbers, remedy = parts_of(DeviceError, "pycode", recipe_of("pycode", precision, "full", WHOLE))
    assert asked == f"precision='{precision}' is not possible on cpu."
    assert "NVIDIA GPU" in numbers and ", ".join(HERE) in numbers and "precision='auto'" in remedy


def test_bf16_on_a_device_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "precisions", property(lambda device: ("fp32", "fp16")))
    for precision in ("bf16", "bf16-pure"):
        asked, numbers, _ = parts_of(DeviceError, "digits", recipe_of("digits", precision, "full", WHOLE))
        assert f"precision='{precision}'" in asked and "It has fp32, fp16." in numbers


def test_auto_is_one_of_the_table_and_says_what_it_measured() -> None:
    found = resolve(task_of("digits"), recipe_of("digits", "auto", "full", WHOLE)).plan
    (told,) = (d for d in found.decisions if d.path == "precision" and "measured here" in d.reason)
    assert found.recipe.precision == told.value and told.value in BARS and "bf16 on 1 thread" in told.reason


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, p) for p in ("auto", "fp32", "bf16", "fp16", "bf16-pure")]
    + [(torch.bfloat16, p) for p in ("fp32", "fp16")],
    ids=str,
)
def test_weights_in_half_precision_that_a_precision_does_not_train_are_refused(
    dtype: torch.dtype, precision: str
) -> None:
    task = task_of("digits")
    made: Callable[..., Any] = task.model  # type: ignore[assignment]
    half = replace(task, model=lambda width, dropout=0.0: made(width, dropout).to(dtype))
    with pytest.raises(ModelError) as caught:
        resolve(half, recipe_of("digits", precision, "full", WHOLE))
    asked, numbers, remedy = three_parts(caught.value)
    assert "11 of 11 are" in numbers and "model.float()" in remedy
    if dtype == torch.float16:
        assert asked == "The model's trained parameters are float16, without masters in float32."
    else:
        assert asked == f"precision='{precision}' does not fit trained parameters in bfloat16."


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure"])
def test_a_loss_in_half_precision_is_refused(precision: str) -> None:
    def loss(model: Any, batch: Any) -> Loss:
        return Loss(model(batch["images"]).square().sum(), len(batch["labels"]))

    recipe = replace(recipe_of("digits", precision, "full", WHOLE), islands=())
    with pytest.raises(LossError) as caught:
        resolve(replace(task_of("digits"), loss=loss), recipe)
    asked, numbers, remedy = three_parts(caught.value)
    assert asked == f"The loss is in half precision, with precision='{precision}'."
    assert ("11 significant bits" if precision == "fp16" else "8 significant bits") in numbers and "logits" in remedy


def test_budgets_that_nothing_fits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("digits", "fp32", "full", WHOLE)
    open_ = replace(recipe, train=replace(recipe.train, micro_batch="auto"))
    asked, numbers, _ = parts_of(RecipeError, "digits", replace(recipe, memory_budget="1KiB"))
    assert asked == "memory_budget='1KiB' is under the parameters' own bytes." and "the parameters take" in numbers
    asked, numbers, remedy = parts_of(RecipeError, "digits", replace(recipe, memory_budget="30KiB"))
    assert asked == "Training does not fit memory_budget='30KiB'."
    assert "The least that was found takes" in numbers and "slots" in numbers and "thalweg plan" in remedy

    def none_left(bench: Bench, recipe: Recipe) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Bench, "confirm", none_left)
    asked, numbers, remedy = parts_of(RecipeError, "digits", open_)
    assert asked == "No micro-batch goes through."
    assert "[16, 8, 4, 2] were predicted to fit and ran out" in numbers and "Free memory" in remedy


@pytest.mark.parametrize(
    ("chip", "precision", "told"),
    [
        ("h100", "fp32", ("The chip 'h100' is not known.", "19 are.", "Did you mean h100-80gb?")),
        ("v100-16gb", "bf16", ("precision='bf16' is not possible on v100-16gb.", "It has fp32, fp16.", "Use one of")),
        ("a100-40gb", "fp8", ("precision='fp8' is not possible on a100-40gb.", "It has fp32, tf32", "Use one of")),
    ],
)
def test_plans_for_chips_that_cannot_be_made(chip: str, precision: str, told: tuple[str, str, str]) -> None:
    with pytest.raises(DeviceError) as caught:
        plan_there(task_of("digits"), recipe_of("digits", precision, "full", WHOLE), chip)
    assert all(words in part for words, part in zip(told, three_parts(caught.value)))
