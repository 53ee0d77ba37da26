"""C for one recorded operation: types, literals, loads and expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from thalweg.optim.trace import Node, Untraceable, Value

#: What a value is in registers.
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.uint8: "uint8_t",
    torch.bool: "int32_t",
    torch.bfloat16: "float",  # in registers; rounded when it is made
    torch.float16: "float",
}
#: What it is in memory.
STORED = {**TYPES, torch.bfloat16: "uint16_t", torch.float16: "_Float16", torch.bool: "uint8_t"}

REDUCTIONS = ("sum", "mean", "amax", "amin", "linalg_vector_norm", "norm")
#: Operations that give their operand as it is.
SAME = ("detach", "alias", "clone", "expand", "view", "_unsafe_view", "reshape", "contiguous", "lift_fresh_copy")


def values(node: Node) -> list[Value]:
    """The values that an operation reads."""
    return [a for a in (*node.args, *node.words.values()) if isinstance(a, Value)]


def first_of(node: Node) -> Value:
    """The first value that an operation reads; of a sum, what is summed."""
    return values(node)[0]


def expression(node: Node, made: Mapping[Value, Node]) -> str:
    """The right-hand side that computes a recorded operation.

    Args:
        made: the operation that each value comes from.

    Raises:
        Untraceable: for an operation that has no C here.
    """
    op, words = node.op, node.words
    kind = TYPES[node.compute]
    args = [operand(a, kind) for a in node.args]
    suffix = "f" if kind == "float" else ""
    if op in SAME and not isinstance(node.args[-1], torch.dtype):
        return args[0]
    if op in REDUCTIONS:  # over an extent of one
        return f"fabs{suffix}({args[0]})" if "norm" in op else args[0]
    if op == "view":
        raw = operand(node.args[0], TYPES[node.args[0].dtype])
        return {torch.int32: f"i_of_f({raw})", torch.float32: f"f_of_i({raw})"}[node.out.dtype]
    if op == "_to_copy":
        raw = operand(node.args[0], TYPES[node.args[0].dtype])
        if node.out.dtype == torch.bfloat16:
            return raw if _has_no_low_bits(node.args[0], made) else f"bf16_round((float){raw})"
        if node.out.dtype == torch.float16:
            return f"(float)(_Float16){raw}"
        if node.out.dtype == torch.bool:
            return f"({raw} != 0)"
        return f"({TYPES[node.out.dtype]})({raw})"
    alpha = words.get("alpha", 1)
    scaled = args[1] if len(args) > 1 else ""
    if alpha != 1:
        scaled = f"{operand(alpha, kind)} * {scaled}"
    table: dict[str, Callable[[], str]] = {
        "add": lambda: f"{args[0]} + {scaled}",
        "sub": lambda: f"{args[0]} - {scaled}",
        "rsub": lambda: f"{args[1]} - {args[0]}",
        "mul": lambda: f"{args[0]} * {args[1]}",
        "div": lambda: f"{args[0]} / {args[1]}",
        "neg": lambda: f"-{args[0]}",
        "abs": lambda: f"fabs{suffix}({args[0]})" if "int" not in kind else f"abs({args[0]})",
        "sqrt": lambda: f"sqrt{suffix}({args[0]})",
        "rsqrt": lambda: f"1 / sqrt{suffix}({args[0]})",
        "reciprocal": lambda: f"1 / {args[0]}",
        "sign": lambda: f"({kind})(({args[0]} > 0) - ({args[0]} < 0))",
        "sgn": lambda: f"({kind})(({args[0]} > 0) - ({args[0]} < 0))",
        "square": lambda: f"{args[0]} * {args[0]}",
        "pow": lambda: _power(node, args, kind),
        "lerp": lambda: _lerp(*args),
        "addcmul": lambda: f"{args[0]} + {operand(words.get('value', 1), kind)} * {args[1]} * {args[2]}",
        "addcdiv": lambda: f"{args[0]} + {operand(words.get('value', 1), kind)} * {args[1]} / {args[2]}",
        "maximum": lambda: f"{args[0]} > {args[1]} ? {args[0]} : {args[1]}",
        "minimum": lambda: f"{args[0]} < {args[1]} ? {args[0]} : {args[1]}",
        "clamp": lambda: _clamp(node, args, words, kind),
        "clamp_min": lambda: f"{args[0]} < {args[1]} ? {args[1]} : {args[0]}",
        "clamp_max": lambda: f"{args[0]} > {args[1]} ? {args[1]} : {args[0]}",
        "where": lambda: f"{operand(node.args[0], 'int32_t')} ? {args[1]} : {args[2]}",
        "gt": lambda: f"{args[0]} > {args[1]}",
        "ge": lambda: f"{args[0]} >= {args[1]}",
        "lt": lambda: f"{args[0]} < {args[1]}",
        "le": lambda: f"{args[0]} <= {args[1]}",
        "eq": lambda: f"{args[0]} == {args[1]}",
        "ne": lambda: f"{args[0]} != {args[1]}",
        "logical_and": lambda: f"{args[0]} && {args[1]}",
        "logical_or": lambda: f"{args[0]} || {args[1]}",
        "logical_not": lambda: f"!{args[0]}",
        "bitwise_not": lambda: f"!{args[0]}" if node.out.dtype == torch.bool else f"~{args[0]}",
        "bitwise_and": lambda: _shifted(node, made) or f"{args[0]} & {args[1]}",
        "bitwise_or": lambda: f"{args[0]} | {args[1]}",
        "bitwise_xor": lambda: f"{args[0]} ^ {args[1]}",
        "__rshift__": lambda: f"{args[0]} >> {args[1]}",
        "bitwise_right_shift": lambda: f"{args[0]} >> {args[1]}",
        "exp": lambda: f"exp{suffix}({args[0]})",
        "expm1": lambda: f"expm1{suffix}({args[0]})",
        "log": lambda: f"log{suffix}({args[0]})",
        "tanh": lambda: f"tanh{suffix}({args[0]})",
        "sin": lambda: f"sin{suffix}({args[0]})",
        "cos": lambda: f"cos{suffix}({args[0]})",
        "floor": lambda: f"floor{suffix}({args[0]})",
        "ceil": lambda: f"ceil{suffix}({args[0]})",
        "remainder": lambda: f"({args[0]} - {args[1]} * floor{suffix}({args[0]} / {args[1]}))",
        "zeros_like": lambda: f"({kind})0",
        "ones_like": lambda: f"({kind})1",
        "full_like": lambda: args[1],
        "full": lambda: args[1],
        "scalar_tensor": lambda: args[0],
        "isnan": lambda: f"{args[0]} != {args[0]}",
    }
    if op not in table:
        raise Untraceable(f"no C for {op}")
    return table[op]()


def _shifted(node: Node, made: Mapping[Value, Node]) -> str | None:
    """A shift to the right whose copies of the sign are masked off is one shift of a number without sign, not two steps."""
    source, mask = node.args
    shift = made.get(source) if isinstance(source, Value) and source.dtype == torch.int32 else None
    if shift is None or shift.op not in ("__rshift__", "bitwise_right_shift"):
        return None
    of, places = shift.args
    if not isinstance(places, int) or not 0 < places < 32 or mask != (1 << (32 - places)) - 1:
        return None
    return f"(int32_t)((uint32_t){operand(of, 'int32_t')} >> {places})"


def _has_no_low_bits(value: Value, made: Mapping[Value, Node]) -> bool:
    """Whether a float32 is a bfloat16 already: its lower half has been masked off."""
    while value in made and made[value].op in ("view", "detach"):
        value = next(iter(values(made[value])))
    node = made.get(value)
    return node is not None and node.op == "bitwise_and" and node.args[1] == -65536


def operand(value: Any, kind: str) -> str:
    """An argument of an operation, brought to the C type ``kind``."""
    if isinstance(value, Value):
        return f"v{value.number}" if TYPES[value.dtype] == kind else f"({kind})v{value.number}"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return _literal(value, kind)
    return ""


def _lerp(a: str, b: str, weight: str) -> str:
    """From the nearer end, as torch does: a + weight*(b - a) loses b's low bits where the weight is near 1."""
    return f"({weight} < 0.5f && {weight} > -0.5f ? {a} + {weight} * ({b} - {a}) : {b} - ({b} - {a}) * (1 - {weight}))"


