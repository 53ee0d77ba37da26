"""adult: a perceptron on the census income data of UCI, 48,842 people, and whether they earn more than 50,000 dollars."""

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
from thalweg.regularize import cross_entropy

FILES = {"adult.data.xz": "1a26c887f4b7b4b4", "adult.test.xz": "7b7089b2b40308e7"}
_NUMBERS = (0, 2, 4, 10, 11, 12)  # age, fnlwgt, education-num, capital-gain, capital-loss, hours-per-week
_WORDS = (1, 3, 5, 6, 7, 8, 9, 13)
_SIZES = (10, 17, 8, 16, 7, 6, 3, 43)  # values of each column of words, one of them for what was never seen
_COLUMNS = 15


def read(name: str) -> tuple[Values, list[list[str]], Values]:
    """(numbers (rows, 6), columns of words, whether the income is above 50,000 dollars) of one of the two files.

    Raises:
        DataError: if it is not there, or holds no such rows.
    """
    path = data_file(name, what="Adult", source="UCI (adult.zip), packed by xz", sha256=FILES[name])
    lines = csv.reader(io.StringIO(text(path)), skipinitialspace=True)
    rows = [row for row in lines if len(row) == _COLUMNS]
    if not rows:
        raise DataError(
            f"{path} is no table of Adult.", f"No line has {_COLUMNS} columns.", "Give the file as UCI has it."
        )
    try:
        numbers = np.array([[float(row[i]) for i in _NUMBERS] for row in rows])
    except ValueError as err:
        raise DataError(f"{path} is no table of Adult.", f"{err}.", "Give the file as UCI has it.") from None
    words = [[row[i] for row in rows] for i in _WORDS]
    return numbers, words, np.array([row[-1].startswith(">") for row in rows], dtype=np.float64)


def model(
    width: int = 128,
    layers: int = 2,
    dropout: float = 0.1,
    embed: str = "pieces",
    pieces: int = 128,
    embed_width: int = 16,
    spread: float = 0.3,
    members: int = 4,
) -> nn.Module:
    return Tabular(
        len(_NUMBERS),
        _SIZES,
        outputs=2,
        width=width,
        layers=layers,
        dropout=dropout,
        embed=embed,
        pieces=pieces,
        embed_width=embed_width,
        spread=spread,
        members=members,
    )


def data(held_out: str = "test", most: float = 0.02) -> Split:
    """The two files of UCI.

    Args:
        held_out: "test", or "validation": a fifth of the training rows, to choose by; the test set is not looked at then.
        most: share of the range of a number that one of its values takes up at most, however common it is.
    """
    names = iter(FILES)
    numbers, words, rich = read(next(names))
    train, test = held_out_rows(permute(len(rich), 0, np.arange(len(rich))), 0, held_out)
    known = Columns.fit(numbers[train], [[column[i] for i in train] for column in words], most)

    def part(rows: Rows, numbers: Values, words: list[list[str]], rich: Values) -> dict[str, Tensor]:
        found = known(numbers[rows], [[column[i] for i in rows] for column in words])
        return {**found, "labels": torch.from_numpy(rich[rows].astype(np.int64))}

    trained = part(train, numbers, words, rich)
    if held_out == "test":
        numbers, words, rich = read(next(names))
        test = np.arange(len(rich))
    facts = {"train rows": len(train), "held-out rows": len(test), "held out": held_out}
    return Split(train=trained, test=part(test, numbers, words, rich), facts=facts)


def loss(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy of each member; of their mean probability, when it is evaluated."""
    logits_BKO = model(batch["numbers"], batch["categories"])
    if not model.training:
        return cross_entropy(_mean(logits_BKO), batch["labels"])
    members = logits_BKO.shape[1]
    total, weight = cross_entropy(
        logits_BKO.flatten(0, 1), batch["labels"].repeat_interleave(members), label_smoothing=label_smoothing
    )
    return Loss(total / members, weight / members)


def metrics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Loss]:
    right = _mean(model(batch["numbers"], batch["categories"])).argmax(-1) == batch["labels"]
    return {"accuracy": Loss(right.sum(), len(right))}


def _mean(logits_BKO: Tensor) -> Tensor:
    """The logarithm of the members' mean probabilities."""
    return logits_BKO.float().softmax(-1).mean(1).log()


TASK = Task(
    name="adult",
    about="a perceptron on UCI's census income (48,842 rows)",
    unit="rows",
    model=model,
    loss=loss,
    data=data,
    metrics=metrics,
    inputs="numbers",
    classes=2,
    recipe={
        "train.epochs": 10.0,
        "train.batch": 256,
        "optimizer.rule": "adamw",
        "optimizer.lr": 3e-3,
        "optimizer.weight_decay": 0.02,
        "schedule.lr": "warmup(5%) >> cosine(to=0.02)",
        "regularize.average": 0.99,
        "evaluate.best": "accuracy",
        "evaluate.batch": 4096,
    },
)
