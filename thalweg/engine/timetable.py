"""Every scheduled value of a run as one table on the device: a row for each number of applied updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from thalweg.device import Device
from thalweg.engine.feedback import Feedback
from thalweg.optim.memory import memory
from thalweg.schedules import Listening


class Timetable:
    """One lookup a step gives all values, with nothing read back.

    Attributes:
        now: the values of this step by name: 0-dim tensors that stay the same tensors for the whole run, so that layers
            and losses may hold them.
        feedback: what has been heard, for schedules that listen.
        told: what records tell beside the rate, and what each number is multiplied by to be read.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[float]],
        device: Device,
        listening: Sequence[tuple[str, Listening]] = (),
        scales: Mapping[str, float] | None = None,
    ) -> None:
        longest = max(len(row) for row in rows.values())
        full = [[*row, *[row[-1]] * (longest - len(row))] for row in rows.values()]
        self.length = longest
        self.table = torch.tensor(full, dtype=torch.float64).T.contiguous().to(device.exact).to(device.torch_device)
        self._row = torch.zeros(1, len(full), dtype=device.exact, device=device.torch_device)
        self.now: dict[str, Tensor] = {name: self._row[0, k] for k, name in enumerate(rows)}
        self._here = (memory(self._row), memory(self.table)) if device.is_host else None
        self._applied: tuple[Tensor, memoryview] | None = None  # what ``turn`` was given last, and its memory
        self.feedback = Feedback(listening, device.torch_device, device.exact)
        self.told = dict(scales or {})

    def cut(self) -> dict[str, Tensor]:
        """``now``, cut out of its row anew: what a graph reads, whose inputs must not overlap."""
        return {name: self._row[0, k] for k, name in enumerate(self.now)}

    def memory(self) -> memoryview:
        """``now`` in the CPU's memory, in the order of its names."""
        view: memoryview = memory(self._row)
        return view

    def turn(self, applied: Tensor, attempted: int) -> None:
        """Go to the row of ``applied`` updates, (1,); beyond the end, the last one."""
        if self._here is None:
            place = applied if attempted < self.length else applied.clamp(max=self.length - 1)
            self._row.copy_(self.table.index_select(0, place))  # not `out=`: not every device has that form
        else:
            self._turn_here(*self._here, applied)
        if self.feedback.pieces:
            self.feedback.apply(self.now)

    def _turn_here(self, row: memoryview, table: memoryview, applied: Tensor) -> None:
        """The same in the CPU's memory, where two operators take as long as a product of small matrices."""
        if self._applied is None or self._applied[0] is not applied:
            self._applied = applied, memory(applied)
        first = min(self._applied[1][0], self.length - 1) * len(row)
        row[:] = table[first : first + len(row)]
