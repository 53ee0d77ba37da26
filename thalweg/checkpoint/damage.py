"""What can be wrong with a checkpoint."""

from __future__ import annotations

import errno

#: Errors that say something of what lies there, and not of the way to it.
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO}


class Damage(Exception):
    """A file is not what was written, or is nothing that was ever written by us."""


class Unreadable(Damage):
    """It may be whole: what failed is the way to it, such as memory, descriptors, permissions, a mount or a network."""


def damage_of(err: Exception, where: str) -> Damage:
    """What an error tells, with its place."""
    text = f"{where}: {str(err)[:300].rstrip('.') or type(err).__name__}."
    if isinstance(err, (Unreadable, MemoryError)):
        return Unreadable(text)
    if isinstance(err, OSError) and err.errno not in _OF_THE_FILE:
        return Unreadable(text)
    return Damage(text)
