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
    "inputs",
    "worth",
)

for name in sys.argv[1:] or NAMES:
    print(f"== {name}", flush=True)
    importlib.import_module(f"benchmarks.{name}").main([])
