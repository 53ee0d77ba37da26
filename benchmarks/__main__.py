"""``python -m benchmarks [NAME ...]``: all benchmarks, or those named."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "exactness",
    "loop",
    "resume",
    "newcomer",
    "cards",
    "optim",
    "converge",
    "batchnorm",
    "dropout",
    "out_of_memory",
    "inputs",
    "precision",
    "worth",
    "memory",
    "recompute",
    "bytes_a_parameter",
    "checkpoint",
    "scaling",
    "ranks",
    "forms",
    "compiled",
    "speed",
    "sizes",
    "levers",
)

for name in sys.argv[1:] or NAMES:
    print(f"== {name}", flush=True)
    importlib.import_module(f"benchmarks.{name}").main([])
