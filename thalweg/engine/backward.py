"""The backward pass of a micro-batch, past what torch looks at first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ENGINE: Any = torch.autograd.Variable._execution_engine


def backward(total: Tensor, start: Tensor) -> None:
    """``torch.autograd.backward``, of one tensor from a gradient of its own shape and dtype.

    Torch's function compares shapes by its symbolic ones: that imports sympy (half a second, once) and takes 30 us a call, a
    tenth of a small model's passes. Whoever stands in for the function, or for tensors, is asked as ever.

    Args:
        total: a scalar.
        start: its gradient.
    """
    if type(total) is Tensor and not torch._C._is_torch_function_mode_enabled():
        _ENGINE.run_backward((total,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        torch.autograd.backward(total, start)
