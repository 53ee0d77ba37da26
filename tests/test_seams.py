"""Seams between schedules, averages, evaluations and runs that go on: each was once wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.conftest import three_parts
from tests.test_scheduled import BATCH, LIST, NUM, data, model, mse, train
from thalweg.core import Loss, Recipe, Split, StopReason, Task, ThalwegError
from thalweg.data import Order
from thalweg.engine.scheduled import movable
from thalweg.optim import Arena, parameter_table
from thalweg.optim.arena import How, make_arenas, update
from thalweg.rules import RULES
from thalweg.run import train_task
from thalweg.schedules import Span, parse

HELD = Split(train=data(), test=data(16))


def refused(act: Any, *words: Any, **named: Any) -> str:
    with pytest.raises(ThalwegError) as err:
        act(*words, **named)
    return " ".join(three_parts(err.value))


# --- every option that can be scheduled acts, however the update runs -------------------------------------------------

MOVABLE = [(rule, option) for rule in RULES for option in movable(RULES[rule]) if RULES[rule].defaults[option] > 0]


def moved_by(rule: str, option: str, way: str | None, factors: list[float]) -> Tensor:
    """The weights after a few updates in which an option is multiplied by these factors."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8))
    holder = nn.Module()
    holder.hidden = nn.Module()
    holder.hidden.weight = weight
    optimizer = Recipe().override({"optimizer.rule": rule, "optimizer.lr": 0.01}).optimizer
    (row,) = parameter_table(holder, optimizer=optimizer)
    row = type(row)(**{**vars(row), "rule": rule, "moves": {option: option}})
    (arena,) = make_arenas([("hidden.weight", weight)], [row], optimizer, How(peak=0.01, way=way))
    assert isinstance(arena, Arena)
    base = float(RULES[rule].defaults[option])
    draw = torch.Generator().manual_seed(1)
    one = torch.ones((), dtype=torch.float64)
    for t, factor in enumerate(factors, start=1):
        arena.grads.copy_(torch.randn(arena.grads.shape, generator=draw))
        update(
            [arena], lr=0.01 * one, t=torch.tensor(float(t)), divisor=one, skipped=torch.tensor(0.0), due=t - 1,
            moved={option: torch.tensor(base * factor, dtype=torch.float64)},
        )  # fmt: skip
    return weight.detach().clone()


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize(("rule", "option"), MOVABLE)
def test_an_option_that_can_be_scheduled_acts(rule: str, option: str, way: str) -> None:
    if "curvature" in RULES[rule].needs:
        pytest.skip("a recipe refuses this rule: it needs a second gradient")
    try:
        still = moved_by(rule, option, way, [1.0] * 8)
    except ThalwegError as err:
        assert way == "compiled" and "not possible" in err.asked  # this rule runs eagerly everywhere
        pytest.skip("no compiled form of this rule")
    if option in ("most", "most_rms", "growth"):
        factors = [1.0] * 2 + [1e-3] * 6  # limits act where they bind
    elif option == "d_coef":
        factors = [1.0] * 2 + [1e6] * 6  # a distance that has been found is never lowered
    else:
        factors = [1.0] * 2 + [0.5] * 6
    other = moved_by(rule, option, way, factors)
    tiny = option.startswith("eps") or option in ("eps1", "eps2", "graft_eps")
    if not tiny:
        assert not torch.equal(still, other), "the schedule is accepted and does nothing"
    assert other.isfinite().all()


def test_first_values_are_no_numbers_that_move() -> None:
    for rule, option in (("prodigy", "d0"), ("adagrad", "start"), ("kl_shampoo", "start"), ("muon", "eps")):
        assert option in RULES[rule].defaults and option not in movable(RULES[rule])


