"""What ranks do, for tests/test_ranks.py: one set of processes goes through all cases and leaves what it found in files."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import thalweg
import thalweg.run.whole
from tests import elastic_cases
from tests.conftest import join_ranks
from tests.models import batchnorm_net, mean_loss, mlp, points, ragged_text, small_gpt, text_loss
from thalweg.core import Event, Loss, Recipe, Split, Task, ThalwegError
from thalweg.data import Order
from thalweg.engine import Step
from thalweg.parallel import Joined
from thalweg.watch import Memory

STEPS = 6
BASE = {
    "precision": "fp32",
    "train.steps": STEPS,
    "train.clip": 0.5,
    "optimizer.lr": 0.01,
    "optimizer.weight_decay": 0.1,
    "optimizer.options.eps": 1e-6,  # a bias before BatchNorm has a gradient of rounding alone, and Adam divides it by this
    "schedule.lr": "warmup(2) >> cosine(to=0.1)",
    "regularize.average": 0.9,
    "checkpoint.every": 0,
    "evaluate.every": 3,
    "evaluate.batch": 8,
}


def gpt() -> nn.Module:
    return small_gpt(dropout=0.2).double()


def bn() -> nn.Module:
    return batchnorm_net(dropout=0.2).double()


def exact_points(num: int = 50, seed: int = 0) -> dict[str, Tensor]:
    return {**points(num, torch.float64, seed), "id": torch.arange(num)}


class Rows:
    """Samples one by one, some of them drawn from torch's generator."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.randn(6, dtype=torch.float64) + index / 50, "y": torch.tensor(index % 3)}


class Reading:
    """The same as a stream."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(50):
            yield {"x": torch.randn(6, dtype=torch.float64) + index / 50, "y": torch.tensor(index % 3)}


def soft_loss(model: nn.Module, batch: Any) -> Loss:
    return Loss(F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["x"]))


def shift(batch: Any, draw: Callable[[int], Tensor]) -> Any:
    return {**batch, "x": batch["x"] + draw(6)}


def text_task() -> Task:
    data = Split(train=ragged_text(50), test=ragged_text(20, seed=1))
    return Task(model=gpt, loss=text_loss, data=data, unit="tokens")


def bn_task(**more: Any) -> Task:
    data = Split(train=exact_points(), test=exact_points(20, seed=1), augment=shift)
    return Task(model=bn, loss=mean_loss, data=data, inputs="x", targets="y", classes=3, **more)


def task_on(train: Any) -> Callable[[], Task]:
    return lambda: Task(model=bn, loss=mean_loss, data=Split(train=train, test=exact_points(20, seed=1)))


def mixed_task() -> Task:
    return Task(model=bn, loss=soft_loss, data=exact_points(), inputs="x", targets="y", classes=3)


FOUR = {
    "train.batch": 16,
    "train.micro_batch": 4,
}  # 50 samples: the last window of an epoch has 2 of them, one micro-batch
#: name: (task, what differs from BASE, on how many ranks)
CASES: dict[str, tuple[Callable[[], Task], dict[str, Any], tuple[int, ...]]] = {
    "gpt, 4 micro-batches": (text_task, FOUR, (2, 3, 4)),
    "gpt, 16 micro-batches": (text_task, {"train.batch": 32, "train.micro_batch": 2}, (3,)),
    "batchnorm, 4 micro-batches": (bn_task, {**FOUR, "regularize.precise": 2}, (2, 3, 4)),
    "batchnorm, 16 micro-batches": (bn_task, {"train.batch": 32, "train.micro_batch": 2}, (3,)),
    "dropout by sample, SAM": (bn_task, {**FOUR, "regularize.by_sample": True, "regularize.sharpness": 0.05}, (3,)),
    "data set": (task_on(Rows()), FOUR, (3,)),
    "stream": (task_on(Reading()), FOUR, (3,)),
    "mixup": (mixed_task, {**FOUR, "regularize.mixup": 0.4}, (3,)),
    "shorter sequences": (text_task, {**FOUR, "schedule.sequence": "warmup(4, start=0.5)"}, (2,)),
    "window of weights": (
        text_task,
        {**FOUR, "regularize.average": 0, "regularize.average_form": "window", "regularize.average_start": "1",
         "regularize.average_every": "1", "regularize.average_window": 3},
        (2,),
    ),
}  # fmt: skip


def single_text_task() -> Task:
    """In float32, where another order of summation shows at once."""
    return replace(text_task(), model=lambda: small_gpt(dropout=0.2))


def single_bn_task() -> Task:
    train, test = ({**d, "x": d["x"].float()} for d in (exact_points(), exact_points(20, seed=1)))
    model = lambda: batchnorm_net(dropout=0.2)
    return Task(model=model, loss=mean_loss, data=Split(train=train, test=test, augment=shift))


IN_ORDER = {**FOUR, "exact_reduce": True}
#: The same, of runs that have the same bits; benchmarks/ranks.py has more of them on 1, 2, 3 and 4 ranks.
BITS: dict[str, tuple[Callable[[], Task], dict[str, Any], tuple[int, ...]]] = {
    "gpt": (single_text_task, IN_ORDER, (2, 3, 4)),
    "gpt, 16 micro-batches, muon": (
        single_text_task,
        {**IN_ORDER, "train.batch": 32, "train.micro_batch": 2, "optimizer.rule": "muon", "optimizer.options": {}},
        (3,),
    ),
    "batchnorm": (single_bn_task, {**IN_ORDER, "regularize.precise": 2}, (2, 4)),
    "batchnorm, SAM": (single_bn_task, {**IN_ORDER, "train.micro_batch": 2, "regularize.sharpness": 0.05}, (3,)),
}


class Events(Memory):
    """A sink that keeps what people are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def event(self, event: Event) -> None:
        self.told.append(event.text)


