"""The schedule language as text. It is read, never run: names of pieces, plain values, ``>>`` and ``*``, and nothing else."""

from __future__ import annotations

import ast
from typing import Any

from thalweg.core import RecipeError
from thalweg.schedules.language import Schedule
from thalweg.schedules.makers import COMPOSITIONS, piece
from thalweg.schedules.span import BARE


def parse(text: str | Schedule) -> Schedule:
    """Read the schedule language; lengths with a unit may stand without quotes: ``warmup(5%)``, ``hold(2 epochs)``.

    >>> str(parse("warmup(5%) >> cosine(to=0.1)"))
    "warmup('5%') >> cosine(to=0.1)"
    >>> str(parse("0.5 * warmup(10k examples)"))
    "0.5 * warmup('10k examples')"
    """
    if isinstance(text, Schedule):
        return text
    if not isinstance(text, str):
        raise _unreadable(str(text), f"Its type is {type(text).__name__}, and a schedule is a text.")
    quoted = BARE.sub(r"'\1'", text)
    try:
        found = _read(ast.parse(quoted.strip(), mode="eval").body, text)
    except RecipeError:
        raise
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise _unreadable(text, "It is not an expression.") from None
    if not isinstance(found, Schedule):
        raise _unreadable(text, "It is a number, not a piece.")
    return found


def _unreadable(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"The schedule {text[:200]!r} cannot be read.",
        why,
        "Write pieces in a row, such as 'warmup(100) >> cosine(to=0.1)'.",
    )


def _read(node: ast.expr, text: str) -> Schedule | float:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.RShift, ast.Mult)):
        left, right = _read(node.left, text), _read(node.right, text)
        if isinstance(node.op, ast.Mult) and (isinstance(left, Schedule) or isinstance(right, Schedule)):
            return left * right
        if isinstance(left, Schedule) and isinstance(right, Schedule):
            return left >> right
        raise _unreadable(text, "A number stands where a piece should.")
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    name = _name(node.func) if isinstance(node, ast.Call) else None
    if isinstance(node, ast.Call) and name is not None:
        if len({k.arg for k in node.keywords}) < len(node.keywords):
            raise _unreadable(text, f"An option of {name} is given twice.")
        words = {k.arg or "**": _value(k.value, name, text) for k in node.keywords}
        if name in COMPOSITIONS:
            return _composed(name, [_argument(arg, name, text) for arg in node.args], words, text)
        if len(node.args) <= 1:
            return piece(name, *(_value(arg, name, text) for arg in node.args), **words)
    raise _unreadable(text, f"'{ast.unparse(node)[:80]}' is not a piece.")


def _name(node: ast.expr) -> str | None:
    """``cosine``, or ``torch.StepLR``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _composed(name: str, arguments: list[Any], words: dict[str, Any], text: str) -> Schedule:
    try:
        return COMPOSITIONS[name](*arguments, **words)
    except TypeError:
        raise _unreadable(text, f"The arguments of {name} are not what it takes.") from None


def _argument(node: ast.expr, name: str, text: str) -> Any:
    """A schedule, or a plain value."""
    return _read(node, text) if isinstance(node, (ast.BinOp, ast.Call)) else _value(node, name, text)


def _value(node: ast.expr, name: str, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _unreadable(text, f"The arguments of {name} are not plain values.") from None