def test_a_schedule_of_an_option_moves_its_own_rule_and_no_groups_own_value() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    changes = {"optimizer.rule": "soap", "schedule.options": {"b1": "hold()"}}
    recipe = Recipe().override(changes)
    rows = parameter_table(net, optimizer=recipe.optimizer, schedule=recipe.schedule)
    assert {row.rule for row in rows} == {"soap", "adamw"}
    assert all(bool(row.moves) == (row.rule == "soap") for row in rows)
    groups = {"0.*": {"options": {"momentum": 0.9}}}
    own = train({"optimizer.groups": groups, "schedule.options": {"momentum": "constant(value=0.5)"}})
    same = train({"optimizer.groups": groups})
    for a, b in zip(own.model.parameters(), same.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


# --- amounts where the batch grows ------------------------------------------------------------------------------------


def test_an_amount_after_a_rest_is_measured_where_its_piece_begins() -> None:
    rates = (0.025,) * 40 + (0.1,) * 60
    values = parse("hold() >> linear(3 epochs)").values(Span(100, {"epochs": rates}))
    fallen = [k for k, value in enumerate(values) if value < 1]
    assert sum(rates[k] for k in fallen) == pytest.approx(3.0) and values[-1] == 0.0


def test_epochs_are_covered_where_the_batch_grows() -> None:
    recipe = {"train.steps": "auto", "train.epochs": 2.0, "schedule.batch": "warmup(50%, start=0.25) >> hold()"}
    result = train(recipe)
    assert result.records[-1].epoch == 1 and sum(r.weight for r in result.records) == 2 * NUM


def test_the_last_window_of_a_growing_batch_is_looked_at_before_step_1() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()

    growing = {"train.micro_batch": 4, "schedule.batch": "warmup(50%, start=0.5) >> hold()", "train.steps": 30}
    told = refused(thalweg.train, net, mse, data(41), {**LIST, **growing})
    assert "batch normalization" in told


# --- runs that go on --------------------------------------------------------------------------------------------------


AMOUNTS = ["warmup(8 examples) >> linear(0.5 epochs, to=0.5) >> hold()", "warmup(25%) >> cosine(0.5 epochs) >> hold()"]


@pytest.mark.parametrize("at", [4, 9])
@pytest.mark.parametrize("text", AMOUNTS)
def test_a_run_from_the_middle_of_a_growing_batch_keeps_what_was(text: str, at: int, tmp_path: Path) -> None:
    task = Task(model=model, loss=mse, data=data())
    changes = {"schedule.lr": text, "schedule.batch": "warmup(80%, start=0.25) >> hold()", "checkpoint.every": 1,
               "checkpoint.keep_last": 99}  # fmt: skip
    whole = train_task(task, Recipe().override({**LIST, **changes}), folder=tmp_path / "a")
    on = thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=3, then="hold()", at=at)
    import json

    lines = [json.loads(line) for line in (tmp_path / "b" / "records.jsonl").read_text().splitlines()]
    assert [x["lr"] for x in lines if x["kind"] == "step"][:at] == [r.lr for r in whole.records[:at]]
    again = train_task(task, Recipe.from_file(tmp_path / "b" / "recipe.toml"))
    assert [r.lr for r in again.records[:at]] == [r.lr for r in whole.records[:at]]
    assert [r.loss for r in again.records] == [r.loss for r in whole.records[:at]] + [r.loss for r in on.records]


def test_a_plateau_stops_listening_where_another_run_goes_on(tmp_path: Path) -> None:
    task = Task(model=model, loss=mse, data=HELD)
    changes = {"schedule.lr": "plateau(factor=0.5, patience=1, min_delta=1000)", "evaluate.every": 2}
    train_task(task, Recipe().override({**LIST, **changes}), folder=tmp_path / "a")
    on = thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=6, then="hold()")
    assert len({r.lr for r in on.records}) == 1
    assert "listens" in refused(thalweg.continue_run, task, tmp_path / "a", tmp_path / "c", steps=6, then="plateau()")
    assert not (tmp_path / "c").exists()


def test_the_evaluation_at_the_end_of_a_run_is_out_of_turn() -> None:
    """Were it heard, a run that goes on from there would not be the longer one."""
    changes = {"schedule.lr": "plateau(factor=0.5, patience=1, min_delta=1000)", "evaluate.every": 4}
    short = train({**changes, "train.steps": 10}, data=HELD)
    whole = train({**changes, "train.steps": 20}, data=HELD)
    assert len(short.evaluations) == 3
    assert [r.lr for r in short.records] == [r.lr for r in whole.records[:10]]