def train(
    task: Task, changes: dict[str, Any], folder: Path | None = None, resume: bool | int = False
) -> dict[str, Any]:
    """A run, and what is compared of it."""
    sink = Events()
    recipe = Recipe().override({**BASE, **changes})
    result = thalweg.run.train_task(task, recipe, folder=folder, resume=resume, sinks=[sink])
    weights = {name: t.clone() for name, t in result.model.state_dict().items()}
    return {
        "reason": result.reason.value,
        "losses": [r.loss for r in result.records],
        "weight": [r.weight for r in result.records],
        "norms": [r.grad_norm for r in result.records],
        "steps": [r.step for r in result.records],
        "metrics": [e.metrics for e in result.evaluations],
        "weights": weights,
        "digest": digest_of(weights),
        "told": sink.told,
        "heard": len(sink.records),
        "decisions": {d.path: d.value for d in result.plan.decisions},
    }


def digest_of(weights: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in weights.values():
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def case(name: str) -> dict[str, Any]:
    task, changes, _ = CASES[name]
    return train(task(), changes)


def bits(name: str, **more: Any) -> dict[str, Any]:
    task, changes, _ = BITS[name]
    return train(task(), {**changes, **more})


# --- samples, counted by the loss -------------------------------------------------------------------------------------

SEEN: list[tuple[int, int]] = []  # (step, sample) of what was trained on
EVALUATED: list[int] = []  # samples, once for each evaluation
_now: list[int] = []


@contextmanager
def recorded() -> Iterator[list[tuple[int, int]]]:
    """Inside, what the loss of ``counted_task`` sees in steps is noted; trials before step 1 are not."""
    plain = Step.run

    def run(self: Step, window: Any) -> Tensor:
        _now.append(self.state.step)
        try:
            return plain(self, window)
        finally:
            _now.clear()

    Step.run = run  # type: ignore[method-assign]
    SEEN.clear()
    EVALUATED.clear()
    try:
        yield SEEN
    finally:
        Step.run = plain  # type: ignore[method-assign]


def counted_task(at: Callable[[int], None] = lambda step: None) -> Task:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if _now and model.training:
            SEEN.extend((_now[0], int(i)) for i in batch["id"])
            at(_now[0])
        elif not model.training:
            EVALUATED.extend(batch["id"].tolist())
        return mean_loss(model, batch)

    data = Split(train=exact_points(), test=exact_points(20, seed=1))
    return Task(model=bn, loss=loss, data=data)


LONG = {**FOUR, "train.steps": 8}  # two epochs of 50 samples
STOP_IN = 2  # the step, from 0, in which one rank is asked to stop


def whole(folder: Path) -> dict[str, Any]:
    """A run that nobody stops."""
    with recorded():
        return {**train(counted_task(), LONG, folder), "evaluated": list(EVALUATED)}


def interrupted(ranks: Joined, folder: Path) -> dict[str, Any]:
    """Stopped by a signal that one rank gets."""

    def ask(step: int) -> None:
        if step == STOP_IN and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with recorded() as seen:
        found = train(counted_task(ask), LONG, folder)
        return {**found, "seen": list(seen)}


def resumed(folder: Path) -> dict[str, Any]:
    with recorded() as seen:
        return {**train(counted_task(), LONG, folder, resume=True), "seen": list(seen)}


# --- what is counted, and what goes wrong -----------------------------------------------------------------------------


@contextmanager
def collectives() -> Iterator[list[str]]:
    """The names of all collectives that are begun inside."""
    names = ["all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "barrier", "reduce"]
    names += ["gather", "scatter", "all_to_all_single"]
    names += [name for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)]  # of torch 2.13
    if "reduce_scatter_single" not in names:
        names += ["all_gather_into_tensor", "reduce_scatter_tensor"]
    kept = {name: getattr(dist, name) for name in names}
    made: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return kept[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, noted(name))
    try:
        yield made
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def collectives_a_step(micro_batch: int) -> dict[str, float]:
    """Of a run without evaluations, by name: eight more steps, counted."""
    counts = []
    for steps in (2, 10):
        with collectives() as made:
            task = Task(model=bn, loss=mean_loss, data=exact_points(64))
            train(task, {"train.batch": 16, "train.micro_batch": micro_batch, "train.steps": steps})
        counts.append(list(made))
    return {n: (counts[1].count(n) - counts[0].count(n)) / 8 for n in set(counts[1])}


def out_of_memory_on(rank: int, mine: int) -> dict[str, Any]:
    """Memory runs out on one rank, in the forward pass of whole micro-batches of its third step."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if mine == rank and _now == [2] and len(batch["x"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return mean_loss(model, batch)

    data = Split(train=exact_points(48), test=exact_points(20, seed=1))
    states: list[Any] = []
    plain = Step.__init__

    def noted(self: Step, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        states.append(self.state)

    Step.__init__ = noted  # type: ignore[method-assign]
    try:
        with recorded():
            found = train(Task(model=lambda: mlp().double(), loss=loss, data=data), FOUR)
    finally:
        Step.__init__ = plain  # type: ignore[method-assign]
    return {**found, "most": states[-1].limit.most}


def bad_samples(rank: int, *, forget: bool) -> dict[str, Any]:
    """One of rank 0's share and one of rank 1's; ``forget``: a guard that goes back, and memory that runs out on rank 1 later."""
    data, order = exact_points(48), Order(48, 8, seed=0, keep_last=True)
    bad = [int(order.window(1)[1][5]), int(order.window(3)[1][2])]  # of micro-batches of 2: number 2 and number 1
    data["x"][bad[:1] if forget else bad] = float("nan")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if forget and rank == 1 and _now == [2] and len(batch["x"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return mean_loss(model, batch)

    changes: dict[str, Any] = {"train.batch": 8, "train.micro_batch": 2}
    if forget:
        changes |= {"guard.nonfinite": "rewind", "guard.every": 4}
    with recorded():
        found = train(Task(model=lambda: mlp().double(), loss=loss, data=Split(train=data)), changes)
    return {**found, "bad": bad}


def other_weights(ranks: Joined) -> dict[str, Any]:
    """Rank 1 begins with weights of its own."""

    def model() -> nn.Module:
        torch.manual_seed(ranks.rank)
        return bn()

    return train(Task(model=model, loss=mean_loss, data=exact_points()), FOUR)


class Moving(nn.Module):
    """A forward pass that moves a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp().double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


class Renormed(nn.Module):
    """A forward pass that writes into a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.net = nn.Embedding(7, 6, max_norm=0.5, dtype=torch.float64), mlp().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.words((x[:, 0].abs() * 7).long() % 7))


class Asking(nn.Module):
    """A forward pass that asks which rank it is on."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net, self.rank = mlp().double(), rank

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + self.rank / 2)


