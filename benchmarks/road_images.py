"""Time to a test accuracy on small images: the shipped recipes against a plain competent loop, in the same run.

    python -m benchmarks.road_images                  Fashion-MNIST, all of the anchor's 8 epochs, three rounds
    python -m benchmarks.road_images --short          within 5 minutes: one round, the anchor until 90 %
    python -m benchmarks.road_images --cifar          CIFAR-10, a shortened form: a small net, 10,000 images
    python -m benchmarks.road_images --ablate         what each trick is worth: 5 seeds of a short run

Each arm is a process of its own; arms alternate. Two clocks are kept: ``seconds``, of training alone, and ``wall``, from the start
of the process, with imports, planning and evaluations. Accuracy is that of the test images, each seen once and as it is; both
sides are evaluated four times an epoch, twice in the short form.
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
RESULTS = Path(__file__).parent / "results" / "road_images.json"
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
        best_form=best_form,
        a_pass=a_pass,
    )


def run(*words: str) -> list[dict[str, Any]]:
    """The points of one arm, in a process of its own."""
    from benchmarks.shared_data import folder  # it imports torch, which an arm's own clock counts

    env = {**os.environ, "THALWEG_DATA": str(folder())}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.road_images", *words], env=env, stdout=subprocess.PIPE, check=True
    )
    points = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    print(f"  {words[1]:8} {points[-1]['accuracy']:.2%} after {points[-1]['seconds']:.1f} s", flush=True)
    return points


def reached(points: list[dict[str, Any]], target: float, clock: str) -> float | None:
    return next((point[clock] for point in points if point["accuracy"] >= target), None)


def side_by_side(task: str, rounds: int, short: bool, plain_only: bool = False) -> dict[str, Any]:
    most = 0.90 if short and task == "fashion_mnist" else 2.0
    changes = SMALL_CIFAR if task == "cifar10" else {}
    epochs, limit = ("8", "10000") if task == "cifar10" else ("8", "0")
    a_pass = "2" if short else "4"
    arms: dict[str, list[Any]] = {"ours": [], "plain": []} | ({} if short or plain_only else {"best form": []})
    for seed in range(rounds):
        arms["ours"].append(run("--arm", "ours", task, json.dumps(changes), str(seed), a_pass))
        for name in [name for name in arms if name != "ours"]:
            arms[name].append(run("--arm", name, task, epochs, str(seed), str(most), limit, a_pass))
    table: dict[str, Any] = {}
    for target in TARGETS[task]:
        for clock in ("seconds", "wall"):
            times = {name: [reached(points, target, clock) for points in several] for name, several in arms.items()}
            table[f"{target:.0%} {clock}"] = times
            told = {name: _middle(values) for name, values in times.items()}
            shares = {
                name: told["ours"] / value for name, value in told.items() if value and told["ours"] and name != "ours"
            }
            print(
                f"{target:.0%} {clock:8}",
                {n: v and round(v, 1) for n, v in told.items()},
                {n: f"{s:.2f}" for n, s in shares.items()},
            )
    return {"arms": arms, "table": table, "rows": rows_of(task, table)}


def rows_of(task: str, table: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands in the README's table: of each target that both reached, the share of the plain loop's time."""
    found = []
    for at, times in table.items():
        mine, plain = _middle(times["ours"]), _middle(times["plain"])
        if mine is None or plain is None or task != "fashion_mnist":
            continue
        target, _, clock = at.partition(" ")
        of = "training alone" if clock == "seconds" else "wall, from the start of the process"
        what = f"Fashion-MNIST, time to {target} of the test images over the plain loop's ({of}; rounds: {len(times['ours'])})"
        found.append({"what": what, "figure": f"{mine / plain:.2f} ({mine:.0f} of {plain:.0f} s)", "bar": "0.25"})
    return found


