"""A step compiled as one graph is the step: the same gradients, update, statistics, rows and state, whatever the recipe.

Graphs run operator by operator here: what is tested is what is in them, and inductor takes ten seconds for each. One is inductor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg
from tests.conftest import three_parts
from tests.models import batchnorm_net, make_step, mean_loss, mlp, points, run_steps, small_gpt, state_bits
from tests.test_compiled_worth import Branching
from thalweg.checkpoint import Snapshot
from thalweg.core import Recipe, RecipeError, ThalwegError
from thalweg.device import choose, probes
from thalweg.engine import compiled_choice
from thalweg.engine.compiled import CompiledStep
from thalweg.engine.compiled_backend import BACKEND
from thalweg.engine.compiled_choice import settle_compile, why_not
from thalweg.engine.compiled_measure import Tried, choice
from thalweg.engine.compiled_replay import WARM, Replayed

WIDE = {name: x.double() if x.is_floating_point() else x for name, x in points().items()}


@pytest.fixture(autouse=True)
def operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND, "aot_eager")


def built(model: nn.Module, compiled: str, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = {
        "device": "cpu",
        "train.batch": 32,
        "optimizer.weight_decay": 0.1,
        "schedule.lr": "warmup(2) >> cosine()",
        "compile": compiled,
    }
    return make_step(model, mean_loss, WIDE, **{**base, **changes})


def net() -> nn.Module:
    torch.manual_seed(0)
    return batchnorm_net(0.3).double()


def same(graph: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    for name in plain:
        torch.testing.assert_close(
            graph[name], plain[name], rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "one micro-batch": (
        {"regularize.average": 0.9, "optimizer.rule": "prodigy", "optimizer.lr": 1.0},
        1,
    ),
    "several, the last window short, guarded, keyed dropout": (
        {
            "train.micro_batch": 8,
            "train.batch": 40,
            "guard.spike": "skip",
            "guard.window": 16,
            "schedule.clip": "linear(to=0.1)",
            "schedule.dropout": "linear(to=0.5)",
            "regularize.by_sample": True,
            "optimizer.rule": "muon",
        },
        2,
    ),
}


@pytest.mark.parametrize(("changes", "graphs"), CASES.values(), ids=list(CASES))
def test_the_graph_is_the_step_and_is_made_once(changes: dict[str, Any], graphs: int) -> None:
    plain, feed = built(net(), "off", **changes)
    rows = run_steps(plain, feed, 8)
    step, feed = built(net(), "step", **changes)
    theirs = run_steps(step, feed, 8)
    same(state_bits(step), state_bits(plain))
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(rows), rtol=1e-12, atol=1e-12)
    assert isinstance(step, CompiledStep) and step.compiler.made == graphs  # over a schedule, and another epoch


def test_gradients_may_be_wider_than_their_parameters() -> None:
    rows = []
    for compiled in ("off", "step"):
        torch.manual_seed(0)
        changes = {
            "device": "cpu",
            "train.batch": 32,
            "train.micro_batch": 8,
            "precision": "bf16-pure",
            "compile": compiled,
        }
        step, feed = make_step(batchnorm_net(), mean_loss, points(), **changes)
        rows.append(torch.tensor(run_steps(step, feed, 3)))
    assert step.state.arenas[0].grads.dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-2, atol=1e-2)


def test_a_skipped_step_moves_nothing_and_is_no_other_graph() -> None:
    def poisoned(model: nn.Module, batch: Any) -> Tensor:
        return mean_loss(model, batch) * batch["factor"].mean()

    data = {**WIDE, "factor": torch.ones(64, dtype=torch.float64)}
    changes = {"device": "cpu", "train.batch": 32, "compile": "step"}
    _, feed = make_step(net(), poisoned, data, **changes)
    data["factor"][feed.samples(1)[0]] = float("nan")  # in the second window of an epoch
    step, feed = make_step(net(), poisoned, data, **changes)
    for window in feed.windows(0, 6):
        before = state_bits(step)
        row = step.run(window).tolist()
        after = state_bits(step)
        bad = bool(torch.cat([batch["factor"] for batch in window]).isnan().any())
        assert bool(row[3]) == bad
        if bad:
            assert all(torch.equal(before[name], after[name]) for name in before)
    assert step.compiler.made == 1 and 0 < int(step.state.applied) < 6


def test_a_run_goes_on_to_the_same_bits() -> None:
    whole, feed = built(net(), "step")
    run_steps(whole, feed, 3)
    saved = whole.state.copied(), whole.state.snapshot({}).facts
    weights = {name: x.clone() for name, x in whole.state.weights().items()}
    run_steps(whole, feed, 3)
    later, feed = built(net(), "step")
    later.state.load(Snapshot({**saved[0].groups, "weights": weights}, dict(saved[1])))
    run_steps(later, feed, 3)
    wanted, found = state_bits(whole), state_bits(later)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_inductor_and_the_model_alone_stay_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND)
    weights = {}
    for compiled in ("off", "step"):
        torch.manual_seed(0)
        step, feed = make_step(
            mlp(0.3), mean_loss, points(), **{"device": "cpu", "train.batch": 32, "compile": compiled}
        )
        run_steps(step, feed, 5)
        weights[compiled] = torch.cat([p.detach().flatten() for p in step.state.model.parameters()])
    torch.testing.assert_close(weights["step"], weights["off"], rtol=0, atol=5e-6)
    monkeypatch.setenv(BACKEND, "aot_eager")
    torch.manual_seed(0)
    model = mlp(0.3)
    result = thalweg.train(
        model,
        mean_loss,
        points(),
        {"device": "cpu", "precision": "fp32", "train.batch": 32, "train.steps": 5, "schedule.lr": "constant()"}
        | {"compile": "model"},
    )
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(found, weights["off"], rtol=0, atol=5e-6)
    assert result.plan.recipe.compile == "model" and model._compiled_call_impl is None  # the model is the user's again


class Sideways(nn.Module):
    """Adds a penalty on parameters that it keeps in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.kept = [list(self.layer.parameters())]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + F.linear(x, *self.kept[0])
        return y


