"""A launcher that starts ranks again, such as torchrun with ``--max-restarts``: what a group leaves for the next one.

Nothing in the environment says for certain that a group is not the first: torchrun counts restarts on each node for itself, not
where a node joins, and its run id is "none" unless it is given. But each of its agents has a folder of its own for as long
as it lives, and what a group writes there the next one reads, on every node that was there before.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thalweg.parallel.ranks import Ranks


@dataclass(frozen=True)
class Left:
    """What an earlier group of the same launcher left.

    Attributes:
        folder: of the run that it was about to write, as it was named; "": of none.
        begun: whether that run has begun, and the folder holds it.
        host: where its first rank was.
        code: with which exit code it ended for good; 0: it did not.
    """

    folder: str = ""
    begun: bool = False
    host: str = ""
    code: int = 0


class Agent:
    """The launcher's agent on this node.

    Attributes:
        restarts: how often it has started its ranks again.
        is_elastic: whether it starts them again at all.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.is_elastic = "TORCHELASTIC_RESTART_COUNT" in environment
        self._speaks = environment.get("LOCAL_RANK", "0") == "0"
        errors = environment.get("TORCHELASTIC_ERROR_FILE", "")  # <its own>/attempt_1/<local rank>/error.json
        self._file = Path(errors).parents[2] / "thalweg.json" if self.is_elastic and errors.count("/") > 3 else None

    def left(self) -> Left:
        """What the last group on this node left."""
        with suppress(OSError, ValueError, TypeError):
            return Left(**json.loads(self._file.read_text())) if self._file is not None else Left()
        return Left()

    def leave(self, **changes: object) -> None:
        """Change what the next group will find, on this node."""
        if self._file is None or not self._speaks:
            return
        part = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # without it the next group is like a first one
            part.write_text(json.dumps(asdict(replace(self.left(), **changes))))  # type: ignore[arg-type]
            os.replace(part, self._file)


def left_to(ranks: Ranks, agent: Agent) -> Left:
    """What an earlier group left to this one, on whichever node; the same on all ranks."""
    told = ranks.told(asdict(agent.left()))
    known = [Left(**one) for one in told if one["folder"]]
    return next((one for one in known if one.begun), known[0] if known else Left())


def here() -> str:
    """The name of this machine."""
    return socket.gethostname()
