"""The measurement of what techniques are worth: its arms, its pairs, its resuming, and the page that tells the results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import worth
from benchmarks.batchnorm import interval
from benchmarks.worth_arms import ARMS, CONSTANT, NAMED, OFF, RESIDUAL, TASKS, Arm, loss, net, recipe_of
from benchmarks.worth_page import PAGE, verdict, with_tables
from thalweg.core import Split, Task
from thalweg.recipes import recipe_for
from thalweg.regularize import cross_entropy

TREE = json.loads(worth.FILE.read_text())
ROWS = {(row["arm"], row["task"]): row for row in TREE["rows"]}


def test_the_page_tells_the_results() -> None:
    """``python -m benchmarks.worth --page`` makes its tables."""
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text, TREE)
    for row in TREE["rows"]:
        assert row["arm"] in (CONSTANT, RESIDUAL) or f"\n| {row['arm']} | " in text


def test_every_arm_was_measured_on_each_of_its_tasks_with_five_seeds() -> None:
    assert ROWS.keys() == NAMED.keys()
    for (_, task), row in ROWS.items():
        assert row["settings"]["recipe"] == json.loads(json.dumps(recipe_of(NAMED[row["arm"], task], task)))
        assert row["settings"]["seeds"] == len(row["values"]["accuracy"]) == len(row["values"]["loss"]) == 5


def test_kept_gains_are_those_of_the_kept_values() -> None:
    for (_, task), row in ROWS.items():
        if row["against"]:
            base = ROWS[row["against"], task]["values"]
            higher = [a - b for a, b in zip(row["values"]["accuracy"], base["accuracy"], strict=True)]
            lower = [b - a for a, b in zip(row["values"]["loss"], base["loss"], strict=True)]
            assert row["gain"] == {"accuracy": interval(higher), "loss": interval(lower)}
            made = worth.row_of(
                task, NAMED[row["arm"], task], row["settings"], row["values"], ROWS[row["against"], task]
            )
            assert made["gain"] == row["gain"]


def test_results_name_no_path_of_a_machine() -> None:
    assert "/root" not in json.dumps(TREE) and "/home" not in json.dumps(TREE)


@pytest.mark.parametrize("task", TASKS)
def test_arms_change_their_base_and_the_base_has_everything_off(task: str) -> None:
    own = recipe_for(TASKS[task]())
    off = own.override(OFF[task])
    assert off.train.clip == off.optimizer.weight_decay == off.regularize.average == 0
    assert off.model["dropout"] == 0.0 if task == "pycode" else "dropout" not in off.model
    for arm in ARMS:
        if task in arm.tasks and arm.against:
            changed, base = (own.override(recipe_of(one, task)) for one in (arm, NAMED[arm.against, task]))
            paths = {path for path, _, _ in changed.diff(base)}
            assert paths and len({path.split(".")[0] for path in paths}) <= 2, arm.name


def test_the_net_is_without_dropout_unless_it_is_asked_for() -> None:
    assert {m.p for m in net().modules() if isinstance(m, nn.Dropout)} == {0.0}
    images = torch.rand(2, 1, 14, 14)
    assert net(width=4)(images).shape == net(width=4, residual=True)(images).shape == (2, 10)


class Halves(nn.Module):
    """Scores that hang on how often it was called: two passes differ, as with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_the_loss_adds_what_an_arm_asks_for_while_training_alone() -> None:
    batch = {"x": torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), "y": torch.tensor([0, 1])}
    plain = cross_entropy(batch["x"], batch["y"]).total
    asked: list[dict[str, float]] = [{"label_smoothing": 0.3}, {"z_loss": 0.1}, {"alpha": 2.0}]
    for options in asked:
        model = Halves()
        with_it = loss(model, batch, inputs="x", targets="y", **options).total
        assert with_it > plain + 0.01 and model.calls == 1 + ("alpha" in options)
        model = Halves().eval()
        assert loss(model, batch, inputs="x", targets="y", **options).total == plain and model.calls == 1
    assert loss(Halves(), batch, inputs="x", targets="y").total == plain


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.1, 0.2, "gain"), (-0.2, -0.1, "harm"), (0.0, 0.3, "no gain here")]
)
def test_the_verdict_is_that_of_the_tasks_own_metric(low: float, high: float, word: str) -> None:
    other = {"low": -high, "high": -low}
    mine = {"low": low, "high": high}
    assert verdict({"task": "digits", "gain": {"accuracy": mine, "loss": other}}) == word
    assert verdict({"task": "pycode", "gain": {"accuracy": other, "loss": mine}}) == word


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One task of 12 points, a base of 2 steps and two arms; results go to a folder of their own."""

    def mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return cross_entropy(model(batch["x"]), batch["y"])

    def metrics(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        right = model(batch["x"]).argmax(-1) == batch["y"]
        return {"accuracy": (right.sum(), right.numel())}

    data = {"x": torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), "y": torch.arange(12) % 3}
    task = Task(
        name="digits",
        model=lambda: nn.Linear(4, 3),
        loss=mean,
        metrics=metrics,
        data=lambda: Split(train=data, test=data),
    )
    arms = (
        Arm("base", "", {}),
        Arm("faster", "base", {"optimizer.lr": 0.1}),
        Arm("again", "base", {"optimizer.lr": 1e-3}),
    )
    off = {"train.steps": 2, "device": "cpu", "precision": "fp32", "evaluate.every": 0, "optimizer.lr": 1e-3}
    monkeypatch.setattr(worth, "ARMS", arms)
    monkeypatch.setattr(worth, "TASKS", {"digits": lambda: task})
    monkeypatch.setattr(worth, "FILE", tmp_path / "worth.json")
    monkeypatch.setattr("benchmarks.keep.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.worth_arms.NAMED", named := {(arm.name, "digits"): arm for arm in arms})
    monkeypatch.setattr(worth, "NAMED", named)
    monkeypatch.setitem(OFF, "digits", off)
    return tmp_path / "worth.json"


def test_pairs_share_their_seed(small: Path) -> None:
    """An arm that changes nothing has the values of its base to the bit; seeds differ."""
    worth.main(["--only", "digits", "--seeds", "3"])
    base, faster, again = json.loads(small.read_text())["rows"]
    assert again["values"] == base["values"] != faster["values"]
    assert len(set(base["values"]["loss"])) == 3
    assert again["gain"]["loss"] == {"mean": 0, "low": 0, "high": 0} and "gain" not in base


def test_what_is_kept_is_not_measured_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(task: Task, arm: Arm, seeds: int) -> dict[str, list[float]]:
        asked.append(arm.name)
        return {"accuracy": [float(len(asked)), 2.0], "loss": [0.5, 0.25]}

    monkeypatch.setattr(worth, "measure", measure)
    arguments = ["--only", "digits", "--seeds", "2"]
    worth.main(arguments)
    assert asked == ["base", "faster", "again"]
    before = json.loads(small.read_text())["rows"]
    worth.main(arguments)
    assert len(asked) == 3
    monkeypatch.setattr(worth, "ARMS", (*worth.ARMS[:2], replace(worth.ARMS[2], changes={"optimizer.lr": 0.3})))
    monkeypatch.setitem(worth.NAMED, ("again", "digits"), worth.ARMS[2])
    worth.main(arguments)
    assert asked[3:] == ["again"] and json.loads(small.read_text())["rows"][:2] == before[:2]
    worth.main([*arguments, "--again"])
    assert asked[4:] == ["base", "faster", "again"]
    tree = json.loads(small.read_text())
    tree["machine"]["name"] = "another"
    small.write_text(json.dumps(tree))
    assert worth.kept(small) == []


def test_an_arm_that_fails_is_told_and_the_others_are_kept(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(task: Task, arm: Arm, seeds: int) -> dict[str, list[float]]:
        if arm.name == "faster":
            raise RuntimeError("it flew apart")
        return {"accuracy": [1.0, 2.0], "loss": [0.5, 0.25]}

    monkeypatch.setattr(worth, "measure", measure)
    with pytest.raises(SystemExit, match="Not measured: digits, faster"):
        worth.main(["--only", "digits", "--seeds", "2"])
    assert "it flew apart" in capsys.readouterr().err
    assert [row["arm"] for row in json.loads(small.read_text())["rows"]] == ["base", "again"]
