"""Files that a task reads: where they are looked for, what is kept, what is said where they are missing."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

import pytest
import torch
from torch import nn

import thalweg
from tests.conftest import run_cli
from thalweg.cli.main import main
from thalweg.core import DataError, Recipe, RecipeError, Split, Task
from thalweg.core.changes import differences, refuse_changes
from thalweg.data.folder import folder_in_use, reading_from
from thalweg.recipes.files import data_file, digest, unpacked

BYTES = bytes(range(64))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "numbers.bin").write_bytes(BYTES)
    return tmp_path / "files"


def numbers() -> Path:
    return data_file("numbers.bin", what="The numbers", source="a friend")


def data() -> Split:
    path = numbers()
    x = torch.frombuffer(bytearray(unpacked(path)), dtype=torch.uint8).float().unsqueeze(1)
    return Split(train={"x": x, "y": x.long().squeeze(1) % 2}, facts={"sha256": digest(path)})


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


task = Task(name="numbers", model=lambda: nn.Linear(1, 2), loss=loss, data=data)
FEW = {"train.steps": 2, "train.batch": 4, "precision": "fp32"}


def test_it_is_looked_for_where_the_recipe_says_then_where_the_environment_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading_from(str(folder)) as use:
        assert numbers() == folder / "numbers.bin" and use.found == folder
    other = folder.parent / "other"
    other.mkdir()
    monkeypatch.setenv("THALWEG_DATA", str(other))
    with reading_from(str(folder)):
        (other / "numbers.bin").write_bytes(b"")
        assert numbers() == folder / "numbers.bin"
        (folder / "numbers.bin").unlink()
        assert numbers() == other / "numbers.bin"
    assert numbers() == other / "numbers.bin", "outside of a run the environment's"
    assert folder_in_use().named is None


def test_a_missing_file_is_said_in_three_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_DATA", "/elsewhere")
    with reading_from("/nowhere"), pytest.raises(DataError) as caught:
        numbers()
    assert str(caught.value) == (
        "The numbers: its file numbers.bin is not there.\n"
        "  Looked in /nowhere (data.folder) and /elsewhere (THALWEG_DATA).\n"
        "  Get it from a friend, and name its folder by --data FOLDER, data.folder or THALWEG_DATA."
    )
    monkeypatch.delenv("THALWEG_DATA")
    with pytest.raises(DataError, match="No data folder is named"):
        numbers()


def test_another_file_is_warned_about_and_used(folder: Path) -> None:
    right = hashlib.sha256(BYTES).hexdigest()
    with reading_from(str(folder)):
        data_file("numbers.bin", what="x", source="y", sha256=right)
        with pytest.warns(UserWarning, match=rf"sha256 begins with {right[:16]}, not with 0{{16}}\. It is used"):
            assert data_file("numbers.bin", what="x", source="y", sha256="0" * 16)


def test_what_xz_has_packed_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.xz").write_bytes(lzma.compress(BYTES))
    (tmp_path / "b.xz").write_bytes(BYTES)
    assert unpacked(tmp_path / "a.xz") == BYTES
    with pytest.raises(DataError, match="cannot be read"):
        unpacked(tmp_path / "b.xz")


def test_the_plan_keeps_the_folder_and_a_resumed_run_finds_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_DATA", str(folder))
    runs = folder.parent / "run"
    first = thalweg.train_task(task, Recipe().override(FEW), folder=runs)
    assert first.plan.recipe.data.folder == str(folder)
    assert ("data.folder", "the environment's THALWEG_DATA") in [(d.path, d.reason) for d in first.plan.decisions]
    monkeypatch.delenv("THALWEG_DATA")
    longer = Recipe().override({**FEW, "train.steps": 4})
    assert thalweg.train_task(task, longer, folder=runs, resume=True, accept=["steps"]).records[-1].step == 4
    moved = folder.rename(folder.parent / "moved")
    with pytest.raises(DataError, match="is not there"):
        thalweg.train_task(task, longer, folder=runs, resume=True)
    now = longer.override({"data.folder": str(moved)})
    again = thalweg.train_task(task, now, folder=runs, resume=True)
    assert again.plan.recipe.data.folder == str(moved)
    (moved / "numbers.bin").write_bytes(BYTES[::-1])
    with pytest.raises(DataError, match="not what this run began with"):
        thalweg.train_task(task, now, folder=runs, resume=True)


def test_a_folder_that_a_task_does_not_read_is_told_of(tmp_path: Path) -> None:
    plain = {"x": torch.ones(8, 1), "y": torch.zeros(8, dtype=torch.int64)}
    plan = thalweg.train(lambda: nn.Linear(1, 2), loss, plain, {**FEW, "data.folder": str(tmp_path)}).plan
    (told,) = [d for d in plan.decisions if d.path == "data.folder"]
    assert told.reason == "not used: the task reads no file of a data folder"


def test_the_folder_is_free_to_change_and_is_no_empty_name() -> None:
    changes = differences(Recipe().override({"data.folder": "/here"}), Recipe())
    assert [change.path for change in changes] == ["data.folder"]
    refuse_changes(Path("run"), changes, ())
    with pytest.raises(RecipeError, match="'' names no folder"):
        Recipe().override({"data.folder": ""})


def test_the_command_line_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--set={path}={value}" for path, value in FEW.items()]
    where = {"cwd": folder.parent, "PYTHONPATH": f"{Path(__file__).parent.parent}"}
    done = run_cli("train", "tests.test_data_folder:task", "--data", "files", "--quiet", *words, **where)
    assert done.returncode == 0, done.stderr
    run = folder.parent / "runs" / "test_data_folder"
    assert Recipe.from_file(run / "recipe.toml").data.folder == str(folder)
    for command in (["train", "--runs", str(folder.parent / "new")], ["plan"]):
        assert main([command[0], "tests.test_data_folder:task", *command[1:], *words]) == 2
        assert "No data folder is named" in capsys.readouterr().err
    assert main(["train", "digits", "--from", str(run), "--more", "2", "--data", "files"]) == 2
    assert "--data" in capsys.readouterr().err
