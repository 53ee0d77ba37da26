"""What is imported before the first step of a run: half a second of it is easily lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

#: Each of them is 0.3 s or more, and no step on the CPU needs one.
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas", "torch.distributed.checkpoint")

PROGRAM = f"""
import gc, os, sys
from thalweg.cli.main import main
from thalweg.engine.step import Step

run = Step.run

def first(self, window):
    run(self, window)
    print("came in:", [name for name in {HEAVY!r} if name in sys.modules], gc.get_freeze_count() > 100_000, flush=True)
    os._exit(0)

Step.run = first
main(["train", "digits", "--quiet"])
"""


def test_nothing_heavy_is_imported_before_the_first_step(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "came in: [] True" in done.stdout, done.stdout + done.stderr
