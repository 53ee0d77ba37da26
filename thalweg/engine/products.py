"""Which of torch's operators are products of matrices: dear to compute again, next to what else a block does."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

#: Operators of ``torch.ops.aten``, as a dispatch mode sees them; some exist on one kind of device alone.
PRODUCTS = (
    "mm",
    "addmm",
    "_addmm_activation",
    "bmm",
    "baddbmm",
    "addbmm",
    "mv",
    "addmv",
    "linear",
    "_scaled_mm",
    "_grouped_mm",
    "convolution",
    "convolution_overrideable",
    "cudnn_convolution",
    "mkldnn_convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)


def is_product(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is a product of matrices, a convolution or attention.

    Attention with dropout is none: not computed again, it would not draw, and what draws after it would draw other numbers.
    """
    dropout = _table().get(func, _NO)
    if dropout is None:
        return True
    if dropout is _NO:
        return False
    place, default = dropout
    rate = args[place] if place < len(args) else (kwargs or {}).get("dropout_p", default)
    return not rate


def product_operators() -> list[Any]:
    """Those that ``is_product`` may say yes to, but for attention that can have dropout."""
    return [func for func, dropout in _table().items() if dropout is None]


_NO: Any = (-1, 0.0)


@cache
def _table() -> dict[Any, tuple[int, float] | None]:
    """For each overload: where its rate of dropout stands among the arguments, and its default; None: it has none."""
    table: dict[Any, tuple[int, float] | None] = {}
    for name in PRODUCTS:
        packet = getattr(torch.ops.aten, name, None)
        for overload in () if packet is None else packet.overloads():
            func = getattr(packet, overload)
            named = [(k, a) for k, a in enumerate(func._schema.arguments) if a.name == "dropout_p"]
            table[func] = (named[0][0], named[0][1].default_value or 0.0) if named else None
    return table
