"""The memory of small tensors on the CPU, for Python to reckon in: 0.04 us a number, where torch's operators take 1 to 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def memory(tensor: Tensor) -> Any:
    """The elements of a contiguous tensor on the CPU, live: what is written there stands in the tensor.

    Arithmetic on them is Python's, in double precision; what is written is rounded to the tensor's dtype, as torch rounds it.

    >>> import torch
    >>> number = torch.zeros((), dtype=torch.float32)
    >>> memory(number)[0] = 1 / 3
    >>> number == torch.tensor(1 / 3, dtype=torch.float32)
    tensor(True)
    """
    numbers: Any = tensor.detach().view(-1).numpy()
    return memoryview(numbers)


def over(a: float, b: float) -> float:
    """``a / b`` as tensors divide: infinite or NaN where ``b`` is 0.

    >>> over(1.0, 0.0), over(0.0, 0.0)
    (inf, nan)
    """
    if b:
        return a / b
    return a * float("inf")
