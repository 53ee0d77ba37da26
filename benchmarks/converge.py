"""How far every rule gets: small problems with known difficulties, and short runs of the embedded tasks.

Each rule runs at its published rate, and over a sweep of rates around it; figures are medians, smallest and largest of five
seeds. They say what a rule does on small problems in few steps. They do not rank rules for long runs of large models: for that
docs/choose-an-optimizer.md cites those who have measured it.

    python -m benchmarks.converge [--only small digits pycode] [--seeds 5]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import thalweg
from benchmarks.keep import keep
from thalweg.optim import face_of
from thalweg.rules import RULES

FACTORS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
STEPS = 400
Problem = Callable[[int], tuple[list[torch.nn.Parameter], Callable[[], Tensor]]]


def quadratic(seed: int) -> Any:
    """64 dimensions, curvatures from 1 to 10^4, in a random rotation."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=draw))[0]
    curvature = torch.logspace(0, 4, 64)
    p = torch.nn.Parameter(torch.randn(8, 8, generator=draw))
    return [p], lambda: 0.5 * (curvature * (basis @ p.flatten()).square()).sum()


def rosenbrock(seed: int) -> Any:
    """The valley of Rosenbrock in 16 dimensions, from near its usual start."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.tensor([-1.2, 1.0]).repeat(8) + 0.1 * torch.randn(16, generator=draw)
    p = torch.nn.Parameter(start.view(4, 4))

    def loss() -> Tensor:
        x = p.flatten()
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    return [p], loss


def deep_linear(seed: int) -> Any:
    """Four linear layers whose gradients differ by 10^6: each is seen through a factor of 10^-3 to 10^3."""
    draw = torch.Generator().manual_seed(seed)
    factors = (1e-3, 1e3, 1e-2, 1e2)
    layers = [torch.nn.Parameter(torch.randn(12, 12, generator=draw) / 12**0.5 / f) for f in factors]
    x, target = torch.randn(12, 64, generator=draw), torch.randn(12, 12, generator=draw) / 12**0.5

    def loss() -> Tensor:
        y = x
        for layer, factor in zip(layers, factors):
            y = factor * layer @ y
        return (y - target @ x).square().mean()

    return layers, loss


PROBLEMS: dict[str, Problem] = {"quadratic": quadratic, "rosenbrock": rosenbrock, "deep linear": deep_linear}


def descend(problem: Problem, rule: str, factor: float, seed: int) -> float:
    """log10 of the last loss over the first, the rate falling by a cosine; inf where it blew up."""
    params, loss = problem(seed)
    optimizer = face_of(rule)(params, lr=RULES[rule].lr * factor, way="eager")
    schedule = thalweg.optim.scheduler(optimizer, "cosine(to=0.01)", STEPS)
    first = float(loss().detach())
    for _ in range(STEPS):
        optimizer.zero_grad()
        now = loss()
        now.backward()
        optimizer.step()
        schedule.step()
    with optimizer.averaged() if _ships_others(rule) else torch.no_grad():
        last = float(loss().detach())
    return math.log10(max(last, 1e-30) / first) if math.isfinite(last) else math.inf


def _ships_others(rule: str) -> bool:
    return RULES[rule].then is not None


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def rules() -> list[str]:
    return [name for name in RULES if "curvature" not in RULES[name].needs]


def small(seeds: int, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for title, problem in PROBLEMS.items():
        for rule in names or rules():
            tried = {f: [descend(problem, rule, f, s) for s in range(seeds)] for f in FACTORS}
            best = min(tried, key=lambda f: statistics.median(tried[f]))
            rows.append(
                {
                    "problem": title,
                    "rule": rule,
                    "seeds": seeds,
                    "steps": STEPS,
                    "log10 of loss, published rate": spread(tried[1.0]),
                    "best factor": best,
                    "log10 of loss, best rate": spread(tried[best]),
                    "sweep": {str(f): spread(v) for f, v in tried.items()},
                }
            )
            at, top = spread(tried[1.0]), spread(tried[best])
            print(
                f"{title:12} {rule:22} published {at['median']:7.2f}   best {top['median']:7.2f} at x{best}", flush=True
            )
    return rows


def _run(task: str, rule: str, lr: float, seed: int, changes: dict[str, Any]) -> float:
    from thalweg.recipes import find_task, recipe_for
    from thalweg.run import train_task

    found = find_task(task)
    recipe = recipe_for(found).override(
        {
            "seed": seed,
            "optimizer.rule": rule,
            "optimizer.lr": lr,
            "optimizer.otherwise_lr": 1e-3 * lr / RULES[rule].lr,
            "precision": "fp32",
            "evaluate.every": 0,
            **changes,
        }
    )
    if rule != "adamw":
        tree = recipe.to_dict()
        tree["optimizer"]["options"] = {}
        recipe = thalweg.Recipe.from_dict(tree)
    result = train_task(found, recipe, folder=None, sinks=[])
    return result.metrics["loss"] if result.reason.name == "FINISHED" else math.inf


def on_task(task: str, names: list[str], seeds: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The held-out loss at the published rate, and at the best of five rates, which the first seed chooses."""
    rows = []
    for rule in names:
        start = time.perf_counter()
        published = [_run(task, rule, RULES[rule].lr, seed, changes) for seed in range(seeds)]
        tried = {f: _run(task, rule, RULES[rule].lr * f, 0, changes) for f in (0.1, 0.3, 3.0, 10.0)}
        tried[1.0] = published[0]
        best = min(tried, key=lambda f: tried[f])
        again = (
            published if best == 1.0 else [_run(task, rule, RULES[rule].lr * best, s, changes) for s in range(seeds)]
        )
        rows.append(
            {
                "problem": task,
                "rule": rule,
                "seeds": seeds,
                "changes": changes,
                "held-out loss, published rate": spread(published),
                "best factor": best,
                "held-out loss, best rate": spread(again),
                "sweep, seed 0": {str(f): v for f, v in tried.items()},
            }
        )
        took = time.perf_counter() - start
        print(
            f"{task:8} {rule:22} published {spread(published)['median']:.4f}"
            f"   best {spread(again)['median']:.4f} at x{best}   ({took:.0f} s)",
            flush=True,
        )
    return rows


def digits(seeds: int, names: list[str]) -> list[dict[str, Any]]:
    return on_task("digits", names or rules(), seeds, {"train.epochs": 4.0, "train.steps": None})


def pycode(seeds: int, names: list[str]) -> list[dict[str, Any]]:
    usual = ["adamw", "lion", "muon", "soap", "ademamix", "adafactor", "schedule_free_adamw", "prodigy", "sgd"]
    return on_task("pycode", names or usual, seeds, {"train.steps": 60})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["small", "digits", "pycode"], choices=["small", "digits", "pycode"]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rules", nargs="+", default=[], help="these alone")
    parser.add_argument("--keep", default="converge")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows = []
    for name in asked.only:
        rows += globals()[name](asked.seeds, asked.rules)
    print(f"kept in {keep(asked.keep, rows, ' '.join(['python -m benchmarks.converge', *arguments]))}")


if __name__ == "__main__":
    main(sys.argv[1:])
