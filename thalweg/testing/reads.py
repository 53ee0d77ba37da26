"""Finds what reads a tensor back to Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class HostRead(Exception):
    """A value was brought to the host."""


class _Refuse(TorchDispatchMode):
    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if name in self.names or masked:  # a mask as an index hangs the shape on values
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    """Within it, whatever brings a tensor's value to Python raises ``HostRead``."""
    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    kept = {name: torch.Tensor.__dict__.get(name) for name in names}

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*_: Any, **__: Any) -> Any:
            raise HostRead(f"Tensor.{name}")

        return refuse

    for name in names:
        setattr(torch.Tensor, name, refusing(name))
    try:
        with _Refuse():
            yield
    finally:
        for name, old in kept.items():
            if old is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, old)
