"""What ranks do where parameters lie in parts, for tests/test_parts.py; in the processes of tests/ranks_cases.py."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import thalweg
from tests import ranks_cases
from tests.models import mean_loss, mlp, points, ragged_text, small_gpt, text_loss
from tests.ranks_cases import FOUR, Reading, bn, bn_task, exact_points, recorded, task_on, text_task, train
from thalweg.core import Recipe, Split, Task, ThalwegError
from thalweg.optim import make_arenas, named_trainable, parameter_table
from thalweg.optim.arena import How, update
from thalweg.optim.sharded_arena import ShardedArena
from thalweg.optim.shards import Shards
from thalweg.parallel import Joined
from thalweg.recipes.models.gpt import GPT
from thalweg.rules import RULES

COPIES = {"data": 2, "shard": 2}
MUON = {"optimizer.rule": "muon", "optimizer.options": {}}


def float_text_task() -> Task:
    data = Split(train=ragged_text(50), test=ragged_text(20, seed=1))
    return Task(model=lambda: small_gpt(dropout=0.2), loss=text_loss, data=data, unit="tokens")


#: name: (task, what differs from BASE, ranks, how they share the model). 17 tokens and 12 places are not a multiple of 3 rows.
CASES: dict[str, tuple[Callable[[], Task], dict[str, Any], int, Any]] = {
    "gpt": (text_task, FOUR, 3, "fsdp"),
    "batchnorm": (bn_task, {"train.batch": 32, "train.micro_batch": 2, "regularize.precise": 2}, 4, "fsdp"),
    "copies": (bn_task, FOUR, 4, COPIES),
    "ASAM, recomputed": (
        text_task,
        {**FOUR, "regularize.sharpness": 0.05, "regularize.sharpness_scaled": True, "recompute": "blocks"},
        2,
        "fsdp",
    ),
    "whole matrices, a stream": (task_on(Reading()), {**FOUR, "optimizer.rule": "muon"}, 3, "fsdp"),
    "window of weights": (
        text_task,
        {**FOUR, "regularize.average": 0, "regularize.average_form": "window", "regularize.average_start": "1",
         "regularize.average_every": "1", "regularize.average_window": 3},
        2,
        "fsdp",
    ),
}  # fmt: skip
#: The same with exact_reduce: the bits of one rank, also those that are drawn for rounding.
EXACT: dict[str, tuple[Callable[[], Task], dict[str, Any], int, Any]] = {
    "gpt stored in bfloat16": (float_text_task, {**FOUR, "precision": "bf16-pure", "recompute": "blocks"}, 3, "fsdp"),
    "batchnorm, copies": (bn_task, {**FOUR, "train.micro_batch": 2}, 4, COPIES),
}


def one(case: tuple[Callable[[], Task], dict[str, Any], int, Any], **more: Any) -> dict[str, Any]:
    """A case, as this process's ranks do it."""
    task, changes, _, parallel = case
    given = {**changes, "parallel": parallel, **more}
    with without_eps(given.get("optimizer.rule") == "muon"):
        return train(task(), given)