class Counting(nn.Module):
    """Counts its calls in a buffer of one number, which the tracer of torch 2.13 would not move."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize(
    ("make", "asked", "numbers"),
    [
        (Counting, "The model counts in a buffer that a graph would not move.", "'calls' is one number"),
        (Branching, "The step cannot be compiled as one graph.", "Data-dependent branching"),
        (Sideways, "The step as one graph computes something else than plain operators.", "norm of the gradient"),
    ],
)
def test_what_a_graph_cannot_be_ends_the_run_at_its_first_step(
    make: Callable[[], nn.Module], asked: str, numbers: str
) -> None:
    torch.manual_seed(0)
    step, feed = make_step(make(), mean_loss, points(), device="cpu", compile="step")
    with pytest.raises(ThalwegError) as found:
        run_steps(step, feed, 1)
    parts = three_parts(found.value)
    assert parts[0] == asked and numbers in parts[1] and "compile='off'" in parts[2]


REFUSED = {
    "optimizer.release_gradients": "one-pass",
    "optimizer.offload": True,
    "recompute": "blocks",
    "exact_reduce": True,
    "regularize.sharpness": 0.05,
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_one_graph_has_no_place_for_is_refused_where_it_was_asked_for(path: str) -> None:
    device, _ = choose("cpu")
    recipe = Recipe().override({path: REFUSED[path], "compile": "step"})
    assert path in why_not(recipe, (), device, "step") and not why_not(recipe, (), device, "model")
    with pytest.raises(RecipeError) as found:
        settle_compile(recipe, (), device, lambda path, value, why: value)
    asked, numbers, _ = three_parts(found.value)
    assert asked == "compile='step' is not possible in this run." and path in numbers
    assert why_not(Recipe(), (), device, "step") == "" and "recorded" in why_not(Recipe(), (), device, "captured")


def test_an_older_torch_compiles_the_model_alone_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_choice, "traces_autograd", lambda: False)
    told: list[tuple[str, Any, str]] = []

    def take(path: str, value: Any, why: str) -> Any:
        told.append((path, value, why))
        return value

    device, _ = choose("cpu")
    assert settle_compile(Recipe(compile="step"), (), device, take).compile == "model"
    assert told[0][:2] == ("compile", "model") and "torch 2.13" in told[0][2]


class Chip:
    """A device as a recipe's ``compile`` sees it."""

    def __init__(self, graph_kind: str, captures: bool) -> None:
        self.kind, self.graph_kind, self.captures_graphs, self.compile_backend = "chip", graph_kind, captures, "made up"


def test_auto_is_a_whole_step_on_a_chip_of_graphs_and_measured_on_one_of_operators() -> None:
    told: list[tuple[str, Any, str]] = []

    def take(path: str, value: Any, why: str) -> Any:
        told.append((path, value, why))
        return value

    asked: list[Any] = []

    def measure(recipe: Recipe, able: Any, take: Any) -> str:
        asked.append(list(able))
        return "captured"

    graphs: Any = Chip("graph", False)
    assert settle_compile(Recipe(), (), graphs, take, measure).compile == "step" and not asked
    eager: Any = Chip("eager", True)
    assert settle_compile(Recipe(), (), eager, take, measure).compile == "captured"
    sharp = Recipe().override({"regularize.sharpness": 0.1})
    settle_compile(sharp, (), eager, take, measure)
    assert asked == [["off", "model", "step", "captured"], ["off", "model"]]
    assert any(value == "not 'step'" and "sharpness" in why for _, value, why in told)


