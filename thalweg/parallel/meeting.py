"""How ranks meet: where a launcher starts them again, in a room of their own in its store."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

_PAUSE = 0.02


def meet(dist: Any, timeout: float) -> tuple[Any, int, int]:
    """(store, rank, world) of the ranks that the environment names.

    torchrun keeps one store for all groups that it starts, and a group finds there what the one before it wrote: addresses of
    processes that are gone (seen in torch 2.13: the first restart fails for that alone). Restarts are counted by each node for
    itself and not where a node joins, so no number in the environment names a group. The first rank draws a name and gives
    it to each that asks with a word of its own; it is the group's when all have taken it.

    Raises:
        RuntimeError, ValueError: if the others do not come.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    until = time.monotonic() + timeout
    room = _give(store, world, until) if rank == 0 else _ask(store, rank, until)
    return dist.PrefixStore(f"thalweg/{room}", store), rank, world


def _give(store: Any, world: int, until: float) -> str:
    room, answered, missing = uuid.uuid4().hex, set(), set(range(1, world))
    while missing:
        for rank in sorted(missing):
            if store.check([f"thalweg/asks/{rank}"]):
                word = store.get(f"thalweg/asks/{rank}").decode()
                if word not in answered:  # it may be of one that is gone: who asks anew has another word
                    answered.add(word)
                    store.set(f"thalweg/answers/{word}", room)
            if store.check([f"thalweg/{room}/took/{rank}"]):
                missing.discard(rank)
        _pause(until, f"ranks {', '.join(map(str, sorted(missing)))} of {world} have not come")
    return room


def _ask(store: Any, rank: int, until: float) -> str:
    word = f"{uuid.uuid4().hex}-{os.getpid()}"
    store.set(f"thalweg/asks/{rank}", word)
    while not store.check([f"thalweg/answers/{word}"]):
        _pause(until, "rank 0 has not come")
    room: str = store.get(f"thalweg/answers/{word}").decode()
    store.set(f"thalweg/{room}/took/{rank}", "yes")
    return room


def _pause(until: float, missing: str) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"{missing}, and the time is up")
    time.sleep(_PAUSE)
