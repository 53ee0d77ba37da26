"""Seams of a run: how it ends by an error, what is owed, what it goes on with. Each was once wrong."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import thalweg
from tests.conftest import three_parts
from thalweg.checkpoint import Store, write_file
from thalweg.core import CheckpointError, Recipe, RunFolderError, Split, StopReason, read_lines
from thalweg.data import Order
from thalweg.engine import Step
from thalweg.engine import loop as loop_module
from thalweg.engine.feedback import Feedback
from thalweg.engine.signals import asked_to_end
from thalweg.regularize import Dropout
from thalweg.schedules.language import Listening

BASE = {
    "precision": "fp32",
    "train.steps": 16,
    "train.batch": 8,
    "train.micro_batch": 8,
    "optimizer.lr": 0.01,
    "checkpoint.every": 4,
    "evaluate.every": 4,
}


class Deaf:
    """A sink that wants to know nothing."""

    def start(self, plan: Any, step: int) -> None: ...
    def steps(self, records: Any) -> None: ...
    def evaluation(self, evaluation: Any) -> None: ...
    def event(self, event: Any) -> None: ...
    def stop(self, reason: Any) -> None: ...


class Ears(Deaf):
    """A sink that remembers events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def event(self, event: Any) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[str]:
        return [event.text for event in self.events if event.name == name]


def points(num: int = 64) -> dict[str, torch.Tensor]:
    x = torch.randn(num, 4, generator=torch.Generator().manual_seed(0))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def squared(model: nn.Module, batch: Any) -> Any:
    return (model(batch["x"]) - batch["y"]).square().mean()


def go(
    folder: Path | None = None, *, model: Any = net, loss: Any = squared, held: bool = True, **words: Any
) -> thalweg.Result:
    """``changes`` of the recipe among the words are those with a dot in them."""
    changes = {path: words.pop(path) for path in list(words) if "." in path or path == "recompute"}
    data = words.pop("data", Split(train=points(), test=points(16) if held else None))
    return thalweg.train(model, loss, data, Recipe().override({**BASE, **changes}), folder=folder, **words)


def raising(error: BaseException, at: int) -> Callable[[nn.Module, Any], Any]:
    """A loss that raises in its call ``at`` (from 1) of those with gradients."""
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled() and model.training
        if calls == at:
            calls += 1
            raise error
        return squared(model, batch)

    return loss


def break_step(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """The step after step ``after`` raises."""
    plain = Step.run

    def run(self: Step, window: Any) -> Any:
        if self.state.step == after:
            raise error
        return plain(self, window)

    monkeypatch.setattr(Step, "run", run)


def evaluated(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "records.jsonl") if line["kind"] == "evaluation"]


def facts(folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    store = Store(folder / "checkpoints", sweep=False)
    return dict(json.loads((folder / "checkpoints" / store.name(store.steps()[-1]) / "state.json").read_text()))


# --- a run that ends by an error -------------------------------------------------------------------------------------


PUT_IN = {"regularize.dropout": 0.3, "regularize.dropout_at": ["first"]}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), Dropout(0.5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.drop(self.norm(self.first(x)))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine")], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("changes", [{}, PUT_IN, {"recompute": "blocks"}], ids=["", "put in", "again"])
def test_a_model_whose_run_broke_off_is_the_users_again(error: BaseException, changes: dict[str, Any]) -> None:
    mine = Dropping()
    own = {name: set(vars(module)) for name, module in mine.named_modules()}
    with pytest.raises(type(error), match="mine"):
        go(model=mine, loss=raising(error, 12), **changes)
    assert mine.norm.momentum == 0.1
    assert all("forward" not in vars(module) for name, module in mine.named_modules() if name in own)
    mine.train()
    outs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        outs.append(mine.drop(torch.ones(64)))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1]), "its layers draw from torch's generator"


