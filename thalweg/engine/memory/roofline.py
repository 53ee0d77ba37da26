"""Seconds of a pass on a chip that is not here: each operation at what bounds it, arithmetic or memory (Williams et al. 2009).

An estimate, told as one: a share of what the data sheet states is taken to be reached, and nothing overlaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.device.chips import Chip

#: Share of the stated rates that large products and large copies reach; smaller ones are bounded by ``_LAUNCH``.
ARITHMETIC, TRAFFIC = 0.6, 0.8
_LAUNCH = 4e-6  # seconds between two kernels of an eager program, at the least

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Roofline(TorchDispatchMode):
    """Adds up the time of every operation that runs inside.

    Attributes:
        seconds: so far; ``flops``: of products and convolutions, so far.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports the compiler

    def __init__(self, chip: Chip, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chip, self.precision = chip, precision
        self.seconds, self.flops = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in _flat((result,)) if isinstance(x, Tensor)]
        given = [x for x in _flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        if not made or func.is_view:
            return result
        moved = sum(x.numel() * x.element_size() for x in (*made, *given))
        bound = moved / (self.chip.bandwidth * TRAFFIC)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = int(count(*args, **kwargs, out_val=result))
            self.flops += flops
            bound = max(bound, flops / (self._rate(given) * ARITHMETIC))
        self.seconds += max(bound, _LAUNCH)
        return result

    def _rate(self, given: list[Tensor]) -> float:
        """Operations a second of products in the dtype of what is given."""
        dtype = next((x.dtype for x in given if x.is_floating_point()), torch.float32)
        name = _NAMES.get(dtype, "fp32")
        if self.precision in ("tf32", "fp8") and name in ("fp32", "bf16"):
            name = self.precision if (self.precision == "tf32") == (name == "fp32") else name
        return self.chip.rate(name)


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            found += _flat(value)
        else:
            found.append(value)
    return found
