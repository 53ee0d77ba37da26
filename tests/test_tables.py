"""Tables as tensors, the perceptron that takes them, and the two tasks of tables."""

from __future__ import annotations

import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import three_parts
from thalweg import train_task
from thalweg.core import DataError, ModelError, RecipeError
from thalweg.data.folder import reading_from
from thalweg.recipes import find_task, recipe_for
from thalweg.recipes.models.tabular import Pieces, Tabular
from thalweg.recipes.tables import Columns, NumberColumn, held_out_rows


def test_a_number_is_its_place_among_the_training_values() -> None:
    column = NumberColumn.fit(np.array([10.0, 20.0, 20.0, 40.0, np.nan]))
    assert column(np.array([10, 20, 30, 40, -5, 99, np.nan])).tolist() == [0, 0.5, 0.75, 1, 0, 1, 0.5]
    flat = NumberColumn.fit(np.array([np.nan, np.nan]))
    assert flat(np.array([3.0, np.nan])).tolist() == [0.5, 0.5]


def test_a_common_value_leaves_room_for_the_others() -> None:
    values = np.array([0.0] * 96 + [1.0, 2.0, 3.0, 4.0])
    wide, narrow = NumberColumn.fit(values, most=0.01), NumberColumn.fit(values)
    rest = np.array([1.0, 2.0, 3.0, 4.0])
    assert np.ptp(narrow(rest)) < 0.1 and narrow(rest).min() > 0.9
    np.testing.assert_allclose(wide(rest), [0.25, 0.5, 0.75, 1.0])


def test_blanks_have_a_column_and_new_words_a_value() -> None:
    numbers = np.array([[1.0, np.nan], [2.0, 5.0]])
    columns = Columns.fit(numbers, [["b", "a"]])
    assert columns.sizes == (2, 3)
    found = columns(np.array([[np.nan, np.nan], [1.5, 5.0]]), [["a", "new"]])
    assert found["categories"].tolist() == [[1, 1], [0, 0]]
    assert found["numbers"].dtype == torch.float32 and found["numbers"][0].tolist() == [0.5, 0.5]
    assert Columns.fit(np.zeros((3, 1)), [])(np.zeros((2, 1)), [])["categories"].shape == (2, 0)


def test_validation_rows_are_training_rows() -> None:
    order = np.random.default_rng(0).permutation(50)
    train, test = held_out_rows(order, 10, "test")
    fewer, validation = held_out_rows(order, 10, "validation")
    assert set(train) | set(test) == set(range(50)) and len(test) == 10
    assert set(fewer) | set(validation) == set(train) and len(validation) == 8
    with pytest.raises(RecipeError) as caught:
        held_out_rows(order, 10, "all")
    assert three_parts(caught.value)[0] == "data.options.held_out='all' is not known."


def test_pieces_are_linear_in_between() -> None:
    places = torch.tensor([[0.0, 0.3, 0.999, 1.0]])
    code = Pieces(8)(places)
    torch.testing.assert_close(code.sum(-1), places * 8)
    assert ((code[..., :-1] == 1) | (code[..., 1:] == 0)).all()


@pytest.mark.parametrize("embed", ["scores", "pieces", "waves"])
def test_the_perceptron_trains_all_it_has(embed: str) -> None:
    model = Tabular(2, (3, 5), outputs=2, width=8, embed=embed, pieces=4, embed_width=3, members=3, dropout=0.0)
    found = model(torch.rand(7, 2), torch.randint(0, 3, (7, 2)))
    assert found.shape == (7, 3, 2)
    assert not torch.allclose(found[:, 0], found[:, 1]), "members are not the same"
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("name", "bad"), [("embed", "wawes"), ("members", 0), ("layers", 0), ("pieces", 0)])
def test_a_perceptron_that_cannot_be_is_refused(name: str, bad: Any) -> None:
    with pytest.raises(ModelError) as caught:
        Tabular(2, (3,), **{name: bad})
    assert f"model.{name}={bad!r}" in three_parts(caught.value)[0]