def test_a_sink_that_cannot_be_told_neither_hides_an_error_nor_keeps_others_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Store, step: int, snapshot: Any) -> str:
        raise CheckpointError("It is full.", "0 bytes.", "Make room.")

    monkeypatch.setattr(Store, "save", fails)
    stopped = []

    class Mute(Deaf):
        def __init__(self, name: str) -> None:
            self.name = name

        def event(self, event: Any) -> None:
            if event.name == "not saved":
                raise RuntimeError("the sink cannot tell")

        def stop(self, reason: StopReason) -> None:
            stopped.append((self.name, reason))
            raise RuntimeError("the sink cannot stop")

    mine = {"checkpoint.every": 100, "checkpoint.grace": 0.1, "sinks": [Mute("a"), Mute("b")]}
    with pytest.raises(ValueError, match="the user's own"):
        go(tmp_path / "run", loss=raising(ValueError("the user's own"), 9), held=False, **mine)
    assert stopped == [("a", StopReason.FAILED), ("b", StopReason.FAILED)]
    stopped.clear()
    with pytest.raises(RuntimeError, match="cannot stop"):
        go(sinks=[Mute("a"), Mute("b")])
    assert [name for name, _ in stopped] == ["a", "b"]


def test_a_sink_that_fails_while_a_step_is_rescued_does_not_hide_what_broke_it() -> None:
    class Mute(Deaf):
        def steps(self, records: Any) -> None:
            raise RuntimeError("the sink cannot tell")

    with pytest.raises(ValueError, match="the user's own"):
        go(loss=raising(ValueError("the user's own"), 6), sinks=[Mute()], held=False, **{"checkpoint.every": 100})


# --- evaluations that are owed ---------------------------------------------------------------------------------------


class FailsAt(Deaf):
    """A sink that raises once, at the step that it is told."""

    def __init__(self, what: str, at: int) -> None:
        self.what, self.at = what, at

    def steps(self, records: Any) -> None:
        if self.what == "steps" and any(record.step == self.at for record in records):
            raise RuntimeError("the sink is down")

    def evaluation(self, evaluation: Any) -> None:
        if self.what == "evaluation" and evaluation.step == self.at:
            raise RuntimeError("the sink is down")


