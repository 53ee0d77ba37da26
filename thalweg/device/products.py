"""How float32 products and convolutions are computed: torch's switches of a device, set for a while and put back."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

#: What a switch may be told here: true float32, or TF32 (8 bits of exponent, 10 of mantissa; float32 sums).
PRODUCTS = ("ieee", "tf32")


@cache
def _switches(kind: str) -> tuple[Any, ...]:
    """Torch's settings for matrix products, convolutions and recurrent layers on a kind of device."""
    backends: Any = torch.backends
    if kind == "cuda":
        return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    if kind == "cpu":
        return backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn
    if kind == "tpu":
        return (_MatmulPrecision(),)
    return ()


#: Where torch alone would compute float32 products with fewer bits: what they are told here, and why.
TOLD = {
    "tpu": (
        "highest",
        "six passes in bfloat16 for each, as near to float32 as the chip comes; torch-tpu's own default is one pass",
    )
}


class _MatmulPrecision:
    """``torch.set_float32_matmul_precision`` as a switch: the only one that torch-tpu has, for convolutions too."""

    @property
    def fp32_precision(self) -> str:
        now = torch.get_float32_matmul_precision()
        return "ieee" if now == "highest" else now

    @fp32_precision.setter
    def fp32_precision(self, how: str) -> None:
        torch.set_float32_matmul_precision("highest" if how == "ieee" else how)


class float32_products:
    """Inside, float32 products are computed as ``how`` says; afterwards as before. The settings hold for the whole process.

    Torch has convolutions in TF32 on CUDA unless told otherwise, and ``set_float32_matmul_precision`` moves the others, on
    the CPU down to bfloat16.

    Args:
        how: "ieee" or "tf32".
        kind: kind of device, such as "cuda"; one without such switches computes true float32.
    """

    def __init__(self, how: str, kind: str) -> None:
        self.how, self.switches = how, _switches(kind)
        self.changed: list[tuple[Any, str]] = []

    def __enter__(self) -> None:  # no generator: this runs every step
        for switch in self.switches:
            before = switch.fp32_precision
            if before != self.how and not (self.how == "ieee" and before == "none"):
                switch.fp32_precision = self.how
                self.changed.append((switch, before))

    def __exit__(self, *error: object) -> None:
        while self.changed:
            switch, before = self.changed.pop()
            switch.fp32_precision = before


@cache
def cpu_has_tf32() -> bool:
    """Whether this CPU's matrix product has other bits when TF32 is asked for; else torch computes float32, and is silent."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=draw)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        with float32_products("ieee", "cpu"):
            true = a @ a
        with float32_products("tf32", "cpu"):
            return not torch.equal(a @ a, true)