def test_a_run_that_stopped_early_is_at_its_end_and_another_may_go_on(tmp_path: Path) -> None:
    task = Task(model=model, loss=mse, data=HELD)
    recipe = Recipe().override(
        {**LIST, "train.steps": 40, "schedule.lr": "constant(4, value=0.5) >> linear(to=30)", "evaluate.every": 2,
         "evaluate.patience": 3}
    )  # fmt: skip
    stopped = train_task(task, recipe, folder=tmp_path / "a")
    again = train_task(task, recipe, folder=tmp_path / "a", resume=True)
    assert again.reason is StopReason.STOPPED_EARLY and not again.records
    for a, b in zip(stopped.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
    on = thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=5, then="constant(value=0.1)")
    assert len(on.records) == 5


def test_a_run_ends_at_the_first_evaluation_as_good_as_its_target(tmp_path: Path) -> None:
    task = Task(model=model, loss=mse, data=HELD)
    recipe = Recipe().override({**LIST, "train.steps": 12, "evaluate.every": 2, "checkpoint.keep_best": 0})
    whole = [e.metrics["loss"] for e in train_task(task, recipe).evaluations]
    wanted, further = whole[1], min(whole[:5])
    at = whole.index(further)
    assert whole[0] > wanted > further and at < 5
    recipe = recipe.override({"evaluate.target": wanted})
    reached = train_task(task, recipe, folder=tmp_path / "a")
    assert reached.reason is StopReason.REACHED and reached.records[-1].step == 4
    assert [e.metrics["loss"] for e in reached.evaluations] == whole[:2]
    assert json.loads((tmp_path / "a" / "outcome.json").read_text())["reason"] == "target reached"
    again = train_task(task, recipe, folder=tmp_path / "a", resume=True)
    assert again.reason is StopReason.REACHED and not again.records
    later = recipe.override({"evaluate.target": further})
    gone = train_task(task, later, folder=tmp_path / "a", resume=True, accept=["target"])
    assert gone.reason is StopReason.REACHED and gone.records[-1].step == 2 * at + 2
    assert [e.metrics["loss"] for e in gone.evaluations] == whole[2 : at + 1], "to the bit as if it had not ended"
    on = thalweg.continue_run(task, tmp_path / "a", tmp_path / "b", steps=4, then="hold()")
    assert len(on.records) == 4 and on.plan.recipe.evaluate.target is None
    assert ("evaluate.target", None) in [(d.path, d.value) for d in on.plan.decisions]


def test_a_target_at_the_end_and_one_that_no_number_reaches() -> None:
    changes = {"train.steps": 4, "evaluate.every": 4, "evaluate.target": 1e9}
    assert train(changes, data=HELD).reason is StopReason.FINISHED
    assert train({**changes, "evaluate.every": 2, "evaluate.goal": "max"}, data=HELD).reason is StopReason.FINISHED
    assert "not a finite number" in refused(train, {"evaluate.target": float("inf")}, data=HELD)


def test_an_infinite_evaluation_is_none_to_be_compared_and_the_run_goes_on(tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Any) -> Any:
        return mse(net, batch) if net.training else Loss(torch.tensor(float("inf")), 1)

    task = Task(model=model, loss=loss, data=HELD)
    recipe = Recipe().override(
        {**LIST, "train.steps": 4, "evaluate.every": 2, "evaluate.goal": "max", "evaluate.target": 1.0}
    )
    assert train_task(task, recipe, folder=tmp_path).reason is StopReason.FINISHED
    assert train_task(task, recipe, folder=tmp_path, resume=True).reason is StopReason.FINISHED


# --- what would never act is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"schedule.lr": "plateau()"}, {"evaluate.patience": 2}, {"evaluate.target": 0.1},
     {"schedule.lr": "hold(3) >> 0.5 * repeat(plateau(), times=2)"}],
    ids=repr,
)  # fmt: skip
def test_what_follows_evaluations_needs_some(changes: dict[str, Any]) -> None:
    assert "held-out" in refused(train, changes)
    assert "evaluate.every" in refused(train, {**changes, "evaluate.every": 0}, data=HELD)


