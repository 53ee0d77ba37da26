"""Devices: what this machine has and what each can do. The only room that names a backend."""

from thalweg.device import allocator, attention, memory, threads
from thalweg.device.backend import HOST_RANKS, Device, choose, exact_dtype, facts
from thalweg.device.capabilities import KNOWN, Capabilities, known
from thalweg.device.draws import seeded
from thalweg.device.failures import ran_out
from thalweg.device.measure import half_precision_gain, matmul_rates
from thalweg.device.move import check_float64, move
from thalweg.device.operators import Fault
from thalweg.device.probes import capabilities_of
from thalweg.device.products import float32_products

__all__ = [
    "Capabilities",
    "Device",
    "Fault",
    "HOST_RANKS",
    "KNOWN",
    "capabilities_of",
    "check_float64",
    "choose",
    "exact_dtype",
    "facts",
    "float32_products",
    "half_precision_gain",
    "known",
    "matmul_rates",
    "move",
    "ran_out",
    "seeded",
    "memory",
    "allocator",
    "attention",
    "threads",
]
