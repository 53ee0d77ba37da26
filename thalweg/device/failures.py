"""Which errors say that memory ran out: each allocator has its own words, and few have a class."""

from __future__ import annotations

import re

import torch

from thalweg.core import ThalwegError

#: What allocators and the libraries behind torch's operators say. oneDNN tells no reason: a memory or a primitive that it
#: could not make or run; where an operator is not possible at all, it says "primitive descriptor", which is not meant here.
_WORDS = re.compile(
    "|".join(
        (
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
            r"out of memory",
            r"std::bad_alloc",
            r"_ALLOC_FAILED|ALLOCATION_FAILED|OUT_OF_(DEVICE|HOST)_MEMORY",
            r"Not enough memory to allocate|failed to allocate \d+ bytes",
            r"could not create a memory( object)?$",
            r"could not (create|execute) a primitive$",
        )
    ),
    re.IGNORECASE | re.MULTILINE,
)


def ran_out(err: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device.

    >>> (
    ...     ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")),
    ...     ran_out(MemoryError()),
    ... )
    (True, True)
    >>> ran_out(RuntimeError("could not create a primitive descriptor for the matmul primitive"))
    False
    """
    if isinstance(err, ThalwegError):  # has been dealt with
        return False
    if isinstance(err, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(err, RuntimeError) and _WORDS.search(str(err)) is not None
