"""Nested plain data to frozen dataclasses and back: types are read off the annotations, every fault is named by its path."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from thalweg.core.errors import RecipeError, did_you_mean
from thalweg.core.fits import hints_of


def plain(value: Any) -> Any:
    """Dataclasses as nested plain data; what is None is left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain(inner) for name, inner in pairs if inner is not None}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def walk(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """(dotted path, value) of all leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def set_path(root: type, tree: dict[str, Any], path: str, value: Any) -> None:
    """Put ``value`` at a dotted path whose type is read off the dataclasses; a text in an open table is read as TOML."""
    *parents, leaf = (
        [name.strip('"') for name in re.findall(r'"[^"]*"|[^.]+', path)] if '"' in path else path.split(".")
    )
    kind: Any = root
    for i, name in enumerate(parents):
        here = ".".join(parents[: i + 1])
        if kind is not None:
            kind = _field_type(kind, name, ".".join(parents[:i]))
            if not (dataclasses.is_dataclass(kind) or _may_be_table(kind)):
                raise RecipeError(f"{here} is a value, not a table.", f"{path} was given.", f"Give {here} itself.")
            if typing.get_origin(kind) is not dict and isinstance(tree.get(name), str):  # a word gives way to a table
                del tree[name]
            kind = kind if dataclasses.is_dataclass(kind) else None
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{path} lies below a value.", f"{here} is {tree!r}.", "Give one or the other.")
    if kind is None:
        tree[leaf] = _literal(value)
    else:
        merge(kind, tree, {leaf: value}, ".".join(parents))


def merge(kind: Any, base: dict[str, Any], tree: Mapping[str, Any], where: str) -> None:
    """Put a nested tree over another; open tables are taken key by key."""
    for key, value in tree.items():
        wanted, path = _field_type(kind, key, where), f"{where}.{key}" if where else key
        is_table = dataclasses.is_dataclass(wanted) or typing.get_origin(wanted) is dict
        if is_table and not isinstance(value, Mapping):
            raise RecipeError(f"{path} is a table.", f"Got {value!r}.", f"Name a key in it, such as {path}.name.")
        if isinstance(value, Mapping) and not is_table and not _may_be_table(wanted):
            raise RecipeError(f"{path} is a value, not a table.", f"Got {value!r}.", f"Give {path} itself.")
        if dataclasses.is_dataclass(wanted):
            merge(wanted, base.setdefault(key, {}), value, path)
        elif is_table:
            base[key] = {**base.get(key, {}), **value}
        else:
            base[key] = value


def _may_be_table(kind: Any) -> bool:
    """Whether a field is an open table, or a word or one."""
    return any(typing.get_origin(one) is dict for one in (kind, *typing.get_args(kind)))


def _field_type(kind: Any, name: str, where: str) -> Any:
    hints = hints_of(kind)
    if name not in hints:
        path = f"{where}.{name}" if where else name
        table = f"[{where}]" if where else "a recipe"
        raise RecipeError(f"{path} is not a key of {table}.", f"{len(hints)} are known.", did_you_mean(name, hints))
    return hints[name]


def build(kind: Any, tree: Mapping[str, Any], where: str) -> Any:
    """The frozen dataclass ``kind`` from nested plain data; ``where`` is the path that led here."""
    values = {}
    for key, value in tree.items():
        wanted = _field_type(kind, key, where)
        path = f"{where}.{key}" if where else key
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{path} is a table.", f"Got {value!r}.", f"Write [{path}] and keys below it.")
            values[key] = build(wanted, value, path)
        else:
            values[key] = _convert(value, wanted, path)
    return kind(**values)


def _convert(value: Any, wanted: Any, path: str) -> Any:
    """Read ``value`` as ``wanted``; texts come from the command line and are parsed."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType) and _may_be_table(wanted):
        return _word_or_table(value, path)
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        first, *others = (a for a in typing.get_args(wanted) if a is not type(None))
        if value is None or (value == "auto" and not others):
            return None
        if others and isinstance(value, str) and not value.strip()[:1].isdigit():  # a number or a word
            return value
        return _convert(value, first, path)
    if typing.get_origin(wanted) is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path} is a table.", f"Got {value!r}.", f"Name a key in it, such as {path}.name.")
        return dict(value)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, (str, list, tuple)):
            raise RecipeError(
                f"{path}={value!r} is no list of texts.", f"Got {type(value).__name__}.", f'Write {path} = ["a", "b"].'
            )
        items = _listed(value) if isinstance(value, str) else value
        return tuple(str(item).strip() for item in items if str(item).strip())
    try:
        if wanted is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if wanted is int:
            return _whole(value)
        if wanted is float:
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        if not isinstance(value, str):
            raise ValueError
        return value
    except (ValueError, KeyError, TypeError, OverflowError):
        kinds = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
        raise RecipeError(
            f"{path}={_short(value)} is not {kinds[wanted]}.", f"Got {type(value).__name__}.", f"Give {kinds[wanted]}."
        ) from None


def _word_or_table(value: Any, path: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _literal(value)
    return dict(value) if isinstance(value, Mapping) else _convert(value, str, path)


def _listed(text: str) -> list[Any]:
    """A list as a text: a TOML array, or words with commas between them, but for those in parentheses."""
    if text.lstrip().startswith("[") and isinstance(found := _literal(text), list):
        return found
    return re.split(r",(?![^(]*\))", text)


def _whole(value: Any) -> int:
    """A whole number of 64 bits from a number or a text; 1e3 and 1000.0 are whole too."""
    if isinstance(value, bool):
        raise ValueError
    try:
        number = int(value) if isinstance(value, (int, str)) else None
    except ValueError:
        number = None
    if number is None:
        if float(value) != int(float(value)):
            raise ValueError
        number = int(float(value))
    if not -(2**63) <= number <= 2**63:
        raise ValueError
    return number


def check_options(path: str, value: Any) -> None:
    """Options are what both TOML and JSON can hold: texts, numbers, true and false, lists and tables of these."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_options(f"{path}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_options(path, inner)
    elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise RecipeError(
            f"{path} cannot be kept in a recipe.",
            f"It is {value!r}, a {type(value).__name__}.",
            "Use texts, finite numbers, true or false, lists and tables; leave out what should be None.",
        )


def _short(value: Any) -> str:
    """For messages: Python refuses to print very long numbers."""
    return "..." if isinstance(value, int) and abs(value) > 2**63 else repr(value)[:80]


def _literal(value: Any) -> Any:
    """A text from the command line as the TOML value it looks like; all else is left as it is."""
    if not isinstance(value, str):
        return value
    try:
        tree = tomllib.loads(f"v = {value}")
    except (ValueError, RecursionError):
        return value
    return tree["v"] if tree.keys() == {"v"} and "\n" not in value else value
