"""Seconds from the start of a process to the first step of ``thalweg train digits``, over those of torch and data alone.

Three kinds of process in turn: one that imports torch and reads the same images; one that runs the command up to the end of its
first step; one that stands for a hand-written loop, which builds torch's AdamW and makes one step. Bytecode is kept, as in an
installed package; the first round of each is not counted.

    python -m benchmarks.startup [--short] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.keep import keep, summary

ROOT = Path(__file__).parent.parent

_DATA = """
import torch, gzip, importlib.util, numpy as np
from pathlib import Path
file = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
with gzip.open(file, "rt") as lines:
    table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
images = torch.from_numpy(table[:, :64] / 16).reshape(-1, 1, 8, 8)
labels = torch.from_numpy(table[:, 64].astype(np.int64))
"""

_BY_HAND = """
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2048, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
torch.nn.functional.cross_entropy(model(images[:64]), labels[:64]).backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
"""

_OURS = """
import sys
from thalweg.cli.main import main
def first():
    import os
    print("first", flush=True)
    os._exit(0)
import builtins
plain = builtins.__import__
def load(name, *args, **words):
    module = plain(name, *args, **words)
    step = sys.modules.get("thalweg.engine.step")
    if step is not None and hasattr(step, "Step") and not hasattr(step, "watched"):
        step.watched, run = True, step.Step.run
        step.Step.run = lambda self, window: (run(self, window), first())
        builtins.__import__ = plain
    return module
builtins.__import__ = load
main(["train", "digits", "--quiet"])
"""

KINDS = {"torch and data": _DATA, "thalweg": _OURS, "by hand": _DATA + _BY_HAND}


def seconds(program: str, folder: str) -> float:
    """From the start of a process to what it says last."""
    ended = {} if "first" in program else {"tail": "\nprint('first', flush=True)\nimport os\nos._exit(0)\n"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode")}
    start = time.perf_counter()
    command = [sys.executable, "-c", program + ended.get("tail", "")]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "first":
            if process.poll() is not None:
                raise RuntimeError(f"the process ended with {process.returncode} before its first step")
        return time.perf_counter() - start


def measure(rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for name, program in KINDS.items():
                taken = seconds(program, folder)
                if turn:
                    times[name].append(taken)
    ratios = [ours / base for ours, base in zip(times["thalweg"], times["torch and data"])]
    return {"workload": "digits", **{f"{k}, s": summary(v) for k, v in times.items()}, "ratio": summary(ratios)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="5 rounds")
    parser.add_argument("--dry", action="store_true", help="keep no row")
    asked = parser.parse_args(arguments)
    rounds = 5 if asked.short else asked.rounds
    row = measure(rounds)
    for name in KINDS:
        print(f"{name:16} {row[f'{name}, s']['median']:.2f} s to the first step")
    ratio = row["ratio"]
    print(
        f"thalweg over torch and data: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] n={ratio['n']}"
    )
    if not asked.dry:
        print(keep("startup", [row], f"python -m benchmarks.startup --rounds {rounds}", short=asked.short))


if __name__ == "__main__":
    main()
