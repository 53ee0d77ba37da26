"""Devices: what this machine has and what each can do. The only room that names a backend."""

from thalweg.device.allocator import keep_freed_memory
from thalweg.device.backend import CAPABILITIES, Device, choose, facts
from thalweg.device.measure import half_precision_gain, matmul_rates

__all__ = ["CAPABILITIES", "Device", "choose", "facts", "half_precision_gain", "keep_freed_memory", "matmul_rates"]
