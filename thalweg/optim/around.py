"""Rules with one operation on whole matrices (Muon's orthogonalization): a kernel before it, and a kernel after it.

What is left between is a batched product of equal shapes, a few megabytes at a time. Eagerly the momentum, the rounding, the
scaling and the update around it cost as much as the products themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, matrix_shape
from thalweg.optim.cops import values
from thalweg.optim.csource import Port, Source, write_source
from thalweg.optim.eager import Extra, Kernel, eager, stacks
from thalweg.optim.native import Caller, compiler_or_raise, ports_of
from thalweg.optim.program import Program
from thalweg.optim.trace import COLUMNS, ROWS, WHOLE, Node, Trace, Untraceable, Value, described, record


class _Pair:
    """The two kernels of one shape of matrix, and the operation between them."""

    def __init__(self, program: Program, grad_dtype: torch.dtype, rows: int, columns: int) -> None:
        halves = _halves(program, grad_dtype, rows, columns)
        self.node, self.dtype = halves.node, halves.node.out.dtype
        self.pre, self.post = Caller(*halves.before), Caller(*halves.after)

    def __call__(self, columns: Sequence[Sequence[Tensor]], scalars: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        num = len(columns[0])
        operand = torch.empty((num, *shape), dtype=self.dtype)
        shapes = [shape] * num
        self.pre([*columns, operand.unbind()], scalars, shapes=shapes)
        result = self.node.call(operand).contiguous()
        self.post([*columns, result.unbind()], scalars, shapes=shapes)


_Written = tuple[Trace, list[Port], Source]  # what a ``Caller`` is made of


class _Halves(NamedTuple):
    """A program before and after its one operation on whole matrices, as sources that are not built yet."""

    node: Node
    before: _Written
    after: _Written


def _halves(program: Program, grad_dtype: torch.dtype, rows: int, columns: int) -> _Halves:
    """The halves for matrices of ``rows`` x ``columns``.

    Raises:
        Untraceable: for a program that works on whole matrices more than once, or otherwise than a kernel can.
    """
    inputs, function = described(program, grad_dtype)
    trace = record(function, inputs, rows=rows, columns=columns)
    whole = [node for node in trace.nodes if node.op == WHOLE]
    if len(whole) != 1:
        raise Untraceable(f"it works on whole matrices {len(whole)} times")
    node = whole[0]
    operand: Value = node.args[0]
    late = _after(trace, node.out)
    named = list(zip(["p", *(part.name for part in program.parts)], trace.outputs))
    needed = _read(trace, [out for out in trace.outputs if out in late], node.out)
    early = [(name, out) for name, out in named if out not in late and trace.inputs[name] not in needed]
    rest = [pair for pair in named if pair not in early]

    def written(
        outputs: Sequence[tuple[str, Value]], nodes: list[Node], known: dict[str, Value], port: str
    ) -> _Written:
        part = Trace(known, nodes, [value for _, value in outputs])
        ports = [*ports_of(inputs), Port(port, "full", operand.dtype)]
        return part, ports, write_source(part, ports, [name for name, _ in outputs], width=None)

    others = [other for other in trace.nodes if other is not node]
    before = [other for other in others if other.out not in late]
    return _Halves(
        node,
        written([("operand", operand), *early], before, trace.inputs, "operand"),
        written(rest, others, {**trace.inputs, "result": node.out}, "result"),
    )


def _after(trace: Trace, result: Value) -> set[Value]:
    """What depends on ``result``."""
    late = {result}
    for node in trace.nodes:
        if any(value in late for value in values(node)):
            late.add(node.out)
    return late


def _read(trace: Trace, targets: Sequence[Value], result: Value) -> set[Value]:
    """The inputs that ``targets`` are computed from, not looking behind ``result``."""
    made = {node.out: node for node in trace.nodes if node.out != result}
    wanted, seen = list(targets), set()
    while wanted:
        value = wanted.pop()
        if value not in seen:
            seen.add(value)
            wanted += values(made[value]) if value in made else []
    return seen & set(trace.inputs.values())


def around(program: Program) -> Kernel:
    """A kernel for parameters on the CPU.

    Raises:
        Untraceable: for a program that works on whole matrices more than once, periodically, or on blocks of them.
        NoCompiler: where kernels cannot be built.
    """
    if not program.stacks or program.needs_due or program.blocked or program.tensors:
        raise Untraceable("it works on whole matrices now and then, or with random numbers")
    if any(part.shape == "uniform" for part in program.parts):
        raise Untraceable("it works on whole matrices and keeps uniform numbers")
    pairs: dict[tuple[Any, ...], _Pair] = {}
    _halves(program, program.dtype, ROWS, COLUMNS)  # what cannot be compiled is known now
    compiler_or_raise()
    by_hand = eager(program, stack=True)

    def kernel(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (p, g) in enumerate(zip(batch.ps, batch.gs)):
            shape = matrix_shape(p.shape, batch.fold(i))
            lies = p.is_contiguous() and g.is_contiguous() and min(shape) > 1
            groups.setdefault((shape, g.dtype) if lies else (), []).append(i)
        for key, group in groups.items():
            if not key:
                by_hand(batch.take(program, group), scalars, due=due, extra=extra)
                continue
            shape, dtype = key
            if key not in pairs:
                pairs[key] = _Pair(program, dtype, *shape[-2:])
            for mine in stacks(group, batch.ps[group[0]].numel()):
                columns = [[column[i] for i in mine] for column in (batch.ps, batch.gs, *batch.slots)]
                pairs[key](columns, scalars, shape)
        if program.clear:
            torch._foreach_zero_(batch.gs)

    return kernel
