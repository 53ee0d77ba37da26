"""What two ranks lose against one, each on a core of its own; and what ``exact_reduce`` costs.

pycode with 10.7 million parameters, float32, AdamW, an average, clipping: 16 windows of 128 bytes a step. One rank on one core
against two gloo ranks on two cores, the same batch; scaling loss = 1 - (time of one) / (2 x time of two). Runs go in turn;
each gives the median of its steps, and pairs that followed one another are compared.

    python -m benchmarks.scaling [--pairs 5] [--steps 9]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from typing import Any

from benchmarks.keep import keep, summary

MODEL = {"model.width": 384, "model.heads": 6, "model.layers": 6}
#: name: (ranks, what differs)
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank, micro-batch 8": (1, {"train.micro_batch": 8}),
    "2 ranks, micro-batch 8": (2, {"train.micro_batch": 8}),
    "1 rank, micro-batch 2": (1, {"train.micro_batch": 2}),
    "2 ranks, micro-batch 2": (2, {"train.micro_batch": 2}),
    "1 rank, micro-batch 8, exact": (1, {"train.micro_batch": 8, "exact_reduce": True}),
    "2 ranks, micro-batch 8, exact": (2, {"train.micro_batch": 8, "exact_reduce": True}),
    "2 ranks, micro-batch 2, exact": (2, {"train.micro_batch": 2, "exact_reduce": True}),
}


def work(changes: dict[str, Any], steps: int) -> None:
    """One rank's process: it trains on its core, and the first one prints the seconds of each step."""
    cores = sorted(os.sched_getaffinity(0))
    rank = int(os.environ.get("RANK", "0"))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch

    torch.set_num_threads(1)
    from thalweg.core import Recipe
    from thalweg.recipes import find_task, recipe_for
    from thalweg.run import train_task

    task = find_task("pycode")
    fixed = {"precision": "fp32", "train.steps": steps, "evaluate.every": 0, "checkpoint.every": 0}
    task.recipe.pop("train.micro_batch", None)
    recipe: Recipe = recipe_for(task).override({**MODEL, **fixed, **changes})
    result = train_task(task, recipe, sinks=[])
    if rank == 0:
        times = [record.seconds for record in result.records]
        print(json.dumps([b - a for a, b in pairwise(times)][1:]))


def timed(arm: str, steps: int) -> float:
    """Median seconds of a step."""
    ranks, changes = ARMS[arm]
    mine = ["-m", "benchmarks.scaling", "--work", json.dumps(changes), "--steps", str(steps)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), *mine]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return statistics.median(json.loads(done.stdout.strip().splitlines()[-1]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--work")
    given = parser.parse_args(arguments)
    if given.work:
        return work(json.loads(given.work), given.steps)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(given.pairs):
        for arm in list(ARMS) if turn % 2 else list(ARMS)[::-1]:
            times[arm].append(timed(arm, given.steps))
            print(f"{arm:32} {times[arm][-1]:.3f} s", flush=True)
    rows: list[dict[str, Any]] = [{"arm": arm, "seconds a step": summary(found)} for arm, found in times.items()]
    for micro in (8, 2):
        one, two = times[f"1 rank, micro-batch {micro}"], times[f"2 ranks, micro-batch {micro}"]
        rows.append({f"scaling loss, micro-batch {micro}": summary([1 - a / (2 * b) for a, b in zip(one, two)])})
    for arm in (name for name in ARMS if name.endswith(", exact")):
        plain = times[arm.removesuffix(", exact")]
        rows.append({f"price of exact_reduce, {arm}": summary([a / b - 1 for a, b in zip(times[arm], plain)])})
    for row in rows:
        print(row)
    print(keep("scaling", rows, "python -m benchmarks.scaling"))


if __name__ == "__main__":
    main()
