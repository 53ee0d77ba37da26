"""Whether a value is of its annotation's type, all the way down: for what is read back from files that anybody may have changed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from functools import cache
from typing import Any


def misfit(value: Any, kind: Any, where: str) -> str:
    """What does not fit, by its path; an empty text where all does.

    >>> misfit((1, "b"), tuple[int, ...], "shape")
    "shape[1] is 'b'"
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return ""
    if origin in (typing.Union, types.UnionType):
        found = [misfit(value, one, where) for one in inner]
        return "" if "" in found else found[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):
            return _told(value, where)
        pairs = ((getattr(value, name), hint, f"{where}.{name}") for name, hint in hints_of(kind).items())
        return next((text for text in itertools.starmap(misfit, pairs) if text), "")
    if origin is tuple and inner[1:] == (...,):
        if not isinstance(value, tuple):
            return _told(value, where)
        return next((text for i, one in enumerate(value) if (text := misfit(one, inner[0], f"{where}[{i}]"))), "")
    if origin is dict:
        if not isinstance(value, dict):
            return _told(value, where)
        return next((text for key, one in value.items() if (text := misfit(one, inner[1], f"{where}.{key}"))), "")
    if kind is type(None):
        return "" if value is None else _told(value, where)
    return "" if _is_plain(value, kind) else _told(value, where)


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e308 and math.isfinite(value)
    return type(value) is kind and (kind is not int or -(2**63) <= value < 2**63)


@cache
def hints_of(kind: typing.Hashable) -> dict[str, Any]:
    """The types of a dataclass's fields: texts in the source, and each asking of Python would compile all of them again."""
    return typing.get_type_hints(kind)


def _told(value: Any, where: str) -> str:
    huge = isinstance(value, int) and abs(value) >= 2**63  # Python refuses to print very long numbers
    return f"{where} is {'a number of many digits' if huge else repr(value)[:60]}"
