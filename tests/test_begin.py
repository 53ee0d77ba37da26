"""A new run that begins with weights from a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thalweg
from tests.conftest import run_cli, three_parts
from tests.models import batchnorm_net, mean_loss, mlp, points, ragged_text, text_loss
from thalweg.checkpoint.convert import convert
from thalweg.core import ModelError, Plan, Recipe, RecipeError


class Tied(nn.Module):
    """Head and embedding are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


BASE = {"precision": "fp32", "train.steps": 2, "train.batch": 16, "optimizer.lr": 0.0, "checkpoint.every": 1}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Tensor]:
    """Weights of another model, in w.pt."""
    torch.manual_seed(99)
    state = state_of(mlp())
    torch.save(state, tmp_path / "w.pt")
    return state


def begun(path: Path, **changes: Any) -> Any:
    return thalweg.train(mlp, mean_loss, points(), {**BASE, "weights": str(path), **changes})


def decided(plan: Plan) -> str:
    return next(d.reason for d in plan.decisions if d.path == "weights")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.ckpt"])
def test_a_run_begins_with_the_weights_of_a_file(name: str, source: dict[str, Tensor], tmp_path: Path) -> None:
    if name != "w.pt":
        convert(tmp_path / "w.pt", tmp_path / name)
    result = begun(tmp_path / name)
    assert all(torch.equal(tensor, source[key]) for key, tensor in result.model.state_dict().items())
    sha = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert f"sha256 {sha}; 4 tensors taken" in decided(result.plan)


def test_it_is_not_what_the_model_began_with_otherwise(source: dict[str, Tensor]) -> None:
    result = thalweg.train(mlp, mean_loss, points(), BASE)
    assert not torch.equal(result.model.state_dict()["0.weight"], source["0.weight"])
    assert not [d for d in result.plan.decisions if d.path == "weights"]


def test_a_run_begins_with_another_runs_average(tmp_path: Path) -> None:
    """Batch statistics come along, and the plan says which step and which weights."""
    recipe = {**BASE, "optimizer.lr": 0.1, "regularize.average": 0.9}
    first = thalweg.train(batchnorm_net, mean_loss, points(), recipe, folder=tmp_path / "first")
    second = thalweg.train(
        batchnorm_net, mean_loss, points(), {**BASE, "train.steps": 1, "weights": str(tmp_path / "first")}
    )
    mine, theirs = second.model.state_dict(), first.model.state_dict()
    names = [name for name, _ in first.model.named_parameters()]
    assert all(torch.equal(mine[name], theirs[name]) for name in names)
    assert int(mine["1.num_batches_tracked"]) == int(theirs["1.num_batches_tracked"]) + 1
    assert "Step 2: the weight average" in decided(second.plan)


def test_a_tied_model_takes_a_file_with_one_of_the_names(tmp_path: Path) -> None:
    run = thalweg.train(Tied, text_loss, ragged_text(), BASE, folder=tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "w.pt")
    Tied().load_state_dict(torch.load(tmp_path / "w.pt"))  # strict: both names are in the file
    for number, name in enumerate(("head.weight", "embed.weight")):
        convert(tmp_path / "run", tmp_path / f"{number}.pt", rename=[f"{name}="])
        assert len(torch.load(tmp_path / f"{number}.pt")) == len(run.model.state_dict()) - 1
        again = thalweg.train(Tied, text_loss, ragged_text(), {**BASE, "weights": str(tmp_path / f"{number}.pt")})
        assert "; 2 tensors taken" in decided(again.plan)
        for key, tensor in run.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[key]), key


