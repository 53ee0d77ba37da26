"""How many threads torch computes with on the host: whether that is open, and which numbers are worth a try."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical() -> int:
    """Cores among them, where two processors may share one; 0 where the system does not say."""
    seen, here = set(), {}
    with suppress(OSError, ValueError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            here[name.strip()] = value.strip()
            if name.strip() == "core id" and int(here["processor"]) in os.sched_getaffinity(0):
                seen.add((here.get("physical id"), here["core id"]))
    return len(seen)


def given() -> str:
    """Who has said how many threads there are; "" where nobody has, and torch took one a core.

    A call of ``torch.set_num_threads`` with torch's own number cannot be told from none.
    """
    for name in _VARIABLES:
        if value := os.environ.get(name):
            return f"{name}={value}"
    return "" if torch.get_num_threads() in (cores(), _physical()) else "torch.set_num_threads"


def numbers() -> list[int]:
    """Numbers of threads to try, the present one first: all, a few parts of it, and one."""
    most = torch.get_num_threads()
    return sorted({most, *(most // part for part in (2, 4) if most >= 4 * part), 1}, reverse=True)


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards torch has as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
