"""The starter that ``thalweg init`` writes: a task and a recipe that run as they are."""

from __future__ import annotations

from pathlib import Path

from thalweg.core import RunFolderError

TASK = '''"""A task of my own: model, loss, data, metrics. Plain functions; nothing to inherit from."""

import torch
import torch.nn.functional as F
from torch import nn

import thalweg


def model(hidden: int = 64, dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 3))


def loss(model, batch, label_smoothing: float = 0.0):
    # A mean is fine. To weigh tokens or masks exactly, return thalweg.Loss(sum, weight).
    smoothing = label_smoothing if model.training else 0.0
    return F.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=smoothing)


def metrics(model, batch):
    right = model(batch["x"]).argmax(-1) == batch["y"]
    return {"accuracy": thalweg.Loss(right.sum(), len(right))}


def spirals(num: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % 3
    radius = torch.rand(num, generator=draw)
    angle = 5 * radius + 2.1 * y + 0.15 * torch.randn(num, generator=draw)
    return {"x": torch.stack([radius * angle.cos(), radius * angle.sin()], 1), "y": y}


def data():
    # A dict of tensors, a torch Dataset, a DataLoader or an iterable of samples.
    return thalweg.Split(train=spirals(3000, seed=0), test=spirals(600, seed=1))


task = thalweg.Task(name="my_task", model=model, loss=loss, data=data, metrics=metrics, about="three spirals")
'''

RECIPE = """# What differs from the default recipe. `thalweg train` prints the rest, with reasons, before step 1.
[train]
epochs = 20
batch = 64

[optimizer]
rule = "adamw"
lr = 1e-2
weight_decay = 0.01

[schedule]
lr = "warmup(5%) >> cosine(to=0.05)"

[model]
hidden = 64
dropout = 0.1

[loss]
label_smoothing = 0.05

[regularize]
average = 0.98

[evaluate]
best = "accuracy"
"""


def write_starter(folder: Path) -> list[Path]:
    """Write ``my_task.py`` and ``my_recipe.toml``; files that are there already are not touched.

    Raises:
        RunFolderError: if one of them is there, or the folder cannot be written.
    """
    files = {folder / "my_task.py": TASK, folder / "my_recipe.toml": RECIPE}
    there = [path for path in files if path.exists()]
    if there:
        raise RunFolderError(
            "The starter would overwrite a file of yours.",
            f"{', '.join(map(str, there))} exists.",
            "Move it, or name another folder: thalweg init FOLDER.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise RunFolderError(f"The starter cannot be written to {folder}.", f"{err}.", "Name another folder.") from None
    return list(files)