class without_eps:
    """Inside, the base recipe does not name an option that other rules than Adam's do not have."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        self.kept = ranks_cases.BASE.pop("optimizer.options.eps") if self.wanted else None

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            ranks_cases.BASE["optimizer.options.eps"] = self.kept


# --- every rule -------------------------------------------------------------------------------------------------------

SHAPES = {"matrix": (7, 4), "vector": (5,), "kernel": (3, 2, 3, 3), "row": (1, 6), "experts": (4, 3, 5), "wide": (6, 9)}


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)))


def gap_of(rule: str, group: Any, slots: str = "full") -> float:
    """The largest difference between whole and sharded after three updates: of weights, averages and all that is remembered."""
    whole, cut = Parameters(), Parameters()
    optimizer = Recipe().override({"optimizer.rule": rule, "optimizer.slots": slots}).optimizer
    rows = parameter_table(whole, optimizer=optimizer)
    shards, how = Shards(SHAPES, group), How(slots=slots, average=True)
    parts = [(name, nn.Parameter(shards.mine(name, p.detach()).clone())) for name, p in named_trainable(cut)]
    ours = make_arenas(named_trainable(whole), rows, optimizer, how)
    theirs = make_arenas(parts, rows, optimizer, how, lambda n, t, h: ShardedArena(n, t, h, shards))
    draw = torch.Generator().manual_seed(1)
    for t in (1, 2, 3):
        for name, shape in SHAPES.items():
            g = torch.randn(shape, generator=draw, dtype=torch.float64)
            for arena, part in ((ours[0], g), (theirs[0], shards.mine(name, g))):
                arena.view(arena.grads, name).copy_(part)
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.01, float(t), 2.0, 0.0)]
        for arenas in (ours, theirs):
            update(
                arenas,
                **dict(zip(("lr", "t", "divisor", "skipped"), numbers)),
                share=torch.tensor(0.3),
                due=t - 1,
            )
    kept = {**ours[0].slots(), **{f"average/{n}": t for n, t in ours[0].average_views().items()}}
    mine = {**theirs[0].slots(), **{f"average/{n}": t for n, t in theirs[0].average_views().items()}}
    gaps = []
    for evaluated in (False, True):
        for name in SHAPES:
            found = shards.whole(name, theirs[0].view(theirs[0].params, name), all_ranks=True)
            gaps.append((found - ours[0].view(ours[0].params, name)).abs().max())
        for arena in (ours[0], theirs[0]) if not evaluated else ():
            for average, live in arena.averages():
                live.data.copy_(average)
    for path, tensor in mine.items():
        name = path.partition("/")[2]
        cut_up = theirs[0].owner(name) is None and tensor.shape != kept[path].shape
        theirs_whole = shards.mine(name, kept[path]) if cut_up else kept[path]
        if tensor.numel():
            gaps.append((tensor.double() - theirs_whole.double()).abs().max())
    return max(float(gap) for gap in gaps)


def every_rule(ranks: Joined) -> dict[str, float]:
    found = {name: gap_of(name, ranks.group) for name in RULES if "curvature" not in RULES[name].needs}
    return {**found, "adamw, int8": gap_of("adamw", ranks.group, "int8")}


# --- runs that go on in another form ----------------------------------------------------------------------------------

LONG = {
    **FOUR,
    "train.steps": 6,
    "optimizer.rule": "muon",
    "evaluate.patience": 9,
    "guard.nonfinite": "rewind",
    "guard.every": 2,
}


def go_on(folder: Path | None, parallel: Any, *, stop: bool = False, resume: bool = False) -> dict[str, Any]:
    """A run with slots of whole matrices, an average, the best weights and copies to go back to; stopped in its third step."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if stop and ranks_cases._now == [2] and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return mean_loss(model, batch)

    with recorded(), without_eps(True):
        return train(replace(bn_task(), loss=loss), {**LONG, "parallel": parallel}, folder, resume)


# --- collectives, memory, the model, refusals -------------------------------------------------------------------------


def collectives_a_step(micro_batch: int) -> dict[str, float]:
    """By name, of a model with two blocks: four more steps, counted."""
    counts = []
    for steps in (2, 6):
        with ranks_cases.collectives() as made:
            task = replace(text_task(), data=ragged_text(64))
            train(task, {"train.batch": 16, "train.micro_batch": micro_batch, "train.steps": steps, "parallel": "fsdp"})
        counts.append(list(made))
    return {n: (counts[1].count(n) - counts[0].count(n)) / 4 for n in set(counts[1])}


def sizes(parallel: str) -> dict[str, int]:
    """Bytes by purpose, of a model whose tensors are large enough for gaps between them not to count."""
    model = lambda: GPT(vocab=512, context=12, width=192, heads=2, layers=2)
    recipe = {"train.batch": 8, "train.micro_batch": 2, "train.steps": 1, "precision": "fp32", "parallel": parallel}
    return thalweg.train(model, text_loss, ragged_text(8), {**recipe, "evaluate.every": 0}).plan.sizes


