"""What ranks do that compute layers together, for tests/test_tensor.py; the processes are those of tests/ranks_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg.run.whole
from tests.models import ragged_text, small_gpt, text_loss
from tests.ranks_cases import FOUR, collectives, gpt, text_task, train
from thalweg.core import Split, Task, ThalwegError
from thalweg.parallel import ALONE

BOTH, TWO = {"data": 2, "tensor": 2}, {"tensor": 2}
#: name: (parallel, what differs from BASE).
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "4 micro-batches, short last windows": (BOTH, {**FOUR, "train.clip": 0.3}),
    "16 micro-batches": (BOTH, {"train.batch": 32, "train.micro_batch": 2, "train.clip": 0.3}),
    "one feed": (TWO, {**FOUR, "train.clip_history": 2.5}),
}
SAVED = {**FOUR, "train.steps": 6, "checkpoint.every": 3}


class Between(nn.Module):
    """Dropout where activations are parts, or none."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.tokens, self.up, self.down, self.head = (
            nn.Embedding(17, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 17),
        )  # fmt: skip
        self.drop, self.rate = nn.Dropout(rate), 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        between = F.dropout(self.drop(F.gelu(self.up(self.tokens(tokens)))), self.rate, self.training)
        return self.head(self.down(between))


UNPACKED = {"blocks.*.qkv": "colwise", "blocks.*.out": "rowwise"}
PLAN = {"up": "colwise", "down": "rowwise"}


def task_of(model: Callable[[], nn.Module]) -> Task:
    return Task(model=lambda: model().double(), loss=text_loss, data=Split(train=ragged_text(50)))


def functional() -> nn.Module:
    model = Between(0.0)
    model.rate = 0.1
    return model


def refusals() -> dict[str, Any]:
    """The words of what is refused, by name; what is trained, by its losses."""
    short = {**FOUR, "train.steps": 2, "parallel": TWO}
    mine = {**short, "tensor_plan": PLAN}
    tries: dict[str, Callable[[], Any]] = {
        "own plan": lambda: train(task_of(lambda: Between(0.0)), mine),
        "dropout": lambda: train(task_of(lambda: Between(0.1)), mine),
        "functional": lambda: train(task_of(functional), mine),
        "half": lambda: train(task_of(lambda: Between(0.0)), {**short, "tensor_plan": {"up": "colwise"}}),
        "packed": lambda: train(task_of(small_gpt), {**short, "tensor_plan": UNPACKED}),
        "muon": lambda: train(text_task(), {**short, "optimizer.rule": "muon", "optimizer.options": {}}),
        "int8": lambda: train(text_task(), {**short, "optimizer.slots": "int8"}),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, act in tries.items():
        try:
            found[name] = act()["losses"]
        except ThalwegError as err:
            assert all((err.asked, err.numbers, err.remedy))
            found[name] = f"{type(err).__name__}: {err}"
    return found


def collectives_a_step(micro_batch: int) -> dict[str, float]:
    """Of a run without evaluations, by name: two more steps, counted; what DTensor sends inside of passes is not among them."""
    counts = []
    for steps in (2, 4):
        with collectives() as made:
            task = Task(model=gpt, loss=text_loss, data=Split(train=ragged_text(64)))
            train(task, {"train.batch": 16, "train.micro_batch": micro_batch, "train.steps": steps, "parallel": BOTH})
        counts.append(list(made))
    return {
        n: (counts[1].count(n) - counts[0].count(n)) / 2
        for n in set(counts[1])
        if counts[1].count(n) > counts[0].count(n)
    }


def go_through(rank: int, folder: Path, on: Callable[[int, Callable[[Any], Any]], Any]) -> dict[Any, Any]:
    """All cases, in a process that is one of four.

    Args:
        on: does something on so many ranks.
    """
    found: dict[Any, Any] = {}
    for name, (parallel, changes) in CASES.items():
        num = 4 if parallel is BOTH else 2
        found[name] = on(num, lambda _, p=parallel, c=changes: train(text_task(), {**c, "parallel": p}))
    found["cut"] = on(4, lambda _: train(text_task(), {**SAVED, "parallel": BOTH}, folder / "cut"))
    if rank == 0:
        thalweg.run.whole.join = lambda: ALONE
        found["alone"] = train(text_task(), SAVED, folder / "alone")
    dist.barrier()
    found["from alone"] = on(4, lambda _: train(text_task(), {**SAVED, "parallel": BOTH}, folder / "alone", resume=3))
    for micro in (8, 2):  # accumulation 1, and 4
        found["collectives", micro] = on(4, lambda _, micro=micro: collectives_a_step(micro))
    found["refused"] = on(2, lambda _: refusals())
    return found