def _literal(number: float, kind: str) -> str:
    if "int" in kind:
        return f"({int(number)})"
    if math.isinf(number):
        return "INFINITY" if number > 0 else "-INFINITY"
    if math.isnan(number):
        return "NAN"
    return f"({float(number).hex()}{'f' if kind == 'float' else ''})"


def load(array: str, index: str, dtype: torch.dtype) -> str:
    """An element of a stored tensor, as the type that it is computed in."""
    stored = STORED[dtype]
    place = f"(({stored} *){array})[{index}]"
    if dtype == torch.bfloat16:
        return f"bf16load({place})"
    return place if stored == TYPES[dtype] else f"({TYPES[dtype]}){place}"


def _power(node: Node, args: Sequence[str], kind: str) -> str:
    exponent = node.args[1]
    if exponent == 2:
        return f"{args[0]} * {args[0]}"
    if exponent == 0.5:
        return f"sqrt{'f' if kind == 'float' else ''}({args[0]})"
    return f"pow{'f' if kind == 'float' else ''}({args[0]}, {args[1]})"


def _clamp(node: Node, args: Sequence[str], words: Any, kind: str) -> str:
    low = node.args[1] if len(node.args) > 1 else words.get("min")
    high = node.args[2] if len(node.args) > 2 else words.get("max")
    text = args[0]
    if low is not None:
        text = f"({text} < {operand(low, kind)} ? {operand(low, kind)} : {text})"
    if high is not None:
        text = f"({text} > {operand(high, kind)} ? {operand(high, kind)} : {text})"
    return text
