"""Devices: what this machine has and what each can do. The only room that names a backend."""

from thalweg.device import memory
from thalweg.device.backend import CAPABILITIES, HOST_RANKS, Device, choose, exact_dtype, facts
from thalweg.device.failures import ran_out
from thalweg.device.measure import half_precision_gain, matmul_rates
from thalweg.device.operators import causal_attention
from thalweg.device.products import float32_products

__all__ = [
    "CAPABILITIES",
    "Device",
    "HOST_RANKS",
    "causal_attention",
    "choose",
    "exact_dtype",
    "facts",
    "float32_products",
    "half_precision_gain",
    "matmul_rates",
    "ran_out",
    "memory",
]
