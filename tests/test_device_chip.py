"""A chip that nobody knew (``tests/chip.py``) trains, saves, resumes and refuses like any other: no code names a backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends of pure Python",
)

#: What each case of ``chip_cases.py`` says: all of it, or the sentences that must be there. "same": the CPU's bits.
WANTED: dict[str, str | tuple[str, ...]] = {
    "capabilities": "chip:0, torch finds this accelerator: "
    "['eager', ('bf16', 'fp16'), False, True, True, False, False, False, True] None True",
    "adamw": "same",
    "muon": "same",
    "soap, a long history of norms": "same",
    "int8 slots": "same",
    "gradient noise": "same",
    "bf16": "same",
    "bf16-pure": "same",
    "offload": "same",
    "resumed": "chip:0: same",
    "resumed on the cpu": "cpu: same",
    "ties": "kept; the optimizer moves them",
    "held": (
        "The model cannot be moved to chip with the parameters that it has.",
        "AccumulateGrad",
        "Move it before anything else holds its parameters",
    ),
    "fp16": (
        "precision='fp16' is not possible on chip.",
        "fp16 loses small gradients unless the loss is scaled, and torch does not scale it there. It has fp32, bf16",
        "Use one of these, or precision='auto'.",
    ),
    "memory": ("How much memory chip has is not known.", "Its backend does not say", "memory_budget='16GiB'"),
    "second chip": ("device='chip:1' is not on this machine.", "It has cpu and 1 of chip.", "Use device='auto'"),
    "nearly": ("device='chp' is not known.", "This machine has cpu and 1 of chip.", "Did you mean chip?"),
    "fused": ("way='fused' is not possible for adamw.", "on chip", "Leave way out"),
    "compiled": (
        "way='compiled' is not possible for adamw.",
        "it compiles nothing that torch knows of",
        "Leave way out",
    ),
}


def test_it_does_what_the_cpu_does(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.chip_cases", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = {line["case"]: line["told"] for line in map(json.loads, ran.stdout.splitlines())}
    # The CPU's attention is one operator of its own; the chip's is products and a softmax, which round otherwise.
    apart, same_text = told.pop("text").split()
    assert float(apart) < 1e-6 and same_text == "True"
    assert told.keys() == WANTED.keys()
    wrong = {
        case: told[case]
        for case, wanted in WANTED.items()
        if (told[case] != wanted if isinstance(wanted, str) else not all(part in told[case] for part in wanted))
    }
    assert not wrong
