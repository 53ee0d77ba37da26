"""Whether the C library gives freed memory back to the system at once, or keeps it for the next step.

glibc hands a freed block back when more than a threshold is free at the end of its heap, and gives large blocks pages of their
own. A step frees its activations and asks for them again a moment later: each page then comes back as a fresh one, which the
system fills with zeros first. With both thresholds raised the pages stay. No result changes; the peak rises by what lies in holes
between blocks (7 % of a process with a small CNN), and what a step has freed is not there for others (docs/on-a-cpu.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

#: Environment variable: "keep" leaves the C library's thresholds as they are.
VARIABLE = "THALWEG_MALLOC"
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
_RAISED = 1 << 30
#: Where glibc's own thresholds come to by themselves once a block of that size was freed: 4 MiB times sizeof(long), and twice that.
_OWN = 32 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_state = {"raised": False}


def against() -> str:
    """Why the thresholds cannot be raised here; "" where they can."""
    if os.environ.get(VARIABLE) == "keep":
        return f"{VARIABLE}=keep"
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "the C library is not glibc"
    preloaded = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in os.environ.get("LD_PRELOAD", "")]
    return f"{preloaded[0]} takes the C library's place" if preloaded else ""


def is_raised() -> bool:
    """Whether freed memory stays with this process."""
    return _state["raised"]


def raise_thresholds() -> bool:
    """Blocks of up to 1 GiB come from the heap, and what is freed stays there; False where that cannot be."""
    if against():
        return False
    _state["raised"] = _set(_RAISED, _RAISED)
    return is_raised()


def lower_thresholds() -> None:
    """What is freed goes back to the system from 64 MiB on, as glibc does by itself in a process that has freed large blocks."""
    if is_raised():
        _set(_OWN, 2 * _OWN)
        _state["raised"] = False
        ctypes.CDLL(None).malloc_trim(0)


def _set(mmap: int, trim: int) -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    # Older ones refuse more than 32 MiB as the size from which on a block has its own pages: the largest they take, then.
    own = mallopt(_MMAP, mmap) or mallopt(_MMAP, _OWN)
    return bool(mallopt(_TRIM, trim) and own)


def fresh_bytes() -> int:
    """Bytes of fresh pages that the system has given this process so far, in all; 0 where it does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * _PAGE
