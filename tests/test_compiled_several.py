"""Several small steps by one call: the same bits and records as one by one, and nothing that is due between them is late."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.models import assert_same_bits, make_step, mean_loss, mlp, points, state_bits
from thalweg.core import Recipe, Split, StopReason, Task
from thalweg.data import Order
from thalweg.engine import Loop, resolve
from thalweg.engine.compiled_backend import BACKEND, Ran
from thalweg.engine.compiled_choice import settle_several
from thalweg.engine.compiled_several import Known, Repeated, kind_of
from thalweg.engine.compiled_uniform import hoist
from thalweg.engine.step import Step
from thalweg.watch import Memory


@pytest.fixture(autouse=True)
def operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND, "aot_eager")


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each step that torch has not looked at first."""
    calls: list[int] = []
    one = Known.again

    def counted(self: Known, batch: Any, due: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return one(self, batch, due)

    monkeypatch.setattr(Known, "again", counted)
    return calls


HELD_OUT = Split(train=points(200), test=points(8))


def trained(
    model: nn.Module, several: int, steps: int = 24, **changes: Any
) -> tuple[Any, Memory, list[int], list[int]]:
    """(step, records, steps that were evaluated, steps that were saved) of a run."""
    torch.manual_seed(0)
    base = {"device": "cpu", "train.batch": 60, "train.steps": steps, "compile": "step", "schedule.lr": "cosine()"}
    step, feed = make_step(model, mean_loss, HELD_OUT, **{**base, "steps_per_call": several, **changes})
    plan = step_plan(model, {**base, "steps_per_call": several, **changes})
    sink, evaluated, saved = Memory(), list[int](), list[int]()

    def evaluate() -> dict[str, float]:
        evaluated.append(step.state.step)
        return {"loss": 1.0}

    loop = Loop(plan, step, feed, [sink], evaluate=evaluate, save=lambda must: saved.append(step.state.step))
    loop.run()
    return step, sink, evaluated, saved


def step_plan(model: nn.Module, changes: dict[str, Any]) -> Any:
    recipe = Recipe().override({"precision": "fp32", **changes})
    return resolve(Task(model=model, loss=mean_loss, data=HELD_OUT), recipe).plan


def net() -> nn.Module:
    torch.manual_seed(0)
    return mlp(0.3)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_bits_records_and_what_is_due_are_those_of_steps_one_by_one(again: list[int]) -> None:
    """Dropout, a window of another size in each epoch (200 = 60 + 60 + 60 + 20)."""
    changes = {"evaluate.every": 7, "checkpoint.every": 10}
    one, lone, evaluated, saved = trained(net(), 1, **changes)
    assert not again
    many, sink, evaluated_too, saved_too = trained(net(), 6, **changes)
    assert len(again) >= 8 and one.compiler.made == many.compiler.made == 2
    assert_same_bits(state_bits(one), state_bits(many))
    assert [(r.step, r.loss, r.grad_norm, r.lr) for r in lone.records] == [
        (r.step, r.loss, r.grad_norm, r.lr) for r in sink.records
    ]
    assert evaluated == evaluated_too == [7, 14, 21, 24] and saved == saved_too
    times = [r.seconds for r in sink.records]
    assert times == sorted(times)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_what_comes_between_calls_finds_torchs_generator_as_after_steps_one_by_one(
    share: float, monkeypatch: pytest.MonkeyPatch, again: list[int]
) -> None:
    """A graph that draws nothing is not seeded for each step; one with dropout is, or its bits would be others."""
    seeded: list[int] = []
    one = Step._seed_generators
    monkeypatch.setattr(Step, "_seed_generators", lambda *args: (seeded.append(args[1]), one(*args))[1])
    drawn, bits, steps = [], [], []
    for several in (1, 6):
        seeded.clear()
        torch.manual_seed(0)
        step, *_ = trained(
            mlp(share) if share else nn.Linear(6, 3),
            several,
            24,
            **{"train.batch": 50, "evaluate.every": 7, "checkpoint.every": 10},
        )
        steps.append(set(seeded))
        drawn.append(torch.rand(4))
        bits.append(state_bits(step))
    assert torch.equal(*drawn)
    assert_same_bits(*bits)
    assert len(again) >= 10 and steps[0] == {*range(24)}
    assert (steps[1] == steps[0]) == (share > 0)


def test_a_last_step_that_torch_has_looked_at_leaves_the_generator_as_it_left_it() -> None:
    """The call ends with the short window of an epoch (200 = 60 + 60 + 60 + 20), after one that was not seeded."""
    drawn = []
    for several in (1, 6):
        torch.manual_seed(0)
        trained(nn.Linear(6, 3), several, 24, **{"evaluate.every": 7, "checkpoint.every": 10})
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("changes", "reason", "last"),
    [
        ({"guard.nonfinite": "rewind", "guard.every": 9, "evaluate.target": 1e9}, StopReason.REACHED, 9),
        ({"guard.nonfinite": "stop"}, StopReason.DIVERGED, 6),
    ],
    ids=["rewound, then at its target", "stopped by a step"],
)
def test_a_run_ends_and_goes_back_at_the_same_step(
    changes: dict[str, Any], reason: StopReason, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 is not finite; with four a call it is neither the first of its call nor the last."""
    data = points(200)
    data["x"][int(Order(200, 20, seed=0, keep_last=True).window(5)[1][0])] = float("nan")
    base = {"device": "cpu", "precision": "fp32", "train.batch": 20, "train.steps": 24, "compile": "step"}
    base |= {"evaluate.every": 9, "checkpoint.every": 4, "checkpoint.keep_last": 99}
    found, calls, at_once = [], list[int](), Loop._several
    monkeypatch.setattr(Loop, "_several", lambda loop, windows: (calls.append(len(windows)), at_once(loop, windows))[1])
    for several in (1, 4):
        torch.manual_seed(0)
        events = list[tuple[int, str, str]]()
        ear = Memory()
        ear.event = lambda event, to=events: to.append((event.step, event.name, event.text))  # type: ignore
        split = Split(train={k: v.clone() for k, v in data.items()}, test=points(8))
        folder = tmp_path / str(several)
        given = {**base, **changes, "steps_per_call": several}
        result = thalweg.train(mlp(), mean_loss, split, given, folder=folder, sinks=[ear])
        assert result.reason is reason and result.records[-1].step == last
        assert (4 in calls) == (several == 4)
        records = [replace(record, seconds=0.0, waited=0.0) for record in result.records]
        files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
        told = [event for event in events if event[1] not in ("compiled", "memory", "data")]
        found.append((repr(records), repr([(e.step, e.metrics) for e in result.evaluations]), told, files))
    for one, several_too in zip(*found):
        assert one == several_too
    assert found[0][2] and found[0][3]


class Showing(nn.Module):
    """It keeps what it has seen last for whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.seen = out.detach()
        return out


def test_a_graph_that_hands_something_to_its_model_is_not_repeated(again: list[int]) -> None:
    found = []
    for several in (1, 4):
        torch.manual_seed(0)
        model = Showing()
        step, _, _, _ = trained(model, several, 6)
        found.append((state_bits(step), model.seen))
    assert not again
    assert_same_bits(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_graph_is_repeated_once_two_calls_were_given_the_same_besides_the_batch() -> None:
    held, row, ok = torch.zeros(2), torch.zeros(7), torch.ones(())
    run = lambda held, x: (row + x.sum(), ok)
    repeated, batch = Repeated(), {"x": torch.ones(3)}

    def call(held: Tensor) -> None:
        found = run(held, batch["x"])
        repeated.learn(Ran(run, (held, batch["x"]), found), batch, (0,), found, False)

    call(held)
    assert repeated.fitting(batch, (0,)) is None
    call(held)
    known = repeated.fitting(batch, (0,))
    assert known is not None and float(known.again({"x": torch.full((3,), 2.0)}, (0,))[0][0]) == 6.0
    others = {"x": torch.ones(2)}, {"x": torch.ones(3).double()}, {"x": torch.ones(6)[::2]}, {"y": torch.ones(3)}
    assert not any(repeated.fitting(other, (0,)) for other in others) and repeated.fitting(batch, (1,)) is None
    same = {"x": batch["x"], "y": batch["x"]}
    for _ in range(2):
        repeated.learn(Ran(run, (held, same["x"]), found := run(held, same["x"])), same, (0,), found, False)
    assert repeated.fitting({"x": torch.ones(3), "y": torch.zeros(3)}, (0,)) is None
    repeated.begin()
    assert repeated.fitting(batch, (0,)) is None  # torch has not looked in this call
    call(held.clone())  # a model that has another tensor of its own by now
    assert repeated.fitting(batch, (0,)) is None


def test_batches_with_what_cannot_be_compared_are_looked_at_each_time() -> None:
    one = {"x": torch.ones(3), "name": "a", "none": None}
    assert kind_of(one) == kind_of({**one, "x": torch.zeros(3)}) != kind_of({**one, "name": "b"})
    ids = np.arange(3)
    assert kind_of({**one, "ids": ids}) != kind_of({**one, "ids": ids.copy()})


def test_records_of_the_steps_before_one_that_breaks_off_are_kept() -> None:
    step, feed = make_step(mlp(), mean_loss, points(), device="cpu", **{"train.batch": 32, "train.steps": 20})
    step.per_call, run, saved = 8, step.run, list[int]()

    def breaking(window: Any) -> Tensor:
        if step.state.step == 12:
            raise KeyError("the data")
        return run(window)

    step.run = breaking  # type: ignore[method-assign]
    recipe = Recipe().override({"precision": "fp32", "train.batch": 32, "train.steps": 20, "device": "cpu"})
    plan = resolve(Task(model=mlp(), loss=mean_loss, data=Split(train=points())), recipe).plan
    sink = Memory()
    with pytest.raises(KeyError):
        Loop(plan, step, feed, [sink], save=lambda must: saved.append(step.state.step)).run()
    assert [r.step for r in sink.records] == list(range(1, 13)) and saved[-1] == 12


def test_who_has_no_use_for_several_is_told_so() -> None:
    told: list[tuple[str, Any, str]] = []
    take = lambda *words: told.append(words)
    assert settle_several(Recipe(compile="off", steps_per_call=4), False, take).steps_per_call == 1
    assert told[-1][:2] == ("steps_per_call", 4) and "compile='step'" in told[-1][2]
    assert settle_several(Recipe(compile="step", steps_per_call=4), True, take).steps_per_call == 1
    assert "stream" in told[-1][2] and len(told) == 2
    assert settle_several(Recipe(compile="off"), False, take).steps_per_call == 1 and len(told) == 2
    assert settle_several(Recipe(compile="step"), False, take).steps_per_call == "auto"


def test_a_number_that_many_elements_use_is_computed_once() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def update(p: Tensor, t: Tensor) -> Tensor:
        return p * (1 - 0.9**t) + p.sum()

    p, t = torch.arange(6.0), torch.tensor(3.0, dtype=torch.float64)
    traced = make_fx(update)(p, t)
    for node in traced.graph.nodes:
        assert "val" in node.meta or node.op != "call_function"
    assert hoist(traced.graph) == 2
    traced.recompile()
    torch.testing.assert_close(traced(p, t), update(p, t), rtol=0, atol=0)
    kept = [n for n in traced.graph.nodes if n.target is torch.ops._inductor_test.realize.default]
    assert all(user.target is not torch.ops.aten.pow.Scalar for n in kept for user in n.users)


def test_a_step_of_ones_own_loop_says_that_it_takes_one() -> None:
    step = thalweg.TrainStep(
        mlp(), mean_loss, {"precision": "fp32", "compile": "off", "steps_per_call": 4, "device": "cpu"}, steps=9
    )
    step({"x": torch.ones(4, 6), "y": torch.zeros(4, dtype=torch.int64)})
    assert any(d.path == "steps_per_call" and "not used" in d.reason for d in step.plan.decisions)
