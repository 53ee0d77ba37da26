"""california: a perceptron on California's housing, 20,640 districts of the census of 1990, and the median value of a house."""

from __future__ import annotations

import csv
import io

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.core import DataError, Loss, Split, Task
from thalweg.data import permute
from thalweg.recipes.files import data_file, text
from thalweg.recipes.models.tabular import Tabular
from thalweg.recipes.tables import Columns, Rows, Values, held_out_rows

FILE = "california_housing.csv.xz"
_NUMBERS = (
    "longitude",
    "latitude",
    "housing_median_age",
    "total_rooms",
    "total_bedrooms",
    "population",
    "households",
    "median_income",
)
_PLACE, _VALUE = "ocean_proximity", "median_house_value"
_UNIT = 100_000.0  # dollars


def read() -> tuple[Values, list[str], Values]:
    """(numbers (rows, 8) with blanks as nan, nearness to the ocean, value in 100,000 dollars).

    Raises:
        DataError: if the file is not there, or has other columns.
    """
    path = data_file(
        FILE,
        what="California housing",
        source="StatLib (houses.zip), as the csv that scikit-learn's authors and Géron's book use",
        sha256="db29f742595dfc9a",
    )
    rows = list(csv.DictReader(io.StringIO(text(path))))
    missing = {*_NUMBERS, _PLACE, _VALUE} - set(rows[0] if rows else ())
    if missing:
        raise DataError(
            f"{path} is no table of California's housing.",
            f"It has {len(rows)} rows, and lacks {', '.join(sorted(missing))}.",
            "Give the csv with a header of these names.",
        )
    try:
        numbers = np.array([[float(row[name] or "nan") for name in _NUMBERS] for row in rows])
        return numbers, [row[_PLACE] for row in rows], np.array([float(row[_VALUE]) for row in rows]) / _UNIT
    except (ValueError, TypeError) as err:  # a word where a number stands, or a line that ends early
        raise DataError(f"{path} is no table of California's housing.", f"{err}.", "Get it anew.") from None


def model(
    width: int = 128,
    layers: int = 2,
    dropout: float = 0.1,
    embed: str = "waves",
    pieces: int = 32,
    embed_width: int = 16,
    spread: float = 1.0,
    members: int = 4,
) -> nn.Module:
    return Tabular(
        len(_NUMBERS),
        (2, 6),
        width=width,
        layers=layers,
        dropout=dropout,
        embed=embed,
        pieces=pieces,
        embed_width=embed_width,
        spread=spread,
        members=members,
    )


def data(held_out: str = "test", log_target: bool = False) -> Split:
    """A fifth of the rows, by a fixed permutation, is the test set.

    Args:
        held_out: "test", or "validation": a fifth of the training rows, to choose by; the test set is not looked at then.
        log_target: train on the logarithm of the value.
    """
    numbers, place, value = read()
    order = permute(len(value), 0, np.arange(len(value)))
    train, test = held_out_rows(order, len(order) // 5, held_out)
    known = Columns.fit(numbers[train], [[place[i] for i in train]])
    goal = np.log(value) if log_target else value
    mean, spread = goal[train].mean(), goal[train].std()

    def part(rows: Rows) -> dict[str, Tensor]:
        found = known(numbers[rows], [[place[i] for i in rows]])
        found["targets"] = torch.from_numpy(((goal[rows] - mean) / spread).astype(np.float32))
        return {**found, "values": torch.from_numpy(value[rows].astype(np.float32))}

    facts = {"train rows": len(train), "held-out rows": len(test), "held out": held_out}
    scale = {"mean": torch.tensor(mean).float(), "spread": torch.tensor(spread).float()}
    scale["logs"] = torch.tensor(log_target)
    return Split(train={**part(train), **scale}, test={**part(test), **scale}, facts=facts)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """Half the squared error of each member, of the standardised target; of their mean, when it is evaluated."""
    found = model(batch["numbers"], batch["categories"]).squeeze(-1)
    if not model.training:
        found = found.mean(1, keepdim=True)
    errors = (found.float() - batch["targets"].unsqueeze(1)).square()
    return Loss(errors.mean(1).sum(), len(errors))


def metrics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Loss]:
    """Squared error in (100,000 dollars)^2, and absolute error in 100,000 dollars."""
    found = model(batch["numbers"], batch["categories"]).squeeze(-1).float().mean(1) * batch["spread"] + batch["mean"]
    errors = torch.where(batch["logs"], found.exp(), found) - batch["values"]
    return {"mse": Loss(errors.square().sum(), len(errors)), "mae": Loss(errors.abs().sum(), len(errors))}


TASK = Task(
    name="california",
    about="a perceptron on California's housing (20,640 rows)",
    unit="rows",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    inputs="numbers",
    targets="targets",
    recipe={
        "train.epochs": 16.0,
        "train.batch": 256,
        "optimizer.rule": "muon",
        "optimizer.lr": 0.02,
        "optimizer.otherwise": "adamw",
        "optimizer.otherwise_lr": 3e-3,
        "optimizer.weight_decay": 0.01,
        "schedule.lr": "warmup(5%) >> cosine(to=0.02)",
        "regularize.average": 0.99,
        "evaluate.best": "mse",
        "evaluate.batch": 2064,
    },
)