HOUSES = "longitude,latitude,housing_median_age,total_rooms,total_bedrooms,population,households,median_income"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = [f"{HOUSES},median_house_value,ocean_proximity"]
    for i in range(120):
        x = draw.normal(size=8).round(3).astype(str)
        x[4] = "" if i % 9 == 0 else x[4]
        lines.append(f"{','.join(x)},{50_000 + 1000 * i},{'INLAND' if i % 3 else 'ISLAND'}")
    (tmp_path / "california_housing.csv.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    for name, end in (("adult.data.xz", ""), ("adult.test.xz", ".")):
        rows = ["|a comment"] if end else []
        for i in range(60):
            rows.append(
                f"{20 + i}, Private, {i}, HS-grad, 9, Single, Sales, Wife, X, Male, {i % 2 * 99}, 0, 40, ?, {'<>'[i % 2]}=50K{end}"
            )
        (tmp_path / name).write_bytes(lzma.compress("\n".join(rows).encode()))
    return tmp_path


def small(name: str, folder: Path, **more: Any) -> Any:
    given = {"data.folder": str(folder), "train.epochs": None, "train.steps": 3, "train.batch": 16, "compile": "off"}
    given |= {"precision": "fp32", "model.width": 8, "model.members": 2, "evaluate.every": 0}
    return recipe_for(find_task(name)).override({k: v for k, v in {**given, **more}.items() if v is not None})


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
@pytest.mark.parametrize("log_target", [False, True])
def test_houses_are_judged_in_dollars(folder: Path, log_target: bool) -> None:
    task = find_task("california")
    with reading_from(str(folder)):
        split = task.data(log_target=log_target)
    assert (len(split.train["targets"]), len(split.test["targets"])) == (96, 24)
    assert abs(float(split.train["targets"].mean())) < 1e-5

    class Knows(nn.Module):
        """One member that is right, and one that is right too, where ``off`` is 0."""

        def forward(self, numbers: Any, categories: Any) -> Any:
            return (split.test["targets"] + off)[:, None, None].expand(-1, 2, 1)

    off = 0.0
    exact = task.metrics(Knows(), split.test)
    assert float(exact["mse"].total) < 1e-8 and exact["mse"].weight == 24
    if not log_target:
        off = 1.0
        spread = float(split.test["spread"])
        found = task.metrics(Knows(), split.test)
        assert math.isclose(float(found["mse"].total) / 24, spread**2, rel_tol=1e-4)
        assert math.isclose(float(found["mae"].total) / 24, spread, rel_tol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is not the file that the figures")
@pytest.mark.parametrize("name", ["california", "adult"])
def test_the_tasks_train_on_such_files(folder: Path, name: str) -> None:
    result = train_task(find_task(name), small(name, folder))
    assert result.plan.machine["data"]["held-out rows"] == {"california": 24, "adult": 60}[name]
    assert result.reason.value == "finished" and all(math.isfinite(v) for v in result.metrics.values())
    again = train_task(find_task(name), small(name, folder, **{"data.options.held_out": "validation"}))
    assert again.plan.machine["data"]["held-out rows"] == {"california": 19, "adult": 12}[name]


_HEADER = f"{HOUSES},ocean_proximity,median_house_value\n"


@pytest.mark.parametrize("rows", [b"a,b\n1,2\n", b"\xff\xfe", (_HEADER + "word," * 10).encode(), b"word, " * 14 + b"w"])
def test_what_is_no_such_table_is_named(tmp_path: Path, rows: bytes) -> None:
    for name, file in (("california", "california_housing.csv.xz"), ("adult", "adult.data.xz")):
        (tmp_path / file).write_bytes(lzma.compress(rows))
        with (
            reading_from(str(tmp_path)),
            pytest.warns(UserWarning, match="is not the file"),
            pytest.raises(DataError) as caught,
        ):
            find_task(name).data()
        assert file in three_parts(caught.value)[0]


def test_members_are_judged_by_their_mean_probability() -> None:
    class Two(nn.Module):
        """One member is sure of class 1, the other leans to class 0."""

        def forward(self, numbers: Any, categories: Any) -> Any:
            return torch.tensor([[[0.0, 8.0], [1.0, 0.0]]]).expand(len(numbers), -1, -1)

    batch = {"numbers": torch.zeros(4, 6), "categories": torch.zeros(4, 8), "labels": torch.tensor([1, 1, 0, 1])}
    task, model = find_task("adult"), Two()
    assert float(task.metrics(model, batch)["accuracy"].total) == 3
    model.train()
    total, weight = task.loss(model, batch)
    one = [torch.tensor(row).log_softmax(0) for row in ([0.0, 8.0], [1.0, 0.0])]
    wanted = -sum(float(member[label]) for label in (1, 1, 0, 1) for member in one) / 2
    assert math.isclose(float(total), wanted, rel_tol=1e-5) and float(weight) == 4


def test_the_real_tables_are_as_the_models_expect(shared_data: Path) -> None:
    houses, people = find_task("california").data(), find_task("adult").data()
    assert (houses.facts["train rows"], houses.facts["held-out rows"]) == (16512, 4128)
    assert (people.facts["train rows"], people.facts["held-out rows"]) == (32561, 16281)
    assert int(houses.train["categories"][:, 0].sum() + houses.test["categories"][:, 0].sum()) == 207
    for split, sizes in ((houses, (2, 6)), (people, (10, 17, 8, 16, 7, 6, 3, 43))):
        assert tuple((split.train["categories"].max(0).values + 1).tolist()) == sizes
        assert (split.test["categories"].max(0).values < torch.tensor(sizes)).all()
