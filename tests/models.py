"""Small models and data for the tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.core import Loss, Recipe, Split, Task
from thalweg.engine import Step, build, resolve
from thalweg.recipes.models.gpt import GPT

IGNORED = -100


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def batchnorm_net(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    )


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def points(num: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(num, 6, generator=draw).to(dtype), "y": torch.randint(0, 3, (num,), generator=draw)}


def small_gpt(dropout: float = 0.0) -> GPT:
    return GPT(vocab=17, context=12, width=16, heads=2, layers=2, dropout=dropout)


def ragged_text(num: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of 1 to 12 tokens, padded to 12; targets beyond the end are ignored."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 17, (num, 13), generator=draw)
    lengths = torch.randint(1, 13, (num,), generator=draw)
    targets = torch.where(torch.arange(12) < lengths[:, None], tokens[:, 1:], IGNORED)
    return {"tokens": tokens[:, :-1].contiguous(), "targets": targets}


def text_loss(model: nn.Module, batch: Any) -> Loss:
    logits = model(batch["tokens"])
    total = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(total, (batch["targets"] != IGNORED).sum())


def make_step(model: nn.Module, loss: Any, data: Any, **changes: Any) -> tuple[Step, Any]:
    """A built step and its feed; fp32 and a constant schedule unless told otherwise."""
    recipe = Recipe().override({"precision": "fp32", "train.steps": 20, "schedule.lr": "constant()", **changes})
    task = Task(model=model, loss=loss, data=data if isinstance(data, Split) else Split(train=data))
    resolved = resolve(task, recipe)
    return build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy), resolved.feed


def run_steps(step: Step, feed: Any, num: int) -> list[list[float]]:
    """``num`` steps; the rows that they left."""
    rows = []
    for window in feed.windows(step.state.step, step.state.step + num):
        rows.append(step.run(window).tolist())
    return rows


def state_bits(step: Step) -> dict[str, Tensor]:
    """Every tensor of the state."""
    snapshot = step.state.snapshot({})
    return {f"{group}/{name}": t.clone() for group, tensors in snapshot.groups.items() for name, t in tensors.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, f"differ: {differing}"
