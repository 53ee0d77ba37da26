"""One framework on one workload in a process of its own; it speaks JSON lines with the driver.

python -m benchmarks.speed.worker ADAPTER VARIANT WORKLOAD SECONDS
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from typing import Any


def main(adapter: str, variant: str, workload: str, seconds: str) -> None:
    begun = float(os.environ.get("SPEED_BEGUN") or time.time())
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a framework prints goes to the log

    def say(what: str, **values: Any) -> None:
        line.write(json.dumps({"what": what, **values}) + "\n")

    from benchmarks.speed.feed import Feed, Stop
    from benchmarks.speed.workloads import WORKLOADS

    w = WORKLOADS[workload]
    run = importlib.import_module(f"benchmarks.speed.adapters.{adapter}").run
    imported = time.time()
    hear = lambda: sys.stdin.readline().strip()
    feed = Feed(w, w.check, say, hear)
    loss = run(w, feed, variant)
    say("checked", loss=loss, imported=imported - begun, first=feed.first - begun)
    timed = Feed(w, None, say, hear, float(seconds))
    with contextlib.suppress(Stop):
        run(w, timed, variant)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say("end", peak_mb=peak, threads=threads, note=timed.note)
    sys.stderr.flush()
    os._exit(0)  # a framework that was stopped in the middle may have threads that wait


if __name__ == "__main__":
    main(*sys.argv[1:5])