def refusals(ranks: Joined) -> dict[str, str]:
    """The words of what is refused, by name."""
    plain, second = exact_points(), ranks.rank == 1
    asking = Task(model=lambda: Asking(ranks.rank), loss=mean_loss, data=plain)
    loop = {"precision": "fp32", "train.micro_batch": 4, "parallel": "fsdp"}
    sync = lambda: nn.Sequential(nn.Linear(6, 8), nn.SyncBatchNorm(8), nn.Linear(8, 3)).double()
    small = lambda: mlp().double()[:1] if second else mlp().double()
    tries: dict[str, Callable[[], Any]] = {
        "recipe": lambda: train(bn_task(), {**FOUR, "optimizer.lr": 0.02 if second else 0.01}),
        "too many": lambda: train(bn_task(), {"train.batch": 16, "train.micro_batch": 8}),
        "release": lambda: train(bn_task(), {**FOUR, "optimizer.release_gradients": "two-pass"}),
        "synced": lambda: train(Task(model=sync, loss=mean_loss, data=plain), FOUR),
        "moving": lambda: train(Task(model=Moving, loss=mean_loss, data=plain), FOUR),
        "renormed": lambda: train(Task(model=Renormed, loss=mean_loss, data=plain), {**FOUR, "parallel": "fsdp"}),
        "asking": lambda: train(asking, {**FOUR, "parallel": "fsdp"}),
        "loop": lambda: thalweg.TrainStep(mlp(), mean_loss, loop, steps=4, ranks=ranks),
        "data of one": lambda: train(Task(model=bn, loss=mean_loss, data={} if second else plain), FOUR),
        "model of one": lambda: train(Task(model=small, loss=mean_loss, data=plain), FOUR),
    }
    found = {}
    for name, act in tries.items():
        try:
            act()
        except ThalwegError as err:
            assert all((err.asked, err.numbers, err.remedy))
            found[name] = f"{type(err).__name__}: {err}"
        else:
            found[name] = "nothing"
    return found


