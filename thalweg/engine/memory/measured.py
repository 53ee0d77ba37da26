"""Predicted against measured, after the first steps of a run."""

from __future__ import annotations

from thalweg.core import Ledger, human_bytes
from thalweg.device import Device, memory

#: Steps after which the peak is looked at: by then allocators have settled.
STEPS = 20


class PeakWatch:
    """Follows the most bytes in use from ``begin`` on.

    Args:
        ledger: what was predicted.
    """

    def __init__(self, ledger: Ledger, device: Device) -> None:
        self.ledger, self.device = ledger, device
        self.begun = False

    def begin(self) -> None:
        """Blocks that earlier trials freed go back to the system, and the mark is set anew."""
        memory.release(self.device)
        self.begun = memory.reset_peak(self.device)

    def told(self) -> str:
        """The comparison, for people; empty where the device does not say what was in use."""
        peak = memory.peak(self.device)
        if peak is None or not self.begun:
            return ""
        off = self.ledger.peak / peak - 1
        return (
            f"memory after {STEPS} steps: predicted peak {human_bytes(self.ledger.peak)},"
            f" measured {human_bytes(peak)} ({off:+.1%})"
        )