@pytest.mark.parametrize("what", ["steps", "evaluation"])
def test_a_sink_that_fails_neither_loses_an_evaluation_nor_has_it_count_twice(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_FLUSH_SECONDS", -1.0)  # each step is read at once
    changes = {"checkpoint.every": 100, "checkpoint.keep_best": 0, "evaluate.patience": 3}
    go(tmp_path / "whole", **changes)
    with pytest.raises(RuntimeError, match="down"):
        go(tmp_path / "run", sinks=[FailsAt(what, 8)], **changes)
    assert facts(tmp_path / "run")["owed"] is (what == "steps")
    go(tmp_path / "run", resume=True, **changes)
    assert evaluated(tmp_path / "run") == [4, 8, 12, 16]
    assert [facts(tmp_path / name)["ranking"] for name in ("run", "whole")] == [
        facts(tmp_path / "whole")["ranking"]
    ] * 2
    assert facts(tmp_path / "run")["early"] == facts(tmp_path / "whole")["early"]


# --- patience --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1.0, 1e9], ids=["read at once", "read at the end"])
def test_patience_that_ran_out_ends_the_run_whenever_it_is_read(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_FLUSH_SECONDS", seconds)

    class InOrder(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for k in range(40 * 8):
                yield {"x": torch.ones(4) * (float("nan") if k // 8 in (5, 6, 7) else 1.0), "y": torch.ones(1)}

    changes = {"guard.patience": 3, "train.steps": 40, "checkpoint.every": 100}
    result = go(data=InOrder(), **changes)
    assert [record.step for record in result.records if record.skipped] == [6, 7, 8]
    assert result.reason is StopReason.DIVERGED
    assert result.records[-1].step == (8 if seconds < 0 else 40), "what was applied is not left without a record"


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asked_to_end(10) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked()
            signal.raise_signal(signal.SIGTERM)
            assert asked.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_is_not_pythons_does_not_break_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    install, told = signal.signal, []

    def foreign(number: int, handler: Any) -> Any:
        told.append((number, handler))
        return None if number == signal.SIGUSR1 else install(number, handler)

    monkeypatch.setattr(signal, "signal", foreign)
    with asked_to_end(10):
        pass
    assert (signal.SIGUSR1, None) not in told


# --- what a run goes on with -----------------------------------------------------------------------------------------


def closeness(model: nn.Module, batch: Any) -> Any:
    return {
        "closeness": ((1 / (1 + (model(batch["x"]) - batch["y"]).abs())).sum(), torch.tensor(float(len(batch["x"]))))
    }


def test_what_another_metric_made_best_counts_no_more(tmp_path: Path) -> None:
    ears, folder = Ears(), tmp_path / "run"
    words = {"evaluate.patience": 5, "schedule.lr": "plateau(patience=3)", "metrics": closeness}
    before = go(folder, **words)
    changed = {"train.steps": 24, "evaluate.best": "closeness", "evaluate.goal": "max", "checkpoint.keep_last": 9}
    after = go(folder, resume=True, accept=["steps", "evaluate"], sinks=[ears], **words, **changed)
    assert [e.step for e in after.evaluations] == [20, 24] and after.evaluations[0].best
    assert sorted(at for _, at in facts(folder)["ranking"]) == [20, 24] and before.evaluations[-1].best
    assert ears.named("evaluations") == [
        "Evaluations are compared by closeness (max) from here on; those before, compared by loss (min), count no more."
    ]
    best = after.evaluations[-1 if after.evaluations[-1].best else 0]
    assert f"that of step {best.step}." in ears.named("best weights")[0]
    again = Ears()  # killed before the next checkpoint: the old ranking is still not taken over, and it is told again
    for step in (20, 24):
        shutil.rmtree(folder / "checkpoints" / Store.name(step))
    go(folder, resume=True, sinks=[again], **words, **changed)
    assert again.named("evaluations") == ears.named("evaluations")
    assert again.named("recipe changed") == ears.named("recipe changed") and len(again.named("recipe changed")) == 3


def test_what_listens_to_evaluations_forgets_what_another_metric_made_best() -> None:
    piece = Listening(
        "plateau", "evaluation", {"patience": 2, "factor": 0.5, "least": 0.0, "min_delta": 0.0, "rest": 0}, 0, 100
    )
    feedback = Feedback([("lr", piece)], torch.device("cpu"), torch.float64)
    applied = torch.zeros(1)
    for value in (0.1, 0.2):
        feedback.hear("evaluation", torch.tensor(value, dtype=torch.float64), applied)
    feedback.forget("loss")
    assert feedback.values[0, 1:3].tolist() == [0.1, 1.0]
    feedback.forget("evaluation")
    feedback.hear("evaluation", torch.tensor(0.7), applied)
    assert feedback.values[0, :3].tolist() == [1.0, pytest.approx(0.7), 0.0]


def test_fewer_epochs_than_have_been_run_are_refused(tmp_path: Path) -> None:
    epochs = {"train.steps": None, "train.epochs": 4}
    assert go(tmp_path / "run", **epochs).records[-1].step == 32
    lines = (tmp_path / "run" / "records.jsonl").read_bytes()
    with pytest.raises(RunFolderError) as err:
        go(tmp_path / "run", resume=True, accept=["epochs"], **{**epochs, "train.epochs": 2})
    asked, numbers, _ = three_parts(err.value)
    assert "train.steps=16 lies behind the checkpoint" in asked and "step 32" in numbers
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == lines
    assert "epochs = 4" in (tmp_path / "run" / "recipe.toml").read_text()


def test_checkpoints_that_are_gone_are_missed_and_a_run_that_never_had_one_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(folder)
    shutil.move(folder / "checkpoints", tmp_path / "away")
    lines = (folder / "records.jsonl").read_bytes()
    for resume in (True, "auto"):
        with pytest.raises(CheckpointError) as err:
            go(folder, resume=resume)
        asked, numbers, remedy = three_parts(err.value)
        assert "they are gone" in asked and str(folder / "checkpoints") in numbers and "--name" in remedy
    assert (folder / "records.jsonl").read_bytes() == lines
    assert go(folder, resume=True, **{"checkpoint.store": str(tmp_path / "away")}).reason is StopReason.FINISHED
    with pytest.raises(KeyboardInterrupt):  # as killed before the first checkpoint
        go(
            tmp_path / "young",
            loss=raising(KeyboardInterrupt("mine"), 8),
            **{"checkpoint.every": 100, "evaluate.every": 100},
        )
    assert not list((tmp_path / "young" / "checkpoints").glob("step-*"))
    again = go(tmp_path / "young", resume="auto", **{"checkpoint.every": 100, "evaluate.every": 100})
    assert again.reason is StopReason.FINISHED and again.records[0].step == 1


def test_a_store_that_is_empty_yet_is_filled_from_the_one_before(tmp_path: Path) -> None:
    ears, folder, other = Ears(), tmp_path / "run", {"checkpoint.store": str(tmp_path / "other")}
    go(folder, **{"train.steps": 16})
    shutil.rmtree(folder / "checkpoints" / Store.name(16))
    again = go(folder, resume=True, sinks=[ears], **other)
    assert [record.step for record in again.records] == [13, 14, 15, 16]
    assert Store(tmp_path / "other", sweep=False).steps()[-1] == 16
    (text,) = ears.named("checkpoints")
    assert f"none in {tmp_path / 'other'} yet" in text and str(folder / "checkpoints") in text


@pytest.mark.parametrize("killed_at", ["plan.next.json", "recipe.toml", "plan.json"])
def test_an_accepted_change_holds_whole_or_not_at_all(
    killed_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``killed_at``: the file that is not written any more."""
    folder = tmp_path / "run"
    go(folder)

    def killed(path: Path, data: bytes) -> None:
        if path.name == killed_at:
            raise KeyboardInterrupt
        write_file(path, data)

    monkeypatch.setattr("thalweg.run.folder.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        go(folder, resume=True, accept=["steps", "lr"], **{"train.steps": 20, "optimizer.lr": 0.5})
    monkeypatch.undo()
    ears, there = Ears(), Recipe.from_file(folder / "recipe.toml")
    result = thalweg.train(
        net, squared, Split(train=points(), test=points(16)), there, folder=folder, resume=True, sinks=[ears]
    )
    whole = killed_at == "plan.json"  # with its recipe, the change is there
    assert (result.plan.steps, result.plan.recipe.optimizer.lr) == ((20, 0.5) if whole else (16, 0.01))
    assert (there.train.steps, there.optimizer.lr) == ((20, 0.5) if whole else (16, 0.01))
    assert (
        ears.named("recipe changed")
        == [
            "train.steps: 16 before, 20 from here on (accepted)",
            "optimizer.lr: 0.01 before, 0.5 from here on (accepted)",
        ]
        * whole
    )
    assert not (folder / "plan.next.json").exists()


def test_bad_steps_are_told_as_often_whether_the_run_was_stopped_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Split(train=points())
    for step in range(1, 8):
        data.train["x"][int(Order(64, 8, seed=0, keep_last=True).window(step)[1][0])] = float("nan")
    found = []
    for name, stops in (("whole", []), ("stopped", [4])):
        for at in stops:
            break_step(monkeypatch, ValueError("mine"), at)
            with pytest.raises(ValueError, match="mine"):
                go(tmp_path / name, data=data)
            monkeypatch.undo()
        go(tmp_path / name, data=data, resume="auto")
        lines = read_lines(tmp_path / name / "records.jsonl")
        found.append([(line["step"], line["text"]) for line in lines if line.get("name") == "bad step"])
    assert len(found[0]) == 5 and found[0] == found[1]


@pytest.mark.parametrize("at", [0, 3], ids=["before", "in"])
def test_an_error_in_a_run_has_the_exit_code_of_one(at: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from thalweg.cli import main as cli
    from thalweg.core import DataError

    error = DataError("It is broken.", "Sample 7.", "Mend it.")
    if at:
        break_step(monkeypatch, error, at)

    def run(asked: Any) -> int:
        go(loss=squared if at else raising(error, 1))
        return 0

    monkeypatch.setattr("thalweg.cli.main._doctor", run)
    assert cli.main(["doctor"]) == (1 if at else 2)
    assert capsys.readouterr().err == "error: It is broken.\n  Sample 7.\n  Mend it.\n"
