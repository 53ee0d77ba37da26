"""Planning: what a run will take, here and elsewhere; the micro-batch and the ways of saving that are chosen to fit."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import thalweg
from tests.conftest import ROOT, run_cli, three_parts
from tests.models import batchnorm_net, mean_loss, mlp, points, ragged_text, small_gpt, text_loss
from thalweg.core import Change, Ledger, Recipe, RecipeError, Split, Task, ThalwegError
from thalweg.device import KNOWN
from thalweg.device import memory as device_memory
from thalweg.device.chips import CHIPS, chip_called
from thalweg.engine import resolve
from thalweg.engine.memory import Bench, PeakWatch
from thalweg.engine.memory.bench import Cost
from thalweg.engine.memory.here import cheapest_changes_first, plan_here
from thalweg.engine.memory.planner import plan_there
from thalweg.recipes import find_task

MIB = 1 << 20
PLAIN = {"train.batch": 32, "train.steps": 3, "precision": "fp32", "device": "cpu", "schedule.lr": "constant()"}

#: All that a budget could choose but the micro-batch.
PINNED = {
    "recompute": "none",
    "optimizer.slots": "int8",
    "optimizer.release_gradients": "off",
    "optimizer.offload": False,
}


def gpt_task(layers: int = 2, num: int = 64) -> Task:
    def model() -> nn.Module:
        from thalweg.recipes.models.gpt import GPT

        return GPT(vocab=17, context=12, width=16, heads=2, layers=layers, dropout=0.0)

    return Task(name="gpt", model=model, loss=text_loss, data=lambda: ragged_text(num))


def made(**changes: Any) -> Recipe:
    return Recipe().override({**PLAIN, **changes})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not what is tested: two steps each."""
    monkeypatch.setattr("thalweg.engine.memory.bench._MOST", 2)


# ---------------------------------------------------------------------------------------------- the ledger


def check_sums(ledger: Ledger) -> None:
    assert sum(size for _, size in ledger.rows()) == ledger.peak
    assert all(size >= 0 for _, size in ledger.rows())
    assert Ledger.from_dict(ledger.to_dict()) == ledger


def test_every_run_predicts_its_memory_and_says_after_20_steps_how_well() -> None:
    told: list[Any] = []

    class Hear(thalweg.watch.Memory):
        def event(self, event: Any) -> None:
            told.append(event)

    data = Split(train=points(64), test=points(32, seed=1))
    recipe = {**PLAIN, "train.steps": 22, "train.micro_batch": 8, "regularize.average": 0.9}
    result = thalweg.train(mlp, mean_loss, data, recipe, sinks=[Hear()])
    ledger = result.plan.ledger
    assert ledger is not None and ledger.micro_batch == 8
    check_sums(ledger)
    sizes = result.plan.sizes
    assert (ledger.parameters, ledger.gradients) == (sizes["parameters"], sizes["gradients"])
    assert (ledger.slots, ledger.averages) == (sizes["slots"], sizes["average"])
    words = [event for event in told if event.name == "memory"]
    assert [event.step for event in words] == [20]
    assert "predicted peak" in words[0].text and "measured" in words[0].text


def test_the_comparison_is_of_the_peak_since_the_run_began(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"peak": 0}
    monkeypatch.setattr(device_memory, "release", lambda device, **_: None)
    monkeypatch.setattr(device_memory, "reset_peak", lambda device: known.update(peak=100 * MIB) is None)
    monkeypatch.setattr(device_memory, "peak", lambda device: known["peak"])
    ledger = replace(plan_there(find_task("digits"), made(), "a100-40gb").ledger, peak=110 * MIB)
    watch = PeakWatch(ledger, resolve(find_task("digits"), made()).device)
    assert watch.told() == ""  # not begun
    watch.begin()
    assert watch.told() == "memory after 20 steps: predicted peak 110 MiB, measured 100 MiB (+10.0%)"
    monkeypatch.setattr(device_memory, "peak", lambda device: None)
    assert watch.told() == ""


