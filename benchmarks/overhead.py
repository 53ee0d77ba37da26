"""What a run of ``thalweg.train`` costs beside its steps: records, progress bar, guard and checkpoints as they are by default.

1. Milliseconds a step of the tiny MLP over a hand-written loop that writes nothing (both in a process of their own, in turn).
2. Of a step of the CNN: the share of a run's time that goes to data, records, progress, guard and checkpoints together. It is
   what the run takes beyond its passes and updates, which are timed inside of it.
3. Peak memory (resident set) of those processes, against the hand-written loop's.

    python -m benchmarks.overhead [--rounds 7] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.keep import keep, summary

ROOT = Path(__file__).parent.parent
STEPS = {"mlp": 4000, "cnn": 60}
WARM = 0.25  # of the steps are not counted: allocator, caches, the first records


def run_by_hand(name: str) -> dict[str, float]:
    import torch

    from benchmarks.loop import WORKLOADS, by_hand

    work = WORKLOADS[name]
    torch.manual_seed(0)
    loop = by_hand(work.model(), work.data(), work)
    warm = int(STEPS[name] * WARM)
    for _ in range(warm):
        next(loop)
    start = time.perf_counter()
    for _ in range(STEPS[name] - warm):
        next(loop)
    return {"ms": 1000 * (time.perf_counter() - start) / (STEPS[name] - warm)}


def run_ours(name: str) -> dict[str, float]:
    import torch

    import thalweg
    from benchmarks.loop import CLIP, DECAY, LR, WORKLOADS
    from thalweg.engine.step import Step
    from thalweg.watch import Terminal

    work, inside, real = WORKLOADS[name], [0.0], Step.run
    warm, marks = int(STEPS[name] * WARM), []

    def timed(self: Step, window: Any) -> torch.Tensor:
        start = time.perf_counter()
        row = real(self, window)
        end = time.perf_counter()
        if self.state.step > warm:
            inside[0] += end - start
        elif self.state.step == warm:
            marks.append(end)
        last[0] = end
        return row

    last = [0.0]
    Step.run = timed  # type: ignore[method-assign]
    changes = {
        "precision": "fp32",
        "compile": "off",
        "train.steps": STEPS[name],
        "train.batch": work.batch,
        "train.clip": CLIP,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "schedule.lr": "cosine()",
        "checkpoint.every": STEPS[name] // 4,
    }
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = work.data()
        thalweg.train(
            work.model(), work.loss, data, changes, folder=Path(folder) / "run", sinks=[Terminal(verbose=False)]
        )
    num = STEPS[name] - warm
    whole = last[0] - marks[0]
    return {"ms": 1000 * whole / num, "beside": 1 - inside[0] / whole}


def one(kind: str, name: str) -> dict[str, float]:
    """What a process of its own says of itself."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--inside", kind, name]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, rounds: int) -> dict[str, Any]:
    pairs = []
    for turn in range(rounds):
        kinds = ("hand", "ours") if turn % 2 else ("ours", "hand")
        found = {kind: one(kind, name) for kind in kinds}
        pairs.append((found["hand"], found["ours"]))
    return {
        "workload": name,
        "by hand, ms": summary([hand["ms"] for hand, _ in pairs]),
        "over it, ms": summary([ours["ms"] - hand["ms"] for hand, ours in pairs]),
        "beside the steps": summary([ours["beside"] for _, ours in pairs]),
        "peak memory, ratio": summary([ours["peak"] / hand["peak"] for hand, ours in pairs]),
        "peak memory by hand, bytes": summary([hand["peak"] for hand, _ in pairs]),
    }


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What stands in the README's table."""
    found = []
    for row in rows:
        over, beside, peak = row["over it, ms"], row["beside the steps"], row["peak memory, ratio"]
        net = "CNN" if row["workload"] == "cnn" else "tiny MLP"
        if net == "CNN":
            share = f"{100 * beside['median']:.1f} % ({100 * beside['low']:.1f} to {100 * beside['high']:.1f})"
            what = "CNN: share of a run's time that data, records, progress, guard and checkpoints take together"
            found.append({"what": what, "figure": share, "bar": "3 %"})
        else:
            added = f"{over['median']:+.3f} ms ({over['low']:+.3f} to {over['high']:+.3f})"
            what = "tiny MLP: a step with records, progress, guard and checkpoints over the loop by hand, not compiled"
            found.append({"what": what, "figure": added, "bar": "+0.1 ms"})
        size = f"{peak['median']:.3f} ({peak['low']:.3f} to {peak['high']:.3f})"
        found.append(
            {"what": f"{net}: peak memory of the process over that of the loop by hand", "figure": size, "bar": "1.0"}
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="3 rounds")
    parser.add_argument("--only", default="mlp,cnn")
    parser.add_argument("--dry", action="store_true", help="keep no row")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.inside is not None:
        kind, name = asked.inside
        found = run_by_hand(name) if kind == "hand" else run_ours(name)
        print(json.dumps({**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    rounds = 3 if asked.short else asked.rounds
    rows = [measure(name, rounds) for name in asked.only.split(",")]
    for row in rows:
        over, beside, peak = row["over it, ms"], row["beside the steps"], row["peak memory, ratio"]
        print(
            f"{row['workload']}: by hand {row['by hand, ms']['median']:.3f} ms; over it {over['median']:+.3f} ms "
            f"[{over['low']:+.3f}, {over['high']:+.3f}]; beside the steps {100 * beside['median']:.1f} %; "
            f"peak memory {peak['median']:.3f} of the loop's; n={over['n']}"
        )
    if not asked.dry:
        print(
            keep(
                "overhead", [*rows, *lines(rows)], f"python -m benchmarks.overhead --rounds {rounds}", short=asked.short
            )
        )


if __name__ == "__main__":
    main()