def test_what_a_step_alone_cannot_do_is_refused() -> None:
    for changes, words in (
        ({"schedule.lr": "plateau()"}, {"steps": 9}),
        ({"schedule.lr": "loss_plateau()"}, {}),
        ({"schedule.lr": "hold()", "regularize.average_form": "swa"}, {}),
        ({"regularize.average_form": "swa", "regularize.average_every": "banana"}, {"steps": 9}),
        ({"regularize.average_form": "swa", "regularize.average_every": "1 epochs"}, {"steps": 9}),
    ):
        recipe = {key: value for key, value in {**LIST, **changes}.items() if key != "train.steps"}
        refused(thalweg.TrainStep, model(), mse, recipe, **words)


BAD: dict[str, dict[str, Any]] = {
    "an average that never begins": {"regularize.average_form": "swa", "regularize.average_start": "99"},
    "an average that listens": {"regularize.average": 0.9, "schedule.average": "loss_plateau()"},
    "a group's schedule that is a text": {"optimizer.groups": {"0.*": {"schedule": "linear()"}}},
    "a group's schedule that is a list": {"optimizer.groups": {"0.*": {"schedule": ["linear()"]}}},
    "a group's number that is a text": {
        "optimizer.groups": {"0.*": {"weight_decay": "x", "schedule": {"lr": "hold()"}}}
    },
    "a group's rate that is a list": {"optimizer.groups": {"0.*": {"lr": [1], "schedule": {"lr": "hold()"}}}},
    "a group's options that are a text": {
        "optimizer.groups": {"0.*": {"options": "x", "schedule": {"momentum": "hold()"}}}
    },
    "a group's rule that is a number": {"optimizer.groups": {"0.*": {"rule": 3, "schedule": {"lr": "hold()"}}}},
    "a group's option out of its range": {"optimizer.groups": {"0.*": {"schedule": {"momentum": "linear(to=2)"}}}},
    "a penalty in words": {"regularize.penalties": {"l1": "a"}},
    "a penalty in a list": {"regularize.penalties": {"l1": [1.0]}},
    "sequences of features": {"schedule.sequence": "constant(value=0.5)"},
}


@pytest.mark.parametrize("why", BAD)
def test_bad_input_is_told(why: str) -> None:
    refused(train, BAD[why])


def test_what_a_model_has_no_use_for_is_told() -> None:
    asked = {"regularize.ghost": 4, "regularize.precise": 2, "regularize.by_sample": True}
    told = {d.path: d.reason for d in train(asked).plan.decisions if d.reason.startswith("not used")}
    assert set(asked) <= set(told)
    assert "regularize.batchnorm" in {d.path for d in train({"regularize.batchnorm": "frozen"}).plan.decisions}
    assert "dropout_at" in refused(train, {"regularize.dropout_at": []})


def test_smoothing_above_1_is_refused_at_any_update() -> None:
    def smooth(net: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.1) -> Loss:
        labels = (batch["y"][:, 0] > 0).long()
        return thalweg.regularize.cross_entropy(net(batch["x"]).expand(-1, 2), labels, label_smoothing=label_smoothing)

    told = refused(
        thalweg.train, model, smooth, data(), {**LIST, "schedule.loss": {"label_smoothing": "linear(to=20)"}}
    )
    assert "up to 1" in told


def test_short_sequences_are_tried_before_step_1() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places = nn.Embedding(7, 4), nn.Parameter(torch.zeros(16, 4))
            self.head = nn.Linear(4, 7)

        def forward(self, tokens: Tensor) -> Tensor:
            if tokens.shape[1] < 16:
                raise ValueError("16 places")
            return self.head(self.table(tokens) + self.places)

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Loss:
        return thalweg.regularize.cross_entropy(net(batch["tokens"][:, :16]), batch["tokens"][:, :16])

    recipe = {"train.steps": 4, "train.batch": 8, "precision": "fp32"}
    late = {"schedule.sequence": "constant(2, value=1) >> constant(value=0.5)"}
    assert "sequences of 8" in refused(
        thalweg.train, Fixed, loss, {"tokens": torch.randint(0, 7, (32, 17))}, recipe | late
    )