def test_smaller_micro_batches_take_less_and_the_state_stays(capsys: pytest.CaptureFixture[str]) -> None:
    ledgers = [plan_here(gpt_task(), made(**{"train.micro_batch": m})).ledger for m in (32, 8)]
    for ledger in ledgers:
        check_sums(ledger)
    assert ledgers[0].state == ledgers[1].state
    assert ledgers[0].activations == pytest.approx(4 * ledgers[1].activations, rel=0.05)
    assert ledgers[0].modules[0].name == "blocks"


# ---------------------------------------------------------------------------------------------- elsewhere

HUGE = """
import resource, sys
import torch, thalweg
from tests.test_plan import gpt_task
from thalweg.core import Recipe
from thalweg.recipes.models.gpt import GPT
from thalweg.core import Task
from tests.models import ragged_text, text_loss
make = lambda: GPT(vocab=17, context=12, width=16384, heads=128, layers=2, dropout=0.0)
task = Task(name="huge", model=make, loss=text_loss, data=lambda: ragged_text(64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = thalweg.memory.forecast(task, {"train.batch": 32, "train.steps": 10}, on="h200-141gb", devices=8, sharded=True)
ledger = found.ledger
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(ledger.parameters, ledger.slots, grown, found.fits)
"""


def test_a_model_that_is_far_too_large_for_this_machine_is_planned_without_allocating_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUGE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    parameters, slots, grown, fits = done.stdout.split()
    whole = 2 * 12 * 16384**2 * 4  # the matrices of its blocks, in bytes
    assert int(parameters) == pytest.approx(whole / 8, rel=0.01)
    assert int(slots) == pytest.approx(2 * whole / 8, rel=0.01)
    assert int(grown) < 1 << 20  # KiB: less than 1 GiB, of 26 GB of parameters alone
    assert fits == "True"


