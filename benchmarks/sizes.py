"""What a step costs over the hand-written one, against size: parameters, batch, number of tensors, samples.

Both loops train the same net on the same kind of batches, in turns, without compiling, in fp32. The hand-written loop draws its
batch at random, because an order over 10^8 samples would cost it more than the step. Beside the difference stands the time that
thalweg spends in Python itself, by the profiler, which adds its own: it is there for its course, not for its height.

    python -m benchmarks.sizes [--short] [--only samples]
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.draw import Line, Panel, panels
from benchmarks.keep import keep, summary
from thalweg.core import Recipe, Split, Task
from thalweg.engine import Loop, build, resolve
from thalweg.recipes.models.gpt import GPT
from thalweg.watch import Memory

PICTURE = Path(__file__).resolve().parent.parent / "docs/pictures/sizes.svg"
LR, DECAY, CLIP, STEPS, VOCAB, CONTEXT = 1e-3, 0.01, 1.0, 1_000_000, 96, 16


class Rows:
    """So many samples, of which 1,024 lie in memory: only the order knows how many there are."""

    def __init__(self, num: int, x: Tensor, y: Tensor) -> None:
        self.num, self.x, self.y = num, x, y

    def __len__(self) -> int:
        return self.num

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        inside = indices % len(self.y)
        return {"x": self.x.index_select(0, inside), "y": self.y.index_select(0, inside)}


def vectors(num: int, width: int = 64) -> Rows:
    return Rows(num, torch.randn(1024, width), torch.randint(0, 10, (1024,)))


def text(num: int = 4096) -> Rows:
    tokens = torch.randint(0, VOCAB, (1024, CONTEXT + 1))
    return Rows(num, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def gpt(layers: int, width: int) -> nn.Module:
    return GPT(vocab=VOCAB, context=CONTEXT, width=width, heads=max(1, width // 64), layers=layers)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def chain(tensors: int) -> nn.Module:
    """Small layers in a row, two tensors each."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(tensors // 2)))


#: name: (what is counted, sizes, a size gives (model, data, batch)). The last sizes are left out of the short form.
Case = Callable[[int], tuple[nn.Module, Rows, int]]
_SHAPES = {1: (5, 128), 4: (5, 256), 13: (4, 512), 50: (4, 1024), 200: (4, 2048)}
SWEEPS: dict[str, tuple[str, tuple[int, ...], Case]] = {
    "parameters": ("parameters of a GPT, millions", tuple(_SHAPES), lambda n: (gpt(*_SHAPES[n]), text(), 1)),
    "batch": ("samples a step, GPT of 1 M", (1, 8, 64, 512), lambda n: (gpt(5, 128), text(), n)),
    "tensors": ("tensors", (10, 100, 300, 1000, 3000), lambda n: (chain(n), vectors(4096, 16), 16)),
    "samples": ("samples in the order, MLP", (10**3, 10**4, 10**6, 10**8), lambda n: (mlp(), vectors(n), 64)),
}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, -2), batch["y"].flatten())


