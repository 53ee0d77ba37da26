"""What makes a command start sooner."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imported_at_once() -> Iterator[None]:
    """For imports of torch and of what needs it: nobody looks for cycles among the objects that they make, now or later.

    They make half a million, and all of them stay; Python would go through them a dozen times on the way (0.2 s).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
