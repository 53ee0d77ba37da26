"""Time to a test accuracy on small images: the shipped recipes against a plain competent loop, in the same run.

    python -m benchmarks.road_images [--rounds 3]     Fashion-MNIST, all of the anchor's 8 epochs
    python -m benchmarks.road_images --short          within 3 minutes: one round, the anchor until 90 %
    python -m benchmarks.road_images --cifar          CIFAR-10 made small for a CPU: a small net, 10,000 images, one round
    python -m benchmarks.road_images --ablate         what each trick is worth: 5 seeds of a short run

Each arm is a process of its own; arms alternate. Two clocks are kept: ``seconds``, of training alone, and ``wall``, from the start
of the process, with imports, planning and evaluations. Accuracy is that of the test images, each seen once and as it is; both
sides are evaluated four times an epoch, twice in the short form and on CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
OURS, PLAIN, BEST = "thalweg", "plain loop", "plain loop, channels last, bf16"
TITLES, NAMES = (
    {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10, 10,000 images"},
    {"fashion_mnist": "road_images", "cifar10": "road_cifar"},
)
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
TARGETS = {"fashion_mnist": (0.90, 0.92, 0.93), "cifar10": (0.50, 0.60, 0.65)}
CHANNEL = {"fashion_mnist": ((0.2860,), (0.3530,)), "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}
#: The shortened form of CIFAR-10: what differs from the task's own recipe, which is meant for a GPU.
SMALL_CIFAR = {
    "precision": "bf16",
    "data.options": {"limit": 10_000},
    "model": {"widths": [64, 128], "patch": 4, "stem": 64, "pooled": True},
    "train.epochs": 4.0,
    "train.batch": 250,
    "evaluate.batch": 500,
}
#: One trick less than the recipe, or another in its place; the budget is that of ABLATION_STEPS steps for all.
ABLATION_STEPS = 60
ARMS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "no whitening: a stem that is trained": {"initialise.whiten": []},
    "whitened, and trained on": {"initialise.whiten_freeze": False},
    "AdamW at 0.01 for all": {
        "optimizer.rule": "adamw",
        "optimizer.lr": 0.01,
        "optimizer.options": {},
        "optimizer.otherwise_lr": None,
    },
    "no warm-up": {"schedule.lr": "linear()"},
    "a constant rate after warm-up": {"schedule.lr": "warmup(10%) >> hold()"},
    "no label smoothing": {"loss": {"label_smoothing": 0.0}},
    "smaller images first": {"schedule.image_size": "constant(40%, value=0.72) >> constant(value=1)"},
    "weight average, no decay of the rate": {"schedule.lr": "warmup(10%) >> hold()", "regularize.average": 0.9},
    "flips": {"regularize.augment": ["flip"]},
    "crops by 2 and flips": {"regularize.augment": ["crop(2)", "flip"]},
}


class Clock:
    """A sink that tells the time of training apart from that of evaluations."""

    def __init__(self, most: float) -> None:
        self.most, self.paused = most, 0.0

    def start(self, plan: Any, step: int) -> None:
        self.began = self.last = time.perf_counter()

    def steps(self, records: Any) -> None:
        self.last = time.perf_counter()  # what is pending is flushed right before an evaluation

    def evaluation(self, evaluation: Any) -> None:
        now = time.perf_counter()
        seconds = self.last - self.began - self.paused
        self.paused += now - self.last
        tell({"step": evaluation.step, "seconds": seconds, "accuracy": evaluation.metrics["accuracy"]}, self.most)

    def event(self, event: Any) -> None: ...

    def stop(self, reason: Any) -> None: ...


def tell(point: dict[str, Any], most: float) -> bool:
    print(json.dumps({**point, "wall": time.perf_counter() - BEGAN}), flush=True)
    return bool(point["accuracy"] >= most)


def ours(task: str, changes: dict[str, Any], seed: int, a_pass: int) -> None:
    from thalweg.core import Recipe
    from thalweg.recipes import find_task
    from thalweg.run.whole import train_task

    found = find_task(task)
    recipe = Recipe().override({**found.recipe, **changes, "seed": seed})
    samples = recipe.data.options.get("limit") or {"fashion_mnist": 60_000, "cifar10": 50_000}[task]
    recipe = recipe.override({"evaluate.every": max(1, samples // recipe.train.batch // a_pass)})
    train_task(found, recipe, sinks=[Clock(2.0)])


def anchor(task: str, epochs: float, seed: int, most: float, best_form: bool, limit: int, a_pass: int) -> None:
    import torch

    from benchmarks.road_images_anchor import train
    from thalweg.recipes import find_task

    split = find_task(task).data(limit=limit)
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in CHANNEL[task])
    train(
        {"train": split.train, "test": split.test},
        mean,
        deviation,
        epochs=epochs,
        seed=seed,
        heard=lambda point: tell(point, most),
        augment=task == "cifar10",
        best_form=best_form,
        a_pass=a_pass,
    )


def run(*words: str) -> list[dict[str, Any]]:
    """The points of one arm, in a process of its own."""
    from benchmarks.shared_data import folder  # it imports torch, which an arm's own clock counts

    env = {**os.environ, "THALWEG_DATA": str(folder())}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.road_images", "--arm", *words], env=env, stdout=subprocess.PIPE, check=True
    )
    points = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    print(f"  {words[0]:32} {points[-1]['accuracy']:.2%} after {points[-1]['seconds']:.1f} s", flush=True)
    return points


def reached(points: list[dict[str, Any]], target: float, clock: str) -> float | None:
    return next((point[clock] for point in points if point["accuracy"] >= target), None)


def side_by_side(task: str, rounds: int, short: bool, plain_only: bool = False) -> list[dict[str, Any]]:
    """A row a run, then the lines of the table."""
    most = 0.90 if short and task == "fashion_mnist" else 2.0
    changes = SMALL_CIFAR if task == "cifar10" else {}
    epochs, limit = ("8", "10000") if task == "cifar10" else ("8", "0")
    a_pass = "2" if short or task == "cifar10" else "4"
    theirs = [PLAIN] if short or plain_only else [PLAIN, BEST]
    rows = []
    for seed in range(rounds):
        found = {OURS: run(OURS, task, json.dumps(changes), str(seed), a_pass)}
        for name in theirs:
            found[name] = run(name, task, epochs, str(seed), str(most), limit, a_pass)
        rows += [{"task": task, "arm": name, "seed": seed, "points": points} for name, points in found.items()]
    return rows + lines(rows)


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each target that both reached: the share of the plain loop's time, by both clocks."""
    arms: dict[str, list[Any]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row["points"])
    task, found = rows[0]["task"], []
    for target in TARGETS[task]:
        for clock, of in (("seconds", "training alone"), ("wall", "wall, from the start of the process")):
            times = {name: _middle([reached(points, target, clock) for points in runs]) for name, runs in arms.items()}
            print(f"{target:.0%} {clock:8}", {name: time and round(time, 1) for name, time in times.items()})
            mine, plain = times[OURS], times[PLAIN]
            if mine is None or plain is None:
                continue
            rounds = f"rounds: {len(arms[OURS])}"
            what = f"{TITLES[task]}, time to {target:.0%} of the test images over the plain loop's ({of}; {rounds})"
            figure = f"{mine / plain:.2f} ({mine:.0f} of {plain:.0f} s)"
            found.append({"what": what, "figure": figure, "bar": "0.25" if task == "fashion_mnist" else None})
    return found


