"""The backward pass of attention in half precision on the CPU, by torch's own operator in float32 where that is the faster one.

It goes in below autograd, so that anybody's model has it: those that call ``scaled_dot_product_attention``, torch's own layers,
and graphs that a compiler made, which call the same operator.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
#: Keys times width of a head up to which float32 is faster: 1.1 to 5 times below it, 0.9 above (LOG.md, torch 2.13). Torch packs
#: each block of half-precision keys anew for its matrix products, which a block must be large to repay.
MOST = 16_384


class _Held:
    """What keeps our kernel registered: torch drops it with its library."""

    library: torch.library.Library | None = None


def ready() -> None:
    """From now on short attention in half precision has its gradients from float32. Once for a process; cheap afterwards."""
    if _Held.library is None:
        _Held.library = _register()


def undo() -> None:
    """Torch's own kernel again."""
    if _Held.library is not None:
        _Held.library._destroy()
        _Held.library = None


def _register() -> torch.library.Library:
    kernel = torch.library.get_kernel(f"aten::{_BACKWARD}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, drop: float, causal: bool,
        *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        """``sums``: logarithms of the sums of exponentials, in float32 whatever the rest is."""
        if q.dtype not in _HALVES or k.shape[-2] * k.shape[-1] > MOST:
            return kernel.call_boxed(keys, grad, q, k, v, out, sums, drop, causal, attn_mask=attn_mask, scale=scale)
        wide = [x.float() for x in (grad, q, k, v, out)]
        mask = None if attn_mask is None else attn_mask.float()
        found = kernel.call_boxed(keys, *wide, sums, drop, causal, attn_mask=mask, scale=scale)
        return tuple(x.to(q.dtype) for x in found)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        library.impl(_BACKWARD, backward, "CPU", allow_override=True)
    return library