def model_of_the_users() -> dict[str, Any]:
    """A model that is given as it is, with tied weights, a frozen parameter and a hook of its own, trained twice."""
    torch.manual_seed(0)
    model = small_gpt().double()
    model.head.weight = model.tokens.weight
    model.positions.weight.requires_grad_(False)
    calls: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    before = dict(model.named_parameters())
    kinds, keys = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    recipe = {"train.batch": 16, "train.micro_batch": 4, "train.steps": 3, "precision": "fp32", "parallel": "fsdp"}
    losses = []
    for _ in range(2):
        result = thalweg.train(model, text_loss, ragged_text(50), recipe)
        losses += [record.loss for record in result.records]
    after = dict(model.named_parameters())
    return {
        "same": result.model is model
        and after.keys() == before.keys()
        and all(after[n] is p for n, p in before.items()),
        "plain": all(type(p) is nn.Parameter and p.grad is None for p in after.values()),
        "kinds": kinds == [type(m) for m in model.modules()],
        "keys": keys == [set(m.__dict__) for m in model.modules()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "called": len(calls) > 0,
        "losses": losses,
        "weights": {name: t.clone() for name, t in model.state_dict().items()},
    }


class Scaled(nn.Module):
    """With a parameter that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp().double(), nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Halves(nn.Module):
    """A layer with parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(6, 3)), nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() @ self.a).double() + self.b


def refusals() -> dict[str, str]:
    """The words of what is refused, by name."""

    def reads_weights(model: nn.Module, batch: Any) -> Tensor:
        return text_loss(model, batch).total / 12 + model.blocks[0].up.weight.square().sum()

    def out_of_memory(model: nn.Module, batch: Any) -> Tensor:
        if ranks_cases._now:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return mean_loss(model, batch)

    shared = {**FOUR, "parallel": "fsdp"}
    tries: dict[str, Callable[[], Any]] = {
        "penalties": lambda: train(bn_task(), {**shared, "regularize.penalties": {"l1": 1e-3}}),
        "number": lambda: train(Task(model=Scaled, loss=mean_loss, data=exact_points()), shared),
        "dtypes": lambda: train(Task(model=Halves, loss=mean_loss, data=exact_points()), shared),
        "weights": lambda: train(replace(text_task(), loss=reads_weights), shared),
        "memory": lambda: train(Task(model=bn, loss=out_of_memory, data=exact_points()), shared),
    }
    found = {}
    for name, act in tries.items():
        try:
            with recorded():
                act()
        except ThalwegError as err:
            assert all((err.asked, err.numbers, err.remedy))
            found[name] = f"{type(err).__name__}: {err}"
        else:
            found[name] = "nothing"
    return found


def not_finite() -> dict[str, Any]:
    """A bad sample, which a run goes back from; what is told."""
    data = points(48, torch.float64)
    data["x"][5] = float("nan")
    changes = {
        "train.batch": 8,
        "train.micro_batch": 2,
        "parallel": "fsdp",
        "guard.nonfinite": "rewind",
        "guard.every": 4,
    }
    return train(Task(model=lambda: mlp().double(), loss=mean_loss, data=Split(train=data)), changes)


def go_through(
    on: Callable[[int, Callable[[Joined], Any]], Any], found: dict[Any, Any], folder: Path, rank: int
) -> None:
    """All cases of parts, in a process that is one of four."""
    for name, case in CASES.items():
        found["parts", name] = on(case[2], lambda _, case=case: one(case))
    for name, case in EXACT.items():
        found["parts", "exact", name] = on(case[2], lambda _, case=case: one(case, exact_reduce=True))
    found["parts", "rules"] = on(2, every_rule)
    found["parts", "first"] = on(4, lambda _: go_on(folder / "parts", "fsdp", stop=True))
    found["parts", "first, whole"] = on(2, lambda _: go_on(folder / "wholes", "ddp", stop=True))
    if rank == 0:
        for name in ("on 1", "on 2", "on 3"):
            shutil.copytree(folder / "parts", folder / f"parts {name}")
    dist.barrier()
    found["parts", "on 2"] = on(2, lambda _: go_on(folder / "parts on 2", "ddp", resume=True))
    found["parts", "on 3"] = on(3, lambda _: go_on(folder / "parts on 3", "fsdp", resume=True))
    found["parts", "on 4"] = on(4, lambda _: go_on(folder / "wholes", COPIES, resume=True))
    for micro in (8, 2):  # accumulation 1, and 4
        found["parts", "collectives", micro] = on(2, lambda _, micro=micro: collectives_a_step(micro))
    found["parts", "sizes"] = on(4, lambda _: sizes("fsdp"))
    found["parts", "model"] = on(2, lambda _: model_of_the_users())
    found["parts", "refused"] = on(2, lambda _: refusals())
    found["parts", "rewound"] = on(2, lambda _: not_finite())