def _middle(values: list[float | None]) -> float | None:
    """The median; None where most runs did not reach it."""
    ordered = sorted(float("inf") if v is None else v for v in values)
    middle = ordered[len(ordered) // 2]
    return None if middle == float("inf") else middle


def ablate(seeds: list[int], names: list[str]) -> dict[str, Any]:
    """Accuracy and loss of short runs, one trick changed; kept run by run, so that it can go on."""
    from benchmarks.keep import keep, rows_of
    from benchmarks.shared_data import folder
    from thalweg.core import Recipe
    from thalweg.recipes import find_task
    from thalweg.run.whole import train_task

    os.environ["THALWEG_DATA"] = str(folder())
    task = find_task("fashion_mnist")
    found = {row["arm"]: row["runs"] for row in rows_of("road_images_ablation")}
    for seed in seeds:
        for name in names:
            if str(seed) in found.get(name, {}):
                continue
            changes = {**ARMS[name], "seed": seed, "train.steps": ABLATION_STEPS, "evaluate.every": 0}
            began = time.perf_counter()
            result = train_task(task, Recipe().override({**task.recipe, **changes}))
            cpu = round(sum(os.times()[:2]), 1)
            found.setdefault(name, {})[str(seed)] = {
                **result.metrics,
                "seconds": result.records[-1].seconds,
                "cpu": cpu,
            }
            print(f"  {seed} {name}: {result.metrics['accuracy']:.2%}, {time.perf_counter() - began:.1f} s", flush=True)
            rows = [{"arm": arm, "steps": ABLATION_STEPS, "runs": runs} for arm, runs in found.items()]
            keep("road_images_ablation", rows, "python -m benchmarks.road_images --ablate")
    return found


def worth(found: dict[str, Any]) -> list[str]:
    """Rows of the card: the difference to the recipe, paired by seed, with a 95 % interval of Student's t."""
    base, rows = found["the recipe"], []
    for name, runs in found.items():
        shared = sorted(base.keys() & runs.keys())
        mean = statistics.mean(runs[s]["accuracy"] for s in shared)
        pairs = [100 * (runs[s]["accuracy"] - base[s]["accuracy"]) for s in shared]
        half = _T[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        told = (
            ""
            if name == "the recipe"
            else f"{statistics.mean(pairs):+.2f} [{statistics.mean(pairs) - half:+.2f}, {statistics.mean(pairs) + half:+.2f}]"
        )
        loss = statistics.mean(runs[s]["loss"] for s in shared)
        seconds = statistics.median(runs[s]["seconds"] / base[s]["seconds"] for s in shared)
        rows.append(f"| {name} | {mean:.2%} | {told} | {loss:.3f} | {seconds:.2f} | {len(shared)} |")
    return rows


_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


def picture(tree: dict[str, Any]) -> str:
    """Test accuracy against seconds of training, all runs."""
    from benchmarks.draw import curves
    from benchmarks.keep import where

    runs = [row for row in tree["rows"] if "arm" in row]
    task = runs[0]["task"]
    least = min(TARGETS[task]) - 0.06
    drawn = [
        (row["arm"], [(p["seconds"], 100 * p["accuracy"]) for p in row["points"] if p["accuracy"] >= least])
        for row in runs
    ]
    title, targets = f"{task}: accuracy in percent, test", [100 * target for target in TARGETS[task]]
    return curves(title, "over seconds of training", drawn, targets=targets, note=where(tree))


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if words[:2] == ["--arm", OURS]:
        return ours(words[2], json.loads(words[3]), int(words[4]), int(words[5]))
    if words[:1] == ["--arm"]:
        name, task, epochs, seed, most, limit, a_pass = words[1:]
        return anchor(task, float(epochs), int(seed), float(most), name == BEST, int(limit), int(a_pass))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--plain-only", action="store_true", help="without the plain loop's best form")
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    given = parser.parse_args(words)
    if given.ablate:
        return print(*worth(ablate(given.seeds, list(ARMS))), sep="\n")
    task = "cifar10" if given.cifar else "fashion_mnist"
    rounds = given.rounds or (1 if given.short or given.cifar else 3)
    rows = side_by_side(task, rounds, given.short, given.plain_only)
    if not given.dry:
        from benchmarks.keep import keep, shown

        told = " ".join(["python -m benchmarks.road_images", *words])
        print(keep(NAMES[task], rows, told, short=given.short))
        PICTURES.joinpath(f"road_{task}.svg").write_text(picture(shown(NAMES[task])))


if __name__ == "__main__":
    main()