def hung(ranks: Joined, folder: Path, seconds: float) -> dict[str, Any]:
    """One rank sleeps in a step for longer than the others wait."""

    def sleep(step: int) -> None:
        if step == 5 and ranks.rank == 1:
            time.sleep(seconds)

    began = time.monotonic()
    try:
        with recorded():
            train(counted_task(sleep), {**LONG, "checkpoint.every": 2}, folder)
    except ThalwegError as err:
        return {"words": f"{type(err).__name__}: {err}", "after": time.monotonic() - began}
    return {"words": "nothing"}


def go_through(rank: int, world: int, port: int, out: str) -> None:
    """All cases, in a process that is one of four."""
    from tests import parts_cases

    join_ranks(rank, world, port)
    folder = Path(out)
    groups = {num: dist.new_group(list(range(num))) for num in (2, 3, 4)}
    short = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    limited = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    for num in (2, 3, 2, 2):  # torch names a group by how many its members have
        if rank >= num:
            dist.new_group([rank], use_local_synchronization=True)
    found: dict[str, Any] = {}

    def on(num: int, act: Callable[[Joined], Any], group: Any = None) -> Any:
        if rank >= num:
            return None
        ranks = Joined(group or groups[num], 4.0 if group else 300.0)
        thalweg.run.whole.join = lambda: ranks  # type: ignore[assignment]
        return act(ranks)

    for name, (_, _, worlds) in CASES.items():
        for num in worlds:
            found[name, num] = on(num, lambda _, name=name: case(name))
    for name, (_, _, worlds) in BITS.items():
        for num in worlds:
            found["bits", name, num] = on(num, lambda _, name=name: bits(name))
    found["other bits"] = on(3, lambda _: bits("gpt", exact_reduce=False))
    found["whole"] = on(2, lambda _: whole(folder / "whole"))
    found["interrupted"] = on(2, lambda ranks: interrupted(ranks, folder / "stopped"))
    if rank == 0:
        for copy in ("on 1", "on 2", "on 3"):
            shutil.copytree(folder / "stopped", folder / copy)
    dist.barrier()
    for num in (2, 3):
        found[f"resumed on {num}"] = on(num, lambda _, num=num: resumed(folder / f"on {num}"))
    for micro in (8, 2):  # accumulation 1, and 4
        found["collectives", micro] = on(2, lambda _, micro=micro: collectives_a_step(micro))
    found["other weights"] = on(2, other_weights)
    found["auto"] = on(
        2, lambda _: train(bn_task(), {"train.batch": 16, "train.micro_batch": "auto", "precision": "auto"})
    )
    found["memory"] = on(2, lambda ranks: out_of_memory_on(1, ranks.rank))
    found["bad samples"] = on(2, lambda ranks: bad_samples(ranks.rank, forget=False))
    found["rewound"] = on(2, lambda ranks: bad_samples(ranks.rank, forget=True))
    found["refused"] = on(3, refusals)
    found["chosen"] = on(3, lambda _: train(bn_task(), {"train.batch": 24, "train.steps": 3}))
    found |= elastic_cases.cases(rank, on, folder)
    parts_cases.go_through(on, found, folder, rank)
    from tests import tensor_cases

    found["tensor"] = tensor_cases.go_through(rank, folder, on)
    found["waits inside"] = on(2, elastic_cases.waits_inside, limited)
    found["hung"] = on(2, lambda ranks: hung(ranks, folder / "hung", 9.0), short)
    torch.save(found, folder / f"rank {rank}")
    os._exit(0)  # the group of the hung run is broken: nobody waits for it
