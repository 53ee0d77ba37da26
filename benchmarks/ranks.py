"""Any number of ranks, in any form, is the same run; and what a rank holds where parameters lie in parts.

Fifty steps in float64 of pycode (a small model) and of a net with batch normalization, in windows of 4 and of 16 micro-batches (on
4 ranks: accumulation 1 and 4), on 1, 2, 3 and 4 gloo ranks, whole ("ddp") and in parts ("fsdp"): the largest gap of any loss and
any weight to the run of one rank. With ``exact_reduce``: whether all bits are equal. Then GPT 50 M in float32 with AdamW: bytes of
a rank of 4 in parts against those of one process, by its live tensors and by its memory, between two steps.

    python -m benchmarks.ranks [--steps 50] [--only table|memory]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import math
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.keep import keep, rows_of

WORLD = 4
FORMS = ("ddp", "fsdp")
BASE = {
    "precision": "fp32",
    "train.clip": 1.0,
    "optimizer.options.eps": 1e-6,  # a bias before BatchNorm has a gradient of rounding alone, and Adam divides it by this
    "schedule.lr": "warmup(5) >> cosine(to=0.1)",
    "regularize.average": 0.9,
    "evaluate.every": 0,
}
MODELS = ("pycode", "batchnorm")
WINDOWS = (4, 16)  # micro-batches


def net() -> nn.Module:
    """Convolutions and batch normalization on images of 8 x 8."""
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 10)).double()


def task_of(name: str) -> tuple[Any, dict[str, Any]]:
    """A task in float64, and what its recipe says."""
    from thalweg.core import Split, Task
    from thalweg.recipes import pycode

    if name == "pycode":
        split = pycode.data(context=32, limit_bytes=1 << 18)
        model = lambda: pycode.model(width=32, heads=2, layers=2, context=32).double()
        return Task(model=model, loss=pycode.loss, data=Split(train=split.train), unit="tokens"), {"optimizer.lr": 4e-3}
    draw = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(500, 1, 8, 8, generator=draw, dtype=torch.float64)}
    data["y"] = (data["x"].flatten(1)[:, :10]).argmax(1)
    loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])
    return Task(model=net, loss=loss, data=Split(train=data)), {"optimizer.lr": 1e-2}


def run(name: str, micro_batches: int, parallel: str, steps: int, *, exact: bool = False) -> dict[str, Any]:
    from thalweg.core import Recipe
    from thalweg.run import train_task

    task, changes = task_of(name)
    size = {"train.micro_batch": 4, "train.batch": 4 * micro_batches, "train.steps": steps, "parallel": parallel}
    result = train_task(task, Recipe().override({**BASE, **changes, **size, "exact_reduce": exact}))
    return {
        "losses": [record.loss for record in result.records],
        "weights": {n: t.clone() for n, t in result.model.state_dict().items()},
    }


def join(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def table(rank: int, port: int, steps: int, out: str) -> None:
    """One of four processes: all arms that it has a part in; the first one keeps what it found."""
    import thalweg.run.whole as whole
    from thalweg.parallel import Joined

    join(rank, WORLD, port)
    found = {}
    for num in range(2, WORLD + 1):
        group = dist.new_group(list(range(num)))
        if rank >= num:
            continue
        ranks = Joined(group)
        whole.join = lambda ranks=ranks: ranks  # type: ignore[misc, assignment]
        for name in MODELS:
            for window in WINDOWS:
                for form in FORMS:
                    for exact in (False, True):
                        found[name, window, num, form, exact] = run(name, window, form, steps, exact=exact)
                        if rank == 0:
                            print(name, window, num, form, exact, flush=True)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()


def gaps(mine: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, float]:
    loss = max(abs(a - b) for a, b in zip(mine["losses"], wanted["losses"], strict=True))
    weights = max(float((t - wanted["weights"][n]).abs().max()) for n, t in mine["weights"].items())
    return loss, weights


def equal(mine: dict[str, Any], wanted: dict[str, Any]) -> bool:
    same = all(torch.equal(t, wanted["weights"][n]) for n, t in mine["weights"].items())
    return bool(mine["losses"] == wanted["losses"] and same)


def rows_of_table(steps: int) -> list[dict[str, Any]]:
    alone = {(n, w, e): run(n, w, "ddp", steps, exact=e) for n in MODELS for w in WINDOWS for e in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "found")
        mp.spawn(table, (free_port(), steps, out), nprocs=WORLD)
        found = torch.load(out)
    rows = []
    for (name, window, num, form, exact), mine in found.items():
        wanted = alone[name, window, exact]
        row = {"model": name, "micro-batches": window, "ranks": num, "parallel": form, "steps": steps}
        if exact:
            rows.append({**row, "exact_reduce": True, "same bits": equal(mine, wanted)})
        else:
            loss, weights = gaps(mine, wanted)
            rows.append({**row, "gap of losses": loss, "gap of weights": weights})
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of memory that this process has for itself, after what is free has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


def live() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor):
            local = getattr(one, "_local_tensor", one)
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def held(rank: int, world: int, port: int, out: str) -> None:
    """A process that trains GPT 50 M for two steps, and what it holds then."""
    from thalweg.core import Recipe, Split, Task
    from thalweg.engine import build, resolve
    from thalweg.parallel import join as joined
    from thalweg.recipes.models.gpt import GPT
    from thalweg.regularize import cross_entropy

    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    if world > 1:
        join(rank, world, port)
    torch.set_num_threads(1)
    ranks = joined()
    draw = torch.Generator().manual_seed(0)
    data = {"tokens": torch.randint(0, 256, (8, 33), generator=draw)}
    loss = lambda model, batch: cross_entropy(model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:])
    model = lambda: GPT(vocab=256, context=32, width=640, heads=8, layers=10)
    changes = {"train.batch": 4, "train.micro_batch": 1, "train.steps": 10, "optimizer.lr": 1e-4, "parallel": "fsdp"}
    importlib.import_module("torch.distributed.fsdp")  # what code takes is not the run's

    F.gelu(torch.randn(64, 64) @ torch.randn(64, 64)).sum()
    before = anonymous()
    task = Task(model=model, loss=loss, data=Split(train=data))
    resolved = resolve(task, Recipe().override({**BASE, "regularize.average": 0, **changes}), ranks=ranks)
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy, ranks)
    parameters = sum(math.prod(row.shape) for row in resolved.plan.parameters)
    for window in resolved.feed.windows(0, 2):
        step.run(window)
    sizes = step.state.nbytes()
    state = sum(sizes.get(name, 0) for name in ("parameters", "gradients", "slots"))
    found = {"parameters": parameters, "state": state, "live": live(), "process": anonymous() - before}
    torch.save(found, f"{out} {rank}")
    ranks.wait()


def rows_of_memory() -> list[dict[str, Any]]:
    """With the C library's memory as it is, and with blocks of 64 KiB and more given back to the system when they are freed."""
    rows = _rows_of_memory("the C library's own")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    return rows + _rows_of_memory("freed blocks of 64 KiB given back")