# --- models as they come ----------------------------------------------------------------------------------------------


def test_an_error_of_a_users_own_is_the_one_that_is_told(tmp_path: Path) -> None:
    """In a model without batch normalization too; and the last whole step is saved."""
    calls = 0

    def failing(net: nn.Module, batch: dict[str, Tensor]) -> Loss:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyError("the user's own")
        return mse(net, batch)

    with pytest.raises(KeyError, match="the user's own"):
        thalweg.train(model, failing, data(), LIST, folder=tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_compiled_sequential_is_a_model_like_any_other() -> None:
    compiled = thalweg.train(torch.compile(model(), backend="eager"), mse, data(), LIST)
    plain = train({})
    assert [r.loss for r in compiled.records] == [r.loss for r in plain.records]
    assert {row.name for row in compiled.plan.parameters} == {row.name for row in plain.plan.parameters}


def test_a_model_that_is_trained_twice_says_what_it_has() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    asked = {**LIST, "regularize.dropout": 0.1, "regularize.dropout_at": ["head"]}
    thalweg.train(net, mse, data(), asked)
    assert "fresh model" in refused(thalweg.train, net, mse, data(), asked)


def test_rates_of_a_step_do_not_stay_in_a_model_for_the_next() -> None:
    net = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    batch = {k: v[:BATCH] for k, v in data().items()}
    first = thalweg.TrainStep(net, mse, {**LIST, "schedule.dropout": "constant(value=0)"}, steps=3)
    first(batch)
    second = thalweg.TrainStep(net, mse, LIST, steps=3)
    second(batch)
    assert all(layer.factor is None for layer in net.modules() if hasattr(layer, "factor"))


def test_a_window_of_half_precision_weights_is_averaged_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def half() -> nn.Module:
        return model().to(torch.bfloat16)

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Loss:
        return mse(net, {k: v.bfloat16() for k, v in batch.items()})

    recipe = {
        **LIST,
        "precision": "bf16-pure",
        "regularize.average_form": "window",
        "regularize.average_start": "2",
        "regularize.average_every": "3",
    }
    thalweg.train(half, loss, data(), recipe, folder=tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert load_file(newest / "average.safetensors")["0.weight"].dtype == torch.float32


def test_precise_statistics_do_not_hang_on_the_split() -> None:
    def net() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()

    recipe = {**LIST, "regularize.precise": 2, "regularize.ghost": 4}
    whole, split = (thalweg.train(net, mse, data(), {**recipe, "train.micro_batch": size}) for size in (8, 4))
    assert torch.allclose(whole.model[1].running_var, split.model[1].running_var, rtol=1e-9)
    order, x = Order(NUM, BATCH, seed=0, keep_last=True), data()["x"]
    seen = torch.cat([x[torch.from_numpy(order.window(s)[1])] for s in range(2)])
    assert torch.allclose(whole.model[1].running_mean, whole.model[0](seen).mean(0), rtol=1e-9)


def test_a_refused_checkpoint_changes_nothing() -> None:
    from dataclasses import replace

    batch = {k: v[:BATCH] for k, v in data().items()}
    step = thalweg.TrainStep(model(), mse, {**LIST, "regularize.average": 0.9}, steps=9)
    for _ in range(3):
        step(batch)
    snapshot = step.snapshot()
    other = thalweg.TrainStep(model(), mse, {**LIST, "regularize.average": 0.9}, steps=9)
    other(batch)
    before = [p.detach().clone() for p in other.model.parameters()]
    broken = replace(snapshot, groups={name: t for name, t in snapshot.groups.items() if name != "average"})
    assert "average" in refused(other.load, broken, batch)
    assert int(other.snapshot().facts["step"]) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters()))
