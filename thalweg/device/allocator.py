"""How the C library keeps freed memory. By default glibc gives large blocks back at once and pays for fresh pages each step."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_KEEP = 1 << 30


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds so that freed blocks up to 1 GiB stay with the process; False where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = libc.mallopt(_M_MMAP_THRESHOLD, _KEEP) and libc.mallopt(_M_TRIM_THRESHOLD, _KEEP)
    except (OSError, AttributeError):
        return False
    return bool(done)
