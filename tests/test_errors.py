"""Bad input: a three-part error before any work is lost, exit code 2 and no traceback on the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import thalweg
from tests.conftest import run_cli, start_cli, three_parts
from tests.models import mean_loss, mlp, points
from thalweg.core import DataError, DeviceError, Loss, LossError, ModelError, RecipeError, Split, Task, ThalwegError

SHORT = {"train.steps": 2, "train.batch": 8, "precision": "fp32"}


def refuse(
    kind: type[ThalwegError], *words: str, model: Any = mlp, loss: Any = mean_loss, data: Any = None, **changes: Any
) -> None:
    """Training must raise ``kind``, in three parts, saying all ``words``."""
    with pytest.raises(kind) as caught:
        thalweg.train(model, loss, points() if data is None else data, {**SHORT, **changes})
    told = " ".join(three_parts(caught.value))
    for word in words:
        assert word in told, told


def test_unknown_keys_rules_and_arguments() -> None:
    refuse(RecipeError, "optimiser is not", "Did you mean optimizer", **{"optimiser.lr": 1})
    refuse(RecipeError, "adamv", "adamw", **{"optimizer.rule": "adamv"})
    refuse(RecipeError, "momentum", "b1", **{"optimizer.options.momentum": 0.9})
    refuse(RecipeError, "model.drop", "Did you mean dropout", **{"model.drop": 0.5})
    refuse(RecipeError, "loss.smooth", "mean_loss()", **{"loss.smooth": 0.5})
    refuse(RecipeError, "cosin", "Did you mean cosine", **{"schedule.lr": "cosin()"})
    refuse(RecipeError, "longer than the run", "100", **{"schedule.lr": "warmup(100)"})
    refuse(RecipeError, "heads.*", **{"optimizer.no_decay": ["heads.*"]})


def test_batch_that_the_micro_batch_does_not_divide() -> None:
    refuse(RecipeError, "96/36 = 2.67", "32, 48, 96", **{"train.batch": 96, "train.micro_batch": 36})


def test_losses_that_are_none() -> None:
    per_sample = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    refuse(LossError, "not a scalar", "(8,)", loss=per_sample)
    refuse(LossError, "no tensor", "float", loss=lambda model, batch: 1.0)
    refuse(LossError, "not finite at step 0", "nan", loss=lambda m, b: mean_loss(m, b) * float("nan"))
    refuse(
        LossError,
        "not finite at step 0",
        "inf",
        data={**points(), "x": torch.full((64, 6), float("inf"))},
        loss=_square,
    )
    refuse(LossError, "no gradient", "detach", loss=lambda model, batch: mean_loss(model, batch).detach())
    refuse(LossError, "negative", loss=lambda model, batch: Loss(mean_loss(model, batch), -1))


def _square(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"]).abs().mean()


def test_parameters_without_a_gradient_are_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    refuse(ModelError, "2 of 4", "idle.weight, idle.bias", "requires_grad=False", model=Idle)
    model = Idle()
    model.idle.requires_grad_(False)
    thalweg.train(model, mean_loss, points(), SHORT)


def test_complex_parameters_are_refused_by_name() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(6, 3, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.complex64) @ self.turn).abs()

    with pytest.raises(ModelError) as err:
        thalweg.train(Turned(), mean_loss, points(), {"train.steps": 1})
    three_parts(err.value)
    assert "'turn' of shape (6, 3) is torch.complex64." in err.value.numbers


def test_data_that_is_none() -> None:
    empty = {"x": torch.zeros(0, 6), "y": torch.zeros(0, dtype=torch.int64)}
    refuse(DataError, "no sample", data=empty)
    refuse(DataError, "no sample", data=TensorDataset(torch.zeros(0, 6)))
    refuse(DataError, "no sample", data=[])
    refuse(DataError, "read once", data=(x for x in range(3)))
    refuse(DataError, "int", data=7)
    refuse(DataError, "differ in length", "x: 3", "y: 2", data={"x": torch.zeros(3, 6), "y": torch.zeros(2)})
    refuse(DataError, "drop", "5 samples", data=points(5), **{"train.last": "drop"})


@pytest.mark.parametrize("where", [0, 63], ids=["in the first batch", "in the last"])
@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_counted_before_step_one(where: int, label: int) -> None:
    data = points()
    data["y"][where] = label
    refuse(
        DataError, "out of range", "1 of", f"[{label}, {label}]", "3 classes, 0 to 2", data=data, **{"train.batch": 64}
    )
    data["y"][where] = -100  # ignored by torch's convention
    thalweg.train(mlp, mean_loss, data, SHORT)


def test_a_lonely_sample_for_batch_normalization_is_found_before_step_one() -> None:
    model = lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    refuse(DataError, "1 sample", "9 samples", model=model, data=points(9))
    thalweg.train(model, mean_loss, points(9), {**SHORT, "train.last": "drop"})


def test_augment_that_would_not_be_called_is_refused() -> None:
    refuse(
        DataError, "augment", "__getitem__", data=Split(train=TensorDataset(torch.ones(3, 6)), augment=lambda b, d: b)
    )


def test_settings_that_are_not_used_are_said() -> None:
    result = thalweg.train(
        mlp, mean_loss, points(), {**SHORT, "data.workers": 2, "evaluate.every": 3, "train.epochs": 4}
    )
    said = {d.path: d.reason for d in result.plan.decisions}
    assert all(said[path].startswith("not used") for path in ("data.workers", "evaluate.every", "train.epochs"))


def test_devices_and_precisions_that_are_not_here() -> None:
    refuse(DeviceError, "'cuda:99'", device="cuda:99")
    refuse(DeviceError, "'toaster'", device="toaster")
    refuse(RecipeError, "fp7", precision="fp7")


def test_a_stream_needs_steps() -> None:
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield {"x": torch.zeros(6), "y": torch.tensor(0)}

    with pytest.raises(RecipeError, match="length of the run"):
        thalweg.train(mlp, mean_loss, Endless(), {"train.batch": 4})


def test_the_evaluation_metric_that_chooses_must_exist() -> None:
    refuse(RecipeError, "acuracy", "loss", data=Split(train=points(), test=points(8)), **{"evaluate.best": "acuracy"})


def test_nothing_is_written_before_the_checks(tmp_path: Path) -> None:
    with pytest.raises(LossError):
        thalweg.train(mlp, lambda m, b: 1.0, points(), SHORT, folder=tmp_path / "run")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {"lock"}
    thalweg.train(mlp, mean_loss, points(), SHORT, folder=tmp_path / "run")


def said(tmp_path: Path, *arguments: str) -> str:
    """What the command line prints on a mistake: exit code 2, three lines, no traceback."""
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) >= 3
    return done.stderr


def test_command_line_mistakes(tmp_path: Path) -> None:
    assert "Did you mean pycode" in said(tmp_path, "train", "pycodes")
    assert "no module 'nowhere'" in said(tmp_path, "train", "nowhere:task")
    assert "Did you mean optimizer" in said(tmp_path, "train", "digits", "--set", "optimiser.lr=1")
    assert "PATH=VALUE" in said(tmp_path, "train", "digits", "--set", "optimizer.lr")
    assert "no recipe file" in said(tmp_path, "train", "digits", "--recipe", "none.toml")
    assert "no run in" in said(tmp_path, "train", "digits", "--resume")
    (tmp_path / "bad.toml").write_text("train = [")
    assert "is not TOML" in said(tmp_path, "train", "digits", "--recipe", "bad.toml")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in said(tmp_path, "train", "digits", "--runs", "file/below")
    (tmp_path / "mine.py").write_text("import thalweg\ntask = 3\n")
    assert "names no Task" in said(tmp_path, "train", "mine:task")


def test_two_processes_in_one_run_folder(tmp_path: Path) -> None:
    first = start_cli("train", "digits", "--name", "one", "--set", "train.epochs=500", "--quiet", cwd=tmp_path)
    try:
        for _ in range(600):
            if (tmp_path / "runs" / "one" / "recipe.toml").exists():
                break
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
        told = said(tmp_path, "train", "digits", "--name", "one", "--set", "train.epochs=500")
        assert str(first.pid) in told and "--name" in told
    finally:
        first.kill()
        first.communicate()


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.recipes import digits

    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(thalweg.ThalwegError, match="digits") as caught:
        digits.data()
    assert "pip install" in three_parts(caught.value)[2]


def test_the_users_own_errors_are_passed_on() -> None:
    def loss(model: Any, batch: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        thalweg.train(mlp, loss, points(), SHORT)
    assert Task(model=mlp, loss=loss, data=points()).name == "task"
