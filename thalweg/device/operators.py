"""Operators that a device has, but not well; each with the way round and the figure that speaks for it (LOG.md)."""

from __future__ import annotations

from dataclasses import dataclass


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
        Fault("scaled_dot_product_attention", "slow", "its backward pass in half precision", "float32 (attention.py)"),
    ),
    "tpu": (
        Fault("batch_norm", "wrong", "running statistics never move", "moved by hand (silent.py)"),
        Fault("instance_norm", "wrong", "running statistics never move", "moved by hand (silent.py)"),
        Fault("avg_pool1d", "wrong", "its result has no gradient", "avg_pool2d"),
        Fault("lstm, gru", "wrong", "results have no gradient where compiled", "not compiled"),
        Fault("_amp_foreach_non_finite_check_and_unscale_", "missing", "checks scaled gradients", "bf16, unscaled"),
    ),
}
