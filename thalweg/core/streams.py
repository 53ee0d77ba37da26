"""Random streams are named, never carried: a seed is a function of the run's seed and the names of the place.

Because nothing is carried, nothing about randomness needs saving (contracts C2 and C3 of the design).
"""

from __future__ import annotations

import hashlib
import struct

_PACK = struct.Struct("<q").pack


def seed_for(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream with these names.

    Args:
        seed: the run's seed.
        names: where the stream is used, for example ``("step", 12, 3)``; 64-bit integers or words.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every process.

    >>> seed_for(0, "step", 1, 0) == seed_for(0, "step", 1, 0), seed_for(0, "step", 1, 0) == seed_for(0, "step", 0, 1)
    (True, False)
    """
    parts = [_PACK(seed)]
    for name in names:
        parts.append(b"i" + _PACK(name) if isinstance(name, int) else b"s" + name.encode() + b"\0")
    digest = hashlib.blake2b(b"".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