def _rows_of_memory(allocator: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "held")
        mp.spawn(held, (1, free_port(), out), nprocs=1)
        one = torch.load(f"{out} 0")
        mp.spawn(held, (WORLD, free_port(), out), nprocs=WORLD)
        many = [torch.load(f"{out} {rank}") for rank in range(WORLD)]
    rows = []
    for rank, mine in enumerate(many):
        row = {"model": "GPT", "parameters": mine["parameters"], "ranks": WORLD, "parallel": "fsdp", "rank": rank}
        row["allocator"] = allocator
        for what in ("state", "live", "process"):
            row |= {f"{what}, bytes": mine[what], f"{what}, of one": round(mine[what] / one[what], 4)}
        rows.append(row)
    return rows


def kept(*, of_memory: bool) -> list[dict[str, Any]]:
    """The rows of the part that is not measured again."""
    return [row for row in rows_of("ranks") if ("allocator" in row) is of_memory]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", choices=("table", "memory"))
    given = parser.parse_args(arguments)
    rows = rows_of_table(given.steps) if given.only != "memory" else kept(of_memory=False)
    rows += rows_of_memory() if given.only != "table" else kept(of_memory=True)
    for row in rows:
        print(row)
    print(keep("ranks", rows, "python -m benchmarks.ranks"))


if __name__ == "__main__":
    main()