def _middle(values: list[float | None]) -> float | None:
    """The median; None where most runs did not reach it."""
    ordered = sorted(float("inf") if v is None else v for v in values)
    middle = ordered[len(ordered) // 2]
    return None if middle == float("inf") else middle


def ablate(seeds: list[int], names: list[str]) -> dict[str, Any]:
    """Accuracy and loss of short runs, one trick changed; kept run by run, so that it can go on."""
    from benchmarks.shared_data import folder
    from thalweg.core import Recipe
    from thalweg.recipes import find_task
    from thalweg.run.whole import train_task

    os.environ["THALWEG_DATA"] = str(folder())
    task = find_task("fashion_mnist")
    kept = _kept().get("ablation", {})
    for seed in seeds:
        for name in names:
            if str(seed) in kept.get(name, {}):
                continue
            changes = {**ARMS[name], "seed": seed, "train.steps": ABLATION_STEPS, "evaluate.every": 0}
            began = time.perf_counter()
            result = train_task(task, Recipe().override({**task.recipe, **changes}))
            cpu = round(sum(os.times()[:2]), 1)
            kept.setdefault(name, {})[str(seed)] = {**result.metrics, "seconds": result.records[-1].seconds, "cpu": cpu}
            print(f"  {seed} {name}: {result.metrics['accuracy']:.2%}, {time.perf_counter() - began:.1f} s", flush=True)
            _keep({"ablation": kept})
    return kept


def worth(kept: dict[str, Any]) -> list[str]:
    """Rows of the card: the difference to the recipe, paired by seed, with a 95 % interval of Student's t."""
    base, rows = kept["the recipe"], []
    for name, runs in kept.items():
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


def picture(task: str, arms: dict[str, list[Any]], targets: tuple[float, ...]) -> str:
    """Test accuracy against seconds of training, all runs, as one SVG."""
    left, top, wide, high = 46, 16, 560, 260
    points = [point for several in arms.values() for points in several for point in points]
    last, low = max(p["seconds"] for p in points), min(targets) - 0.06
    best = max(p["accuracy"] for p in points) + 0.005
    colours = {"ours": "#1f6feb", "plain": "#b54708", "best form": "#6b7280"}
    x = lambda p: left + wide * p["seconds"] / last
    y = lambda a: top + high * (best - max(a, low)) / (best - low)
    parts = [f'<rect width="{left + wide + 20}" height="{top + high + 50}" fill="#ffffff"/>']
    for target in targets:
        parts.append(
            f'<line x1="{left}" x2="{left + wide}" y1="{y(target):.1f}" y2="{y(target):.1f}" stroke="#d0d7de"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y(target) + 4:.1f}" text-anchor="end">{target:.0%}</text>')
    for tick in range(5):
        seconds = last * tick / 4
        parts.append(
            f'<text x="{left + wide * tick / 4:.0f}" y="{top + high + 18}" text-anchor="middle">{seconds:.0f} s</text>'
        )
    for at, (name, several) in enumerate(arms.items()):
        for run_points in several:
            line = " ".join(f"{x(p):.1f},{y(p['accuracy']):.1f}" for p in run_points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>')
        label = {
            "ours": f"thalweg train {task}",
            "plain": "plain loop",
            "best form": "plain loop, channels last, bf16",
        }[name]
        parts.append(f'<text x="{left + 8 + at * 190}" y="{top + high + 40}" fill="{colours[name]}">{label}</text>')
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#57606a"'
    title = f"<title>Test accuracy on {task} against seconds of training</title>"
    size = f'viewBox="0 0 {left + wide + 20} {top + high + 50}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{title}{"".join(parts)}</svg>\n'


def _kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def _keep(part: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**_kept(), **part}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    import torch

    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if words[:2] == ["--arm", "ours"]:
        return ours(words[2], json.loads(words[3]), int(words[4]), int(words[5]))
    if words[:1] == ["--arm"]:
        name, task, epochs, seed, most, limit, a_pass = words[1:]
        return anchor(task, float(epochs), int(seed), float(most), name == "best form", int(limit), int(a_pass))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--plain-only", action="store_true", help="without the plain loop's best form")
    parser.add_argument("--keep", action="store_true", help="write the result and the picture")
    given = parser.parse_args(words)
    if given.ablate:
        return print(*worth(ablate(given.seeds, list(ARMS))), sep="\n")
    task = "cifar10" if given.cifar else "fashion_mnist"
    found = side_by_side(task, given.rounds or (1 if given.short or given.cifar else 3), given.short, given.plain_only)
    if given.keep:
        rows = {"rows": found.pop("rows")} if task == "fashion_mnist" else {}
        _keep({task: {**found, "machine": machine(), "short": given.short}, **rows})
        PICTURES.joinpath(f"road_{task}.svg").write_text(picture(task, found["arms"], TARGETS[task]))


if __name__ == "__main__":
    main()
