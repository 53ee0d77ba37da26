"""Slots whose home is the CPU's memory: brought to the device a portion at a time, updated there, and sent back.

The next portion comes while this one is worked on, and the one before goes home: two places on the device, two side streams
(``device/lanes.py``). The update is bound by the copies, about the bytes of the slots twice over the bus a step. ZeRO-Offload
(arXiv:2101.06840) computes the update on the CPU instead; here it stays on the device, so that every rule and every way of
running is the same with and without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.device.lanes import Lanes
from thalweg.optim.batch import Batch
from thalweg.optim.eager import Extra, Kernel
from thalweg.optim.pieces import Turn, portions
from thalweg.optim.program import Program

#: Elements of a portion: 16 MiB a slot in float32. Copies of that size run at the speed of the bus, and two places of AdamW's
#: slots take 64 MiB.
PORTION = 1 << 22


class Staging:
    """Memory of a device where slots lie while they are updated: two places, or one where nothing runs beside the work.

    One for all segments of an arena.
    """

    def __init__(self, device: torch.device) -> None:
        self.lanes = Lanes(device)
        self.places = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2 if self.lanes.beside else 1)]
        self._last = 0

    def nbytes(self) -> int:
        return sum(place.numel() for place in self.places)

    def turn(self, need: int) -> int:
        """The next place in turn, of at least ``need`` bytes."""
        self._last = place = (self._last + 1) % len(self.places)
        if self.places[place].numel() < need:
            self.lanes.forget()
            self.places[place] = torch.empty(need, dtype=torch.uint8, device=self.places[place].device)
        return place


class Offload:
    """A kernel around ``kernel`` for batches whose slots (but for uniform parts) lie elsewhere.

    Args:
        portion: elements at a time, a multiple of the codec's block; a larger matrix is brought whole.
    """

    def __init__(self, program: Program, kernel: Kernel, staging: Staging, *, portion: int = PORTION) -> None:
        self.program, self.kernel, self.staging, self.portion = program, kernel, staging, portion
        self.moving = [k for k, part in enumerate(program.parts) if part.shape != "uniform"]

    def __call__(self, batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        turn = Turn(self.program, batch)
        ahead: deque[_Brought] = deque()
        for piece, more in portions(self.program, batch, extra, self.portion):
            ahead.append(self._bring(piece, more))
            if len(ahead) == len(self.staging.places):
                self._update(turn, ahead.popleft(), scalars, due)
        while ahead:
            self._update(turn, ahead.popleft(), scalars, due)
        turn.end()

    def _bring(self, piece: Batch, extra: Extra) -> _Brought:
        """A piece with its slots in a place of the device, where copies of them are on their way."""
        place = self.staging.turn(sum(_room(home) for home in self._moved(piece)))
        here = Batch(piece.ps, piece.gs, self._rooms(place, piece), piece.folds, firsts=piece.firsts)
        with self.staging.lanes.bring(place, _what(piece)):
            for room, home in zip(self._moved(here), self._moved(piece)):
                room.copy_(home, non_blocking=True)
        return _Brought(piece, here, extra, place, self.staging.lanes.coming())

    def _update(self, turn: Turn, one: _Brought, scalars: Mapping[str, Any], due: int) -> None:
        lanes = self.staging.lanes
        lanes.arrived(one.coming)
        turn.begin(one.here)
        self.kernel(one.here, scalars, due=due, extra=one.extra)
        turn.note(one.here, scalars.get("skipped"))
        with lanes.send():
            for room, home in zip(self._moved(one.here), self._moved(one.piece)):
                home.copy_(room, non_blocking=True)
        lanes.left(one.place, _what(one.piece))

    def _moved(self, piece: Batch) -> list[Tensor]:
        return [tensor for k in self.moving for tensor in piece.slots[k]]

    def _rooms(self, place: int, piece: Batch) -> list[list[Tensor]]:
        """Tensors like the piece's slots in the memory of ``place``; uniform parts are the piece's own."""
        memory, start = self.staging.places[place], 0
        rooms = list(piece.slots)
        for k in self.moving:
            rooms[k] = []
            for home in piece.slots[k]:
                flat = memory[start : start + home.nbytes].view(home.dtype)
                rooms[k].append(flat.as_strided(home.shape, home.stride(), flat.storage_offset()))
                start += _room(home)
        return rooms


@dataclass(frozen=True)
class _Brought:
    """A piece, the same with its slots on the device, where they are, and when they have come."""

    piece: Batch
    here: Batch
    extra: Extra
    place: int
    coming: Any


def _room(home: Tensor) -> int:
    """Bytes of a tensor, up to the next multiple of 256."""
    return -(-home.nbytes // 256) * 256


def _what(piece: Batch) -> int:
    """What a piece's slots are known by: where its parameters lie, which is theirs for the whole run."""
    return piece.ps[0].data_ptr()