def by_hand(model: nn.Module, data: Rows, batch: int) -> Iterator[None]:
    """The competent loop: one update each time it is asked."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    params = matrices + others
    model.train()
    while True:
        loss_of(model, data.gather(torch.randint(0, data.num, (batch,)))).backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def ours(model: nn.Module, data: Rows, batch: int) -> Loop:
    changes = {
        "precision": "fp32",
        "compile": "off",
        "train.steps": STEPS,
        "train.batch": batch,
        "train.clip": CLIP,
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
        "schedule.lr": "constant()",
        "checkpoint.every": 0,
    }
    resolved = resolve(Task(model=model, loss=loss_of, data=Split(train=data)), Recipe().override(changes))
    step = build(resolved.plan, resolved.model, resolved.loss, resolved.device, resolved.policy)
    return Loop(resolved.plan, step, resolved.feed, [Memory()])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def held_mb() -> float:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def python_us(run: Callable[[int], object], steps: int) -> tuple[float, float]:
    """(microseconds inside Python's own functions, calls of them) a step, by the profiler."""
    profile = cProfile.Profile()
    profile.enable()
    run(steps)
    profile.disable()
    rows = [row for (file, _, _), row in pstats.Stats(profile).stats.items() if not file.startswith(("~", "<"))]
    return 1e6 * sum(row[2] for row in rows) / steps, sum(row[0] for row in rows) / steps


def measure(sweep: str, size: int, pairs: int) -> dict[str, Any]:
    _, _, case = SWEEPS[sweep]
    torch.manual_seed(0)
    model, data, batch = case(size)
    begun = time.perf_counter()
    loop = ours(model, data, batch)
    loop.run(until=1)
    first = time.perf_counter() - begun
    hand = by_hand(case(size)[0], data, batch)
    run_ours = lambda steps: loop.run(until=loop.step.state.step + steps)
    run_hand = lambda steps: [next(hand) for _ in range(steps)]
    run_hand(2), run_ours(2)
    steps = max(1, min(64, round(0.05 / seconds(lambda: run_hand(1)))))
    times = []
    for pair in range(pairs):
        order = (run_hand, run_ours) if pair % 2 else (run_ours, run_hand)
        a, b = (seconds(lambda run=run: run(steps)) / steps for run in order)
        times.append((a, b) if pair % 2 else (b, a))
    spent, calls = python_us(run_ours, steps)
    return {
        "sweep": sweep,
        "size": size,
        "hand_ms": summary([1e3 * h for h, _ in times]),
        "thalweg_ms": summary([1e3 * t for _, t in times]),
        "over_us": summary([1e6 * (t - h) for h, t in times]),
        "python_us": spent,
        "python_calls": calls,
        "first_step_s": first,
        "rss_mb": held_mb(),
    }


def picture(rows: list[dict[str, Any]]) -> str:
    drawn = []
    for name, (unit, _, _) in SWEEPS.items():
        here = sorted((row for row in rows if row["sweep"] == name), key=lambda row: row["size"])
        lines = [Line("by hand", _spans(here, "hand_ms"), "hand"), Line("thalweg", _spans(here, "thalweg_ms"), "ours")]
        lines.append(Line("of it Python", [(row["size"], *[row["python_us"]] * 3) for row in here], "trainer"))
        if here:
            drawn.append(Panel(name, unit, lines))
    return panels(
        drawn,
        "microseconds a step",
        "Eager, fp32; medians and 95 % intervals. Python's part is by the profiler, which adds to it.",
    )


def _spans(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float, float, float]]:
    return [(row["size"], *(1e3 * row[key][at] for at in ("median", "low", "high"))) for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="without the largest sizes")
    parser.add_argument("--only", choices=SWEEPS, help="one of the sweeps; nothing is kept")
    parser.add_argument("--pairs", type=int, default=15)
    given = parser.parse_args(arguments)
    names = [given.only] if given.only else list(SWEEPS)
    todo = [(name, size) for name in names for size in SWEEPS[name][1][: -1 if given.short else None]]
    rows = [told(measure(name, size, given.pairs)) for name, size in todo]
    if not given.only:
        print(keep("sizes", rows, "python -m benchmarks.sizes"))
        PICTURE.write_text(picture(rows))


def told(row: dict[str, Any]) -> dict[str, Any]:
    over = row["over_us"]
    print(
        f"{row['sweep']:10} {row['size']:>11,}  by hand {row['hand_ms']['median']:9.3f} ms  over it {over['median']:9.1f} us"
        f" [{over['low']:.1f}, {over['high']:.1f}]  Python {row['python_us']:8.1f} us in {row['python_calls']:.0f} calls"
        f"  first step {row['first_step_s']:.2f} s  {row['rss_mb']:.0f} MB",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