def test_names_that_do_not_fit_are_listed_with_the_renaming_that_would(
    source: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({f"net.{name}": tensor for name, tensor in source.items()}, tmp_path / "net.pt")
    with pytest.raises(ModelError) as err:
        begun(tmp_path / "net.pt")
    asked, numbers, remedy = three_parts(err.value)
    assert asked == f"The weights in {tmp_path / 'net.pt'} are not those of this model."
    assert numbers == (
        "Missing: 0.weight, 0.bias, 3.weight, 3.bias. Not known: net.0.weight, net.0.bias, net.3.weight, net.3.bias."
    )
    assert remedy == "The names fit with --rename net=, in a recipe weights_rename = ['net=']."
    result = begun(tmp_path / "net.pt", weights_rename=["net="])
    assert torch.equal(result.model.state_dict()["3.bias"], source["3.bias"])


def test_what_does_not_fit_leaves_the_model_as_it_was(source: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {**source, "3.bias": torch.zeros(4), **{f"more.{i}": torch.zeros(1) for i in range(6)}}
    del wrong["0.bias"]
    torch.save(wrong, tmp_path / "wrong.pt")
    model = mlp()
    before = state_of(model)
    with pytest.raises(ModelError) as err:
        thalweg.train(model, mean_loss, points(), {**BASE, "weights": str(tmp_path / "wrong.pt")})
    assert three_parts(err.value)[1] == (
        "Missing: 0.bias. Not known: more.0, more.1, more.2, more.3 and 2 more. "
        "Of another shape: 3.bias (4,) there, (3,) here."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_dtype_is_cast_and_told(source: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: t.to(torch.bfloat16) if name.endswith("weight") else t for name, t in source.items()}
    torch.save(half, tmp_path / "half.pt")
    result = begun(tmp_path / "half.pt")
    assert torch.equal(result.model.state_dict()["0.weight"], half["0.weight"].float())
    assert "; 2 cast from bfloat16 to float32" in decided(result.plan)


def test_a_tied_tensor_with_two_values_is_refused(tmp_path: Path) -> None:
    state = state_of(Tied())
    torch.save({**state, "head.weight": state["head.weight"] + 1}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="are one tensor in the model, and differ in the file"):
        thalweg.train(Tied, text_loss, ragged_text(), {**BASE, "weights": str(tmp_path / "w.pt")})


def test_a_resumed_run_does_not_read_the_file_again(source: dict[str, Tensor], tmp_path: Path) -> None:
    recipe = {**BASE, "optimizer.lr": 0.01, "weights": str(tmp_path / "w.pt")}
    thalweg.train(mlp, mean_loss, points(), recipe, folder=tmp_path / "run")
    (tmp_path / "w.pt").unlink()
    again = thalweg.train(mlp, mean_loss, points(), recipe, folder=tmp_path / "run", resume=1)
    assert again.records[0].step == 2
    assert "4 tensors taken" in decided(Plan.from_json((tmp_path / "run" / "plan.json").read_text()))


def test_a_run_that_begins_again_needs_the_file_that_it_began_with(source: dict[str, Tensor], tmp_path: Path) -> None:
    """Stopped before its first checkpoint, a run has nothing else to begin with."""
    recipe = {**BASE, "weights": str(tmp_path / "w.pt")}
    thalweg.train(mlp, mean_loss, points(), recipe, folder=tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    (tmp_path / "run" / "saved").unlink()  # as if none had ever been saved
    again = thalweg.train(mlp, mean_loss, points(), recipe, folder=tmp_path / "run", resume=True)
    assert torch.equal(again.model.state_dict()["0.weight"], source["0.weight"]) and again.records[0].step == 1
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    (tmp_path / "run" / "saved").unlink()  # as if none had ever been saved
    torch.save({name: tensor + 1 for name, tensor in source.items()}, tmp_path / "w.pt")
    with pytest.raises(RecipeError, match="is not what this run began with"):
        thalweg.train(mlp, mean_loss, points(), recipe, folder=tmp_path / "run", resume=True)


def test_a_step_of_ones_own_loop_begins_with_them_too(source: dict[str, Tensor], tmp_path: Path) -> None:
    model = mlp()
    step = thalweg.TrainStep(model, mean_loss, {**BASE, "weights": str(tmp_path / "w.pt")}, steps=2)
    assert torch.equal(step.model.state_dict()["0.weight"], source["0.weight"])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"weights_rename": ["a=b"]}, "weights_rename is given without weights."),
        ({"weights": "w.pt", "weights_rename": ["a"]}, "weights_rename='a' renames nothing."),
        ({"weights": ""}, "weights='' names no file."),
    ],
)
def test_a_recipe_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as err:
        Recipe().override(changes)
    assert three_parts(err.value)[0] == said


TASK = """
import torch
from torch import nn
from thalweg import Task

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
task = Task(model=lambda: nn.Sequential(nn.Linear(6, 2)), loss=loss, data={"x": x, "y": (x.sum(1) > 0).long()})
"""


def test_the_command_line_begins_with_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    state = nn.Sequential(nn.Linear(6, 2)).state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    options = ["--set", "train.steps=1", "--set", "optimizer.lr=0", "--set", "precision=fp32", "--quiet"]
    words = ["train", "mine:task", "--weights", "w.pt", *options]
    wrong = run_cli(*words, cwd=tmp_path)
    assert wrong.returncode == 2 and "The names fit with --rename module=," in wrong.stderr
    assert not list((tmp_path / "runs").glob("*/recipe.toml"))
    right = run_cli(*words, "--rename", "module=", cwd=tmp_path)
    assert right.returncode == 0, right.stderr
    [plan_file] = (tmp_path / "runs").glob("*/plan.json")
    plan = json.loads(plan_file.read_text())
    assert plan["recipe"]["weights"] == "w.pt" and plan["recipe"]["weights_rename"] == ["module="]
