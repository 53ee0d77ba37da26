"""A state of plain objects as JSON and tensors, and back as it was: nothing is pickled, so nothing read back can execute."""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KIND = "kind"
_PLAIN = (type(None), bool, int, str)
_DTYPES = (
    "bool",
    *(f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)


class Uncodable(TypeError):
    """A value that is neither plain nor a tensor; the text names its place and its type."""


def encode(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold, and the tensors by name.

    Args:
        value: None, bool, int, float, str, bytes; dicts with any such keys, lists, tuples and sets of them; numpy arrays and
            scalars of numbers; tensors on the CPU. Of these types exactly: of a subclass it is not known what it adds.

    Raises:
        Uncodable: for anything else.

    >>> facts, tensors = encode({1: (2.5, b"x"), "rng": torch.arange(3)})
    >>> decode(facts, tensors)
    {1: (2.5, b'x'), 'rng': tensor([0, 1, 2])}
    """
    tensors: dict[str, Tensor] = {}
    return _encode(value, "state", tensors), tensors


def decode(facts: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that ``encode`` was given.

    Raises:
        ValueError: for facts that it did not make.
    """
    if isinstance(facts, list):
        return [decode(item, tensors) for item in facts]
    if not isinstance(facts, dict):
        return facts
    read = _READ.get(str(facts.get(_KIND)))
    if read is None:
        raise ValueError(f"a state of no known kind: {str(facts)[:60]}")
    try:
        return read(facts["value"], tensors)
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"a state that is not whole: {facts[_KIND]}: {err!r}") from None


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(value)
    if kind in _PLAIN or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return _kind("float", repr(value))
    if kind is list:
        return [_encode(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
    if kind in (tuple, set, frozenset):
        return _kind(kind.__name__, [_encode(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)])
    if kind in (dict, OrderedDict):
        pairs = [
            [_encode(key, f"key {key!r} of {place}", tensors), _encode(item, f"{place}[{key!r}]", tensors)]
            for key, item in value.items()
        ]
        return _kind(kind.__name__, pairs)
    if kind is bytes:
        return _kind("bytes", base64.b64encode(value).decode())
    if kind is Tensor:
        return _kind("tensor", _keep(value, place, tensors))
    if kind is np.ndarray or isinstance(value, np.generic):
        if value.dtype.name not in _DTYPES or not value.dtype.isnative:
            raise Uncodable(f"{place} is a numpy {value.dtype}")
        # asarray + copy keep a shape of no dimension, and leave torch memory that it may write to
        held = _keep(torch.from_numpy(np.asarray(value).copy()), place, tensors)
        return _kind("array" if kind is np.ndarray else "number", held)
    raise Uncodable(f"{place} is a {kind.__module__}.{kind.__qualname__}")


def _kind(name: str, value: Any) -> dict[str, Any]:
    return {_KIND: name, "value": value}


def _keep(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> str:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        raise Uncodable(f"{place} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}")
    if tensor.requires_grad:
        raise Uncodable(f"{place} is a tensor that asks for a gradient")
    name = f"t{len(tensors)}"
    tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return name


def _pairs(value: Any, tensors: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
    return [(decode(key, tensors), decode(item, tensors)) for key, item in value]


_READ: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "float": lambda value, _: float(value),
    "bytes": lambda value, _: base64.b64decode(value, validate=True),
    "tuple": lambda value, tensors: tuple(decode(value, tensors)),
    "set": lambda value, tensors: set(decode(value, tensors)),
    "frozenset": lambda value, tensors: frozenset(decode(value, tensors)),
    "dict": lambda value, tensors: dict(_pairs(value, tensors)),
    "OrderedDict": lambda value, tensors: OrderedDict(_pairs(value, tensors)),
    "tensor": lambda value, tensors: tensors[value].clone(),
    "array": lambda value, tensors: tensors[value].clone().numpy(),
    "number": lambda value, tensors: tensors[value].numpy()[()],
}