def test_the_seconds_to_compile_are_charged_to_the_steps_ahead() -> None:
    told: list[str] = []
    found = {"off": Tried(0.1, 0.010, 1.0), "model": Tried(10.0, 0.008, 1.0), "step": Tried(20.0, 0.005, 1.0)}
    take = lambda path, value, why: told.append(f"{value}: {why}")
    assert choice(found, 1000, take) == "off"
    assert choice(found, 5000, take) == "step"
    assert told[1] == (
        "step: the shortest run of 5000 steps: off 10 ms a step, 0.1 s to the first; "
        "model 8 ms a step, 10 s to the first; step 5 ms a step, 20 s to the first"
    )


def test_what_is_measured_is_tried_on_copies_and_one_that_fails_is_passed_over() -> None:
    from thalweg.core import Split, Task
    from thalweg.engine import resolve
    from thalweg.engine.compiled_measure import fastest

    told: list[tuple[Any, str]] = []
    for model, able in ((mlp(), ["off", "model"]), (Branching(), ["off", "step"])):
        task = Task(model=model, loss=mean_loss, data=Split(train=points()))
        before = [p.detach().clone() for p in model.parameters()]
        recipe = Recipe().override({"precision": "fp32", "train.steps": 9, "device": "cpu", "optimizer.lr": 1e-3})
        resolved = resolve(task, recipe, planning=True)
        assert resolved.bench is not None
        take = lambda path, value, why: told.append((value, why))
        chosen = fastest(resolved.bench, resolved.plan.recipe, able, 9, take)
        assert chosen == told[-1][0] and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(f"{how} " in told[0][1] for how in ("off", "model"))
    assert told[1][0] == "not 'step'" and "cannot be compiled as one graph" in told[1][1] and told[2][0] == "off"


def test_a_recording_is_made_for_each_shape_and_plays_the_new_batch() -> None:
    seen: list[float] = []
    state = torch.zeros(())

    def graph(batch: Any, due: tuple[int, ...]) -> Tensor:
        state.add_(batch["x"].sum() * (1 + sum(due)))
        return state

    def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        seen.append(1.0)
        return lambda: (work(), None)[1], state

    played = Replayed(graph, record)
    total = 0.0
    for size in (3, 2):
        for k in range(WARM + 3):
            total += size * (k + 1)
            assert float(played({"x": torch.full((size,), float(k + 1))}, (0,))) == total
    played({"x": torch.ones(3)}, (1,))
    assert len(seen) == 2


def test_a_gpt_trains_as_one_graph_with_ties_and_text() -> None:
    from tests.models import ragged_text, text_loss

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = small_gpt(0.1).double()
            self.gpt.head.weight = self.gpt.tokens.weight

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.gpt(tokens)
            return out

    states = {}
    for compiled in ("off", "step"):
        torch.manual_seed(0)
        step, feed = make_step(
            Tied(), text_loss, ragged_text(), **{"device": "cpu", "train.batch": 16, "compile": compiled}
        )
        run_steps(step, feed, 4)
        states[compiled] = state_bits(step)
    same(states["step"], states["off"])


def test_a_resumed_run_keeps_what_was_chosen() -> None:
    from thalweg.core import Plan, Split, Task
    from thalweg.engine import resolve

    task = Task(model=mlp(), loss=mean_loss, data=Split(train=points()))
    plan = resolve(task, Recipe().override({"device": "cpu", "precision": "fp32", "compile": "step"})).plan
    old = replace(plan, recipe=replace(plan.recipe, compile="auto"))  # of before there was a choice
    assert resolve(task, Recipe(), saved=Plan.from_json(old.to_json())).plan.recipe.compile == "off"
    assert resolve(task, Recipe(), saved=plan).plan.recipe.compile == "step"
    sharp = plan.recipe.override({"regularize.sharpness": 0.05})  # accepted on resuming
    with pytest.raises(RecipeError) as err:
        resolve(task, Recipe(), saved=replace(plan, recipe=sharp))
    assert "compile='step' is not possible" in three_parts(err.value)[0]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def test_channels_may_lie_last_and_the_run_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 6, 6, generator=draw, dtype=torch.float64)
    data = {"x": x, "y": torch.randint(0, 3, (32,), generator=draw)}
    states, here = {}, probes.capabilities_of("cpu")
    for last, compiled in ((False, "off"), (True, "off"), (True, "step")):
        monkeypatch.setattr(probes, "_probed", lambda kind, index, last=last: replace(here, channels_last=last))
        torch.manual_seed(0)
        changes = {"device": "cpu", "train.batch": 16, "compile": compiled, "optimizer.rule": "muon"}
        step, feed = make_step(Images().double(), mean_loss, data, **changes)
        weight = step.state.model.get_submodule("layers.2").weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        run_steps(step, feed, 3)
        states[last, compiled] = state_bits(step)
    same(states[True, "off"], states[False, "off"])
    same(states[True, "step"], states[False, "off"])