def test_sharding_spreads_the_state_and_gathers_blocks() -> None:
    task, recipe = gpt_task(), made(**{"optimizer.slots": "full"})
    alone = plan_there(task, recipe, "a100-40gb", devices=8)
    spread = plan_there(task, recipe, "a100-40gb", devices=8, sharded=True)
    rows = [(-(-p.shape[0] // 8), p[0].numel()) for p in small_gpt().parameters()]
    held = sum(4 * 256 * -(-num * each // 256) for num, each in rows)  # each begins at a multiple of 256 elements
    assert (spread.ledger.parameters, spread.ledger.gradients, spread.ledger.slots) == (held, held, 2 * held)
    assert held < alone.ledger.parameters
    assert spread.ledger.activations == alone.ledger.activations
    assert spread.ledger.gathered > alone.ledger.gathered == 0
    assert spread.ledger.micro_batch == alone.ledger.micro_batch == 4
    for found in (alone, spread):
        check_sums(found.ledger)
        assert found.timed.startswith("computed") and "data sheet" in found.timed


def test_a_chip_that_is_slower_takes_longer_and_one_without_bf16_is_not_given_it() -> None:
    task = Task(name="mlp", model=mlp, loss=mean_loss, data=lambda: points(64))
    times = [plan_there(task, made(precision="fp32"), chip).seconds for chip in ("h100-80gb", "t4-16gb")]
    assert times[0] is not None and times[1] is not None and times[0] <= times[1]
    assert {d[0]: d[1] for d in plan_there(task, made(precision="auto"), "t4-16gb").decisions}["precision"] == "fp16"
    with pytest.raises(ThalwegError) as err:
        plan_there(task, made(precision="bf16"), "v100-16gb")
    three_parts(err.value)
    assert err.value.asked == "precision='bf16' is not possible on v100-16gb."


def test_arithmetic_is_counted() -> None:
    """One linear layer: 2 operations a weight and sample forwards, twice that backwards (no gradient of the inputs)."""
    from thalweg.device import choose
    from thalweg.engine.memory.roofline import Roofline
    from thalweg.engine.memory.trace import trace
    from thalweg.precision import policy_for

    device, _ = choose("cpu")
    mode = Roofline(CHIPS["h100-80gb"], "fp32")
    model = nn.Linear(256, 512, bias=False)
    batch = {"x": torch.zeros(64, 256), "y": torch.zeros(64, dtype=torch.int64)}
    trace(model, mean_loss, batch, device, policy_for("fp32", device), fake=True, also=mode)
    assert mode.flops == 2 * 2 * 64 * 256 * 512
    assert mode.seconds > 0


def test_a_model_that_looks_at_values_is_refused_elsewhere_and_planned_here() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * (1.0 if float(x.sum()) > 1e9 else 2.0)

    task = Task(name="looks", model=Looks, loss=mean_loss, data=lambda: points(64))
    with pytest.raises(ThalwegError) as err:
        plan_there(task, made(), "h100-80gb")
    three_parts(err.value)
    assert err.value.asked == "The model cannot be tried on shapes alone."
    check_sums(plan_here(task, made()).ledger)


def test_every_chip_has_what_a_plan_reads() -> None:
    for name, chip in CHIPS.items():
        assert chip_called(name) is chip
        assert chip.kind in KNOWN and chip.memory > 2**30 and chip.bandwidth > 1e11 and chip.link > 1e9
        assert "fp32" in chip.rates and chip.rate("fp32") < max(chip.rates.values())
        if "bf16" in chip.rates:
            assert chip.rate("bf16-pure") == chip.rate("bf16")


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on", "h100"], ["The chip 'h100' is not known.", "Did you mean h100-80gb?"]),
        (["--shard"], ["--shard goes with --on.", "--on h100-80gb x 8"]),
        (["--on", "h100-80gb", "y", "8"], ["--on h100-80gb y 8 names no chips."]),
        (["--on", "h100-80gb", "x", "0"], ["--on h100-80gb x 0 names no chips."]),
        (["--on", "h100-80gb", "x", "7"], ["7 devices do not share train.batch=64.", "64/7 = 9.14."]),
        (["--device-memory", "much"], ["--device-memory='much' is no size in bytes."]),
        (["--set", "precision=bf16", "--on", "t4-16gb"], ["precision='bf16' is not possible on t4-16gb."]),
    ],
)
def test_a_mistake_is_an_error_of_three_parts(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from thalweg.cli.main import main

    assert main(["plan", "digits", *arguments]) == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told
    assert len(told.strip().splitlines()) == 3


def test_the_command_prints_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from thalweg.cli.main import main

    assert main(["plan", "digits", "--set", "precision=fp32"]) == 0
    told = capsys.readouterr().out
    for word in ("digits on", "parameters", "gradients", "slots", "averages", "activations", "temporary", "process"):
        assert word in told
    for word in ("fits:", "micro-batch: 64 of 64", "recomputation: none", "a step,", "train.micro_batch=32", "x "):
        assert word in told
    assert main(["plan", "digits", "--set", "precision=fp32", "--device-memory", "1MiB"]) == 0
    assert "does not fit: " in capsys.readouterr().out


def test_chips_are_listed_without_a_model(tmp_path: Any) -> None:
    done = run_cli("plan", "digits", "--on", "list", cwd=tmp_path)
    assert done.returncode == 0 and "h100-80gb" in done.stdout and "data sheet" in done.stdout


def test_changes_are_listed_cheapest_first() -> None:
    changes = [
        Change("a", 10, 1.5, True),
        Change("b", 30, 1.1, True),
        Change("c", 5, None, True),
        Change("d", 20, 1.1, True),
    ]
    assert [change.what for change in cheapest_changes_first(changes)] == ["d", "b", "a", "c"]


# ---------------------------------------------------------------------------------------------- what is chosen


def weights(result: Any) -> list[torch.Tensor]:
    return [x.detach().clone() for x in result.model.state_dict().values()]


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two)))


def limited(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """As though only so many bytes were there."""
    monkeypatch.setattr(device_memory, "available", lambda device: max(0, room - device_memory.in_use(device)))


def peaks(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    """Predicted peaks of ``each`` MiB a sample, so that what fits is known."""

    def ledger(self: Bench, recipe: Recipe) -> Ledger:
        micro = recipe.train.micro_batch
        assert isinstance(micro, int)
        saved = {"none": 1.0, "ops": 0.5, "blocks": 0.25}[recipe.recompute or "none"]
        slots = {"full": 8, "bf16": 4, "int8": 2}[recipe.optimizer.slots or "full"] * MIB
        kept = int(each * MIB * micro * saved)
        return Ledger(
            4 * MIB, 0, slots, 0, 0, 0, kept, (), 0, 4 * MIB + slots + kept, "here", 0, micro, str(recipe.recompute)
        )

    monkeypatch.setattr(Bench, "ledger", ledger)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_auto_takes_the_largest_that_fits_and_the_run_is_the_one_with_that_size(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks(monkeypatch, 1)
    monkeypatch.setattr("thalweg.engine.memory.budget.MARGIN", 1.0)
    monkeypatch.setattr(device_memory, "in_use", lambda device: 0)
    monkeypatch.setattr(device_memory, "available", lambda device: 24 * MIB)  # 12 of state, and 12 samples
    auto = thalweg.train(lambda: mlp(dropout), mean_loss, points(64), {**PLAIN, "train.micro_batch": "auto"})
    assert auto.plan.recipe.train.micro_batch == 8
    reason = next(d.reason for d in auto.plan.decisions if d.path == "train.micro_batch")
    assert "confirmed by a step on a copy" in reason and "24.00 MiB" in reason
    given = thalweg.train(lambda: mlp(dropout), mean_loss, points(64), {**PLAIN, "train.micro_batch": 8})
    assert same(auto, given)
    assert [r.loss for r in auto.records] == [r.loss for r in given.records]


def test_a_size_that_was_predicted_to_fit_and_does_not_go_through_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    real = Bench.confirm

    def confirm(self: Bench, recipe: Recipe) -> None:
        tried.append(recipe.train.micro_batch)  # type: ignore[arg-type]
        if tried[-1] > 8:  # type: ignore[operator]
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, recipe)

    monkeypatch.setattr(Bench, "confirm", confirm)
    result = thalweg.train(batchnorm_net, mean_loss, points(64), {**PLAIN, "train.micro_batch": "auto"})
    assert tried == [32, 16, 8] and result.plan.recipe.train.micro_batch == 8
    reason = next(d.reason for d in result.plan.decisions if d.path == "train.micro_batch")
    assert "[32, 16] did not go through" in reason
    paths = [d.path for d in result.plan.decisions]
    assert "batch normalization" in paths or any("ghost" in path for path in paths)  # what follows the split is told
    given = thalweg.train(batchnorm_net, mean_loss, points(64), {**PLAIN, "train.micro_batch": 8})
    assert same(result, given)


def test_an_error_on_the_copy_that_is_no_lack_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(self: Bench, recipe: Recipe) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Bench, "confirm", confirm)
    with pytest.raises(RuntimeError, match="something else"):
        thalweg.train(mlp, mean_loss, points(64), {**PLAIN, "train.micro_batch": "auto"})


COSTS = {"none": 1.0, "ops": 1.1, "blocks": 1.8}


def priced(monkeypatch: pytest.MonkeyPatch, *, int8: float) -> None:
    """Prices that are known: a pass takes 10 ms and 1 ms a sample, times what recomputation costs; the update 20 ms."""

    def cost(self: Bench, recipe: Recipe, *, budget_s: float = 1.5) -> Cost:
        micro = recipe.train.micro_batch
        assert isinstance(micro, int)
        rest = 0.02 * (int8 if recipe.optimizer.slots == "int8" else 2.0 if recipe.optimizer.slots == "bf16" else 1.0)
        passes = (0.01 + 0.001 * micro) * COSTS[recipe.recompute or "none"]
        single = recipe.optimizer.release_gradients != "off"
        return Cost(10.0, 0.0) if single else Cost(passes, rest)

    monkeypatch.setattr(Bench, "cost", cost)


@pytest.mark.parametrize(
    ("budget", "int8", "wanted"),
    [
        # 32 samples of 1 MiB, 4 of weights, 8 of slots (2 in int8): 44 MiB with nothing given up.
        (44, 1.0, {"recompute": "none", "optimizer.slots": "full", "train.micro_batch": 32}),
        (43, 1.0, {"recompute": "none", "optimizer.slots": "int8", "train.micro_batch": 32}),  # slots cost nothing here
        (43, 9.0, {"recompute": "ops", "optimizer.slots": "full", "train.micro_batch": 32}),  # and here they are dear
        (
            27,
            9.0,
            {"recompute": "ops", "optimizer.slots": "full", "train.micro_batch": 16},
        ),  # 1.1 x 2 passes before 1.8
    ],
)
def test_a_budget_takes_the_cheapest_that_fits(
    budget: int, int8: float, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks(monkeypatch, 1)
    priced(monkeypatch, int8=int8)
    chosen = resolve(gpt_task(), made(memory_budget=f"{budget}MiB")).plan
    found = {path: chosen.recipe.flat()[path] for path in wanted}
    assert found == wanted
    assert chosen.ledger is not None and chosen.ledger.peak <= budget * MIB
    for path in (
        "recompute",
        "optimizer.slots",
        "optimizer.release_gradients",
        "optimizer.offload",
        "train.micro_batch",
    ):
        reason = [d.reason for d in chosen.decisions if d.path == path]
        assert reason, path
    if wanted["recompute"] != "none":
        reason = next(d.reason for d in chosen.decisions if d.path == "recompute")
        assert "times the time of a step without, measured" in reason and f"'{budget}MiB'" in reason


def test_what_a_recipe_gives_is_not_changed_by_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks(monkeypatch, 1)
    priced(monkeypatch, int8=1.0)
    given = {
        "optimizer.slots": "full",
        "recompute": "none",
        "train.micro_batch": 8,
        "optimizer.release_gradients": "off",
    }
    chosen = resolve(gpt_task(), made(memory_budget="20MiB", **given)).plan.recipe
    assert {path: chosen.flat()[path] for path in given} == given
    with pytest.raises(RecipeError) as err:
        resolve(gpt_task(), made(memory_budget="19MiB", **given))
    three_parts(err.value)
    assert err.value.asked == "Training does not fit memory_budget='19MiB'."
    assert "20.00 MiB" in err.value.numbers


def test_a_budget_is_refused_under_the_parameters_own_bytes() -> None:
    with pytest.raises(RecipeError) as err:
        resolve(gpt_task(), made(memory_budget="1KiB"))
    three_parts(err.value)
    assert err.value.asked == "memory_budget='1KiB' is under the parameters' own bytes."
    with pytest.raises(RecipeError) as err:
        resolve(gpt_task(), made(memory_budget="2MiB", **PINNED))  # of the process alone there is more
    assert err.value.asked == "Training does not fit memory_budget='2MiB'."


def test_a_run_within_a_budget_is_the_run_with_the_same_values_given_and_resumes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks(monkeypatch, 1)
    priced(monkeypatch, int8=1.0)
    data, recipe = ragged_text(64), {**PLAIN, "train.steps": 6, "checkpoint.every": 2}
    whole = thalweg.train(small_gpt, text_loss, data, {**recipe, "memory_budget": "20MiB"}, folder=tmp_path / "a")
    chosen = whole.plan.recipe
    values = {path: chosen.flat()[path] for path in ("recompute", "optimizer.slots", "train.micro_batch")}
    assert values != {"recompute": "none", "optimizer.slots": "full", "train.micro_batch": 32}
    given = thalweg.train(small_gpt, text_loss, data, {**recipe, **values})
    assert same(whole, given)

    def never(self: Bench, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("what was measured then is not measured again")

    monkeypatch.setattr(Bench, "cost", never)
    monkeypatch.setattr(Bench, "confirm", never)
    again = thalweg.train(
        small_gpt, text_loss, data, {**recipe, "memory_budget": "20MiB"}, folder=tmp_path / "a", resume=4
    )
    assert same(whole, again)
    assert again.plan.recipe == chosen and again.plan.ledger == whole.plan.ledger


def test_auto_leaves_the_sizes_of_windows_to_a_number() -> None:
    with pytest.raises(RecipeError) as err:
        resolve(gpt_task(), made(**{"train.micro_batch": "auto", "schedule.batch": "linear(start=0.5, to=1)"}))
    three_parts(err.value)
    assert err.value.asked == "train.micro_batch='auto' does not go with schedule.batch."


def test_batch_normalization_is_never_given_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks(monkeypatch, 1)
    task = Task(name="bn", model=batchnorm_net, loss=mean_loss, data=lambda: points(64))
    with pytest.raises(RecipeError):
        resolve(task, made(memory_budget="7MiB", **PINNED))  # 4 of weights, 2 of slots: one sample alone would fit
    assert resolve(task, made(memory_budget="8MiB", **PINNED)).plan.recipe.train.micro_batch == 2


def test_a_model_that_cannot_be_copied_says_so() -> None:
    class NoCopy(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("has a socket")

    task = Task(name="no copy", model=lambda: NoCopy(6, 3), loss=mean_loss, data=lambda: points(64))
    with pytest.raises(ThalwegError) as err:
        resolve(task, made(**{"train.micro_batch": "auto"}))
    three_parts(err.value)
    assert "has a socket" in err.value.numbers


def test_train_step_measures_at_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks(monkeypatch, 1)
    monkeypatch.setattr("thalweg.engine.memory.budget.MARGIN", 1.0)
    monkeypatch.setattr(device_memory, "in_use", lambda device: 0)
    monkeypatch.setattr(device_memory, "available", lambda device: 20 * MIB)
    recipe = {"precision": "fp32", "schedule.lr": "constant()", "train.micro_batch": "auto"}
    found = []
    for micro in ("auto", 8):
        torch.manual_seed(0)
        model = mlp()
        step = thalweg.TrainStep(model, mean_loss, {**recipe, "train.micro_batch": micro}, steps=4)
        for _ in range(2):
            step(points(32))
        assert step.recipe.train.micro_batch == 8
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_address_space_that_is_left_counts() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = device_memory.in_use(resolve(find_task("digits"), made()).device)
        resource.setrlimit(resource.RLIMIT_AS, ((used + (64 << 30)), hard))
        assert device_memory.available(resolve(find_task("digits"), made()).device) < 64 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_budget_that_is_no_constraint_changes_nothing_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks(monkeypatch, 1)

    def never(self: Bench, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing need be measured")

    monkeypatch.setattr(Bench, "cost", never)
    chosen = resolve(gpt_task(), made(memory_budget="1GiB")).plan.recipe
    assert (chosen.recompute, chosen.optimizer.slots, chosen.train.micro_batch) == ("none", "full", 32)


def test_what_saves_memory_is_never_taken_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks(monkeypatch, 1)
    priced(monkeypatch, int8=0.1)  # noise
    chosen = resolve(gpt_task(), made(memory_budget="28MiB", recompute="none")).plan.recipe  # 16 samples either way
    assert (chosen.optimizer.slots, chosen.train.micro_batch) == ("full", 16)


def test_an_impossible_value_is_refused_with_its_own_reason() -> None:
    with pytest.raises(RecipeError) as err:
        resolve(gpt_task(), made(memory_budget="4GiB", **{"optimizer.release_gradients": "one-pass"}))
    assert "one-pass' is not possible" in err.value.asked


@pytest.mark.parametrize("what", ["schedule.sequence", "schedule.batch"])
def test_the_ledger_is_of_the_longest_window(what: str) -> None:
    changes = {what: "warmup(50%, start=0.25)"}
    recipe = made(**{"train.steps": 8})
    plain = resolve(gpt_task(), recipe).plan.ledger
    moved = resolve(gpt_task(), recipe.override(changes)).plan.ledger
    assert plain is not None and moved is not None
    assert (moved.activations, moved.micro_batch) == (plain.activations, plain.micro_batch)


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"regularize.average_form": "window", "regularize.average_window": 7}, 7),
        ({"regularize.sharpness": 0.05}, 1),
        ({"evaluate.patience": 2}, 1),
    ],
)
def test_copies_of_the_weights_are_in_the_ledger(changes: dict[str, Any], copies: int) -> None:
    data = Split(train=ragged_text(64), test=ragged_text(16, seed=1))
    task = Task(name="gpt", model=small_gpt, loss=text_loss, data=lambda: data)
    plain, more = (resolve(task, made().override(c)).plan.ledger for c in ({}, changes))
    assert plain is not None and more is not None
    assert more.averages - plain.averages == copies * plain.parameters


def test_elsewhere_a_budget_chooses_and_what_training_refuses_is_refused() -> None:
    task = gpt_task()
    tight = plan_there(task, made(memory_budget="1MB", recompute="none"), "h100-80gb")
    assert tight.ledger.peak <= 10**6 and tight.ledger.micro_batch < 32
    assert any(path == "train.micro_batch" for path, _, _ in tight.decisions)
    for changes in (
        {"optimizer.release_gradients": "one-pass"},
        {"optimizer.offload": True, "optimizer.rule": "prodigy"},
    ):
        with pytest.raises(RecipeError) as err:
            plan_there(task, made(**changes), "h100-80gb")
        three_parts(err.value)
    once, twice = (plan_there(task, made(**{"regularize.sharpness": rho}), "h100-80gb").seconds for rho in (0.0, 0.05))
    assert once is not None and twice is not None and twice > 1.7 * once


def test_elsewhere_a_model_that_is_given_as_it_is_stays_where_it_is() -> None:
    model = small_gpt()
    before = [p.detach().clone() for p in model.parameters()]
    task = Task(name="mine", model=model, loss=text_loss, data=ragged_text(64))
    ledger = thalweg.memory.estimate(task, dict(PLAIN), on="a100-40gb")
    check_sums(ledger)
    assert all(torch.equal(a, b) and b.device.type == "cpu" for a, b in zip(before, model.parameters()))


def test_an_estimate_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Bench, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("bytes alone were asked for")

    monkeypatch.setattr(Bench, "cost", never)
    check_sums(thalweg.memory.estimate(gpt_task(), dict(PLAIN)))


def test_a_change_is_told_by_what_it_saves_of_the_peak_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = itertools.count(1)  # each trial leaves something in the process
    monkeypatch.setattr("thalweg.engine.memory.bench.process_bytes", lambda *_: next(grown) << 25)
    found = plan_here(gpt_task(), made())
    assert found.changes and next(grown) > 3
    assert all(change.peak < found.ledger.peak for change in found.changes)


def test_a_model_that_does_not_run_in_bfloat16_is_planned_without_that_change() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x)) + self.last(self.first(torch.zeros(1, 6)))  # float32 made inside

    task = Task(name="own", model=Own, loss=mean_loss, data=lambda: points(64))
    changes = [change.what for change in plan_here(task, made()).changes]
    assert "optimizer.slots=int8" in changes and "precision=bf16-pure" not in changes
