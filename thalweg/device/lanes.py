"""Copies between the CPU's memory and a device's that run beside its work: two side streams where the device has streams."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from thalweg.device.probes import capabilities_of


def in_host_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which lies in the CPU's memory, pinned where ``device`` copies from there by itself."""
    return tensor.pin_memory() if capabilities_of(device).pins else tensor


class Lanes:
    """One stream for what comes in and one for what goes out, beside the stream that computes; none where there are none.

    A *place* is memory of the device that is filled, worked on and emptied again and again; *what* comes there has its home
    in the CPU's memory. ``with bring(place, what)``: copy in; ``arrived(coming())``; work; ``with send()``: copy out;
    ``left(place, what)``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inward: Any = None
        can = capabilities_of(device)
        if can.streams and can.pins:  # without pinned memory a copy holds up the host, and nothing runs beside it
            self.inward, self.outward = torch.Stream(device=device), torch.Stream(device=device)
        self._left: dict[Hashable, Any] = {}  # when a place was empty again, and when what was there was home again

    @property
    def beside(self) -> bool:
        """Whether copies run beside the work; elsewhere they wait for each other, and one place is enough."""
        return self.inward is not None

    def bring(self, place: int, what: Hashable) -> AbstractContextManager[Any]:
        """Inside, copies of ``what`` into ``place`` are queued behind those that last went out of either."""
        if self.inward is None:
            return nullcontext()
        if ("place", place) not in self._left:  # new memory: what had it before was the computing stream's
            self.inward.wait_event(self._now())
        for key in (("place", place), ("what", what)):
            if key in self._left:
                self.inward.wait_event(self._left[key])
        stream: AbstractContextManager[Any] = self.inward
        return stream

    def coming(self) -> Any:
        """The moment when what was brought so far is there."""
        return None if self.inward is None else self.inward.record_event()

    def arrived(self, coming: Any) -> None:
        """Work queued from here on waits for that moment."""
        if self.inward is not None:
            torch.accelerator.current_stream(self.device).wait_event(coming)

    def send(self) -> AbstractContextManager[Any]:
        """Inside, copies out are queued behind the work so far."""
        if self.inward is None:
            return nullcontext()
        self.outward.wait_event(self._now())
        stream: AbstractContextManager[Any] = self.outward
        return stream

    def left(self, place: int, what: Hashable) -> None:
        """All copies of ``what`` out of ``place`` are queued."""
        if self.inward is not None:
            self._left["place", place] = self._left["what", what] = self.outward.record_event()

    def forget(self) -> None:
        """The places get other memory: wait until nothing uses the old."""
        self.synchronize()
        self._left.clear()

    def synchronize(self) -> None:
        """Wait until all that was sent is home."""
        if self.inward is not None:
            self.inward.synchronize()
            self.outward.synchronize()

    def _now(self) -> Any:
        return torch.accelerator.current_stream(self.device).record_event()
