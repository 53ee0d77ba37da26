"""Operators that a device has, but not well; each with the way round and the figure that speaks for it (LOG.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fault:
    """An operator that a kind of device does not have, or not well.

    Attributes:
        operator: its name in torch.
        fault: "missing", "wrong" (silently) or "slow".
        what: what it does.
        way: the way round.
    """

    operator: str
    fault: str
    what: str
    way: str


#: By kind of device. Those of a TPU were found in torch-tpu 0.2.0, against the CPU's results.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "cpu": (
        Fault(
            "scaled_dot_product_attention", "slow", "its backward pass in half precision", "causal_attention: float32"
        ),
    ),
    "tpu": (
        Fault("batch_norm", "wrong", "running statistics never move", "moved by hand (silent.py)"),
        Fault("instance_norm", "wrong", "running statistics never move", "moved by hand (silent.py)"),
        Fault("avg_pool1d", "wrong", "its result has no gradient", "avg_pool2d"),
        Fault("lstm, gru", "wrong", "results have no gradient where compiled", "not compiled"),
        Fault("_amp_foreach_non_finite_check_and_unscale_", "missing", "checks scaled gradients", "bf16, unscaled"),
    ),
}


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each place to itself and those before, through torch's fused operator.

    On the CPU half precision is computed in float32: the backward pass of torch's operator takes 4.5 times as long in
    bf16 (torch 2.13, 11.9 ms against 2.7 ms for 16 x 4 heads of 128 x 32).

    Args:
        q, k, v: (batch, heads, time, width of a head).
    """
    if q.device.type == "cpu" and q.dtype in _HALF:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
