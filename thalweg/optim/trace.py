"""The program as a list of operations: recorded once on stand-in shapes, so that a compiler can see all of it.

Every value has a kind: "full" (each element), "row" and "column" (of a matrix), "tensor" (one number for each parameter) or
"uniform" (one number for all of them, which depends on scalars alone). The kind is what decides where a value is computed:
uniform ones once, however many elements there are. A compiler that does not know this takes a power for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.core import ThalwegError
from thalweg.optim.program import Program
from thalweg.rules._whole import recorded_by

ROWS, COLUMNS = 3, 5  # stand-ins for the extents of any matrix


#: What a program reads: name to (kind, dtype).
Inputs = dict[str, tuple[str, torch.dtype]]


class Untraceable(Exception):
    """A program that cannot be recorded: it does something other than arithmetic on elements, rows and columns."""


@dataclass(frozen=True)
class Value:
    number: int
    kind: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Node:
    """``out = op(*args, **words)``; ``compute`` is the dtype that the operands are brought to, ``call`` torch's operator."""

    op: str
    call: Any
    args: tuple[Any, ...]
    words: Mapping[str, Any]
    out: Value
    compute: torch.dtype


@dataclass
class Trace:
    """Inputs by name, operations in order, outputs."""

    inputs: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


#: The name of an operation on whole matrices, which no kernel holds.
WHOLE = "on_matrices"


def record(
    function: Callable[..., Sequence[Tensor]],
    inputs: Inputs,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> Trace:
    """The operations of ``function(**tensors)``.

    Args:
        inputs: name to (kind, dtype).
        rows, columns: of the matrices that stand in; real ones where the function reads them.

    Raises:
        Untraceable: if a shape appears that is no matrix, row, column or number.
    """
    recorder = _Recorder(rows, columns)
    tensors = {}
    shapes = {"full": (rows, columns), "row": (rows, 1), "column": (1, columns)}
    for name, (kind, dtype) in inputs.items():
        tensors[name] = torch.empty(shapes.get(kind, ()), dtype=dtype, device="meta")
        recorder.trace.inputs[name] = recorder.note(tensors[name], kind)
    try:
        with recorder, recorded_by(recorder.whole), torch.no_grad():
            outputs = function(**tensors)
    except Untraceable:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ThalwegError) as err:  # the last: of the stand-in's extents
        raise Untraceable(str(err)) from err
    recorder.trace.outputs = [recorder.value_of(out) for out in outputs]
    return recorder.trace


_KINDS = {"like": "full", "block": "row"}  # of a stored part; the other shapes are named as kinds are


def described(
    program: Program, grad_dtype: torch.dtype, *, due: int = 0, ndim: int = 2
) -> tuple[Inputs, Callable[..., Sequence[Tensor]]]:
    """(what the program reads, the program as a function of it by name), for ``record``.

    Raises:
        Untraceable: for a part with a shape of its own.
    """
    inputs: Inputs = {"p": ("full", program.dtype), "g": ("full", grad_dtype)}
    for part in program.parts:
        if callable(part.shape):
            raise Untraceable(f"{part.name} has a shape of its own")
        inputs[part.name] = (_KINDS.get(part.shape, part.shape), program.dtype_of(part))
    inputs |= dict.fromkeys(program.tensors, ("full", program.wide))
    inputs |= dict.fromkeys(program.scalars, ("uniform", program.exact))
    if program.random:
        inputs["index"] = ("full", torch.int32)

    def function(**given: Tensor) -> Sequence[Tensor]:
        return program.run(
            given["p"],
            given["g"],
            [given[part.name] for part in program.parts],
            {name: given[name] for name in program.scalars},
            index=given.get("index"),
            due=due,
            extra={name: given[name] for name in program.tensors},
            ndim=ndim,
        )

    return inputs, function


class _Recorder(TorchDispatchMode):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[tuple[int, ...], str] = {(rows, columns): "full", (rows, 1): "row", (1, columns): "column"}
        self.kinds |= dict.fromkeys([(1, 1), ()], "tensor")
        self.trace = Trace()
        self._known: dict[int, Value] = {}
        self._alive: list[Tensor] = []

    def note(self, tensor: Tensor, kind: str) -> Value:
        value = Value(len(self._alive), kind, tensor.dtype)
        self._alive.append(tensor)
        self._known[id(tensor)] = value
        return value

    def value_of(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._known:
            raise Untraceable("a tensor from outside the program")
        return self._known[id(tensor)]

    def whole(self, function: Callable[..., Tensor], x: Tensor, words: dict[str, Any]) -> Tensor:
        """Note an operation on whole matrices without running it."""
        seen = self.value_of(x)
        out = torch.empty_like(x)
        self.trace.nodes.pop()  # the making of a stand-in
        value = self.note(out, seen.kind)
        self.trace.nodes.append(Node(WHOLE, partial(function, **words), (seen,), {}, value, x.dtype))
        return out

    def _seen(self, argument: Any) -> Any:
        return self.value_of(argument) if isinstance(argument, Tensor) else argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})
        if not isinstance(out, Tensor):
            raise Untraceable(f"{func} gives no tensor")
        operands = [a for a in args if isinstance(a, Tensor)] + [a for a in kwargs.values() if isinstance(a, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if any(a is out for a in operands):
            raise Untraceable(f"{name} writes in place")
        if tuple(out.shape) not in self.kinds:
            raise Untraceable(f"{name} gives a tensor of shape {tuple(out.shape)}")
        kind = self.kinds[tuple(out.shape)]
        values = [self.value_of(a) for a in operands]
        if kind == "tensor" and all(v.kind == "uniform" for v in values):
            kind = "uniform"
        value = self.note(out, kind)
        compute = out.dtype
        if operands and out.dtype == torch.bool:
            numbers: list[Any] = [a for a in args if isinstance(a, (Tensor, int, float))]
            compute = operands[0].dtype if len(numbers) < 2 else torch.result_type(*numbers[:2])
        words = {k: self._seen(v) for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory")}
        node = Node(name, func, tuple(map(self._seen, args)), words, value, compute)
        self.trace.nodes.append(node)
        return out


def split_uniform(trace: Trace) -> tuple[list[Node], list[Node]]:
    """(what depends on scalars alone, the rest): the first is computed once a step, however many elements there are."""
    uniform = [node for node in trace.nodes if node.out.kind == "uniform"]
    return uniform, [node for node in trace.nodes if node.out.kind != "uniform"]


def play(nodes: Sequence[Node], known: dict[Value, Tensor], device: torch.device) -> None:
    """Run recorded operations on real tensors; results join ``known``."""

    def real(argument: Any) -> Any:
        return known[argument] if isinstance(argument, Value) else argument

    for node in nodes:
        words = {name: real(value) for name, value in node.words.items()}
        if node.op in ("scalar_tensor", "full"):
            words["device"] = device
        known[node.out] = node.call(*map(real, node.args), **words)
