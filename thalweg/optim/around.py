"""Rules with one operation on whole matrices (Muon's orthogonalization): a kernel before it, and a kernel after it.

What is left between is a batched product of equal shapes, a few megabytes at a time. Eagerly the momentum, the rounding, the
scaling and the update around it cost as much as the products themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, matrix_shape
from thalweg.optim.cops import values
from thalweg.optim.csource import Port, write_source
from thalweg.optim.eager import STACK, Extra, Kernel, eager
from thalweg.optim.native import Caller, Inputs, described
from thalweg.optim.program import Program
from thalweg.optim.trace import WHOLE, Node, Trace, Untraceable, Value, record


class _Pair:
    """The two kernels of one shape of matrix, and the operation between them."""

    def __init__(self, program: Program, grad_dtype: torch.dtype, rows: int, columns: int) -> None:
        inputs, ports, function = described(program, grad_dtype, 0, 2)
        trace = record(function, inputs, rows=rows, columns=columns)
        whole = [node for node in trace.nodes if node.op == WHOLE]
        if len(whole) != 1:
            raise Untraceable(f"it works on whole matrices {len(whole)} times")
        self.node = whole[0]
        operand: Value = self.node.args[0]
        self.dtype = operand.dtype
        late = _after(trace, self.node.out)
        names = ["p", *(part.name for part in program.parts)]
        needed = _read(trace, [out for out in trace.outputs if out in late], self.node.out)
        early = [
            (name, out)
            for name, out in zip(names, trace.outputs)
            if out not in late and trace.inputs[name] not in needed
        ]
        rest = [(name, out) for name, out in zip(names, trace.outputs) if (name, out) not in early]
        before = [node for node in trace.nodes if node.out not in late and node is not self.node]
        after = [node for node in trace.nodes if node is not self.node]
        self.pre = _caller(
            inputs, trace.inputs, before, [("operand", operand), *early], ports, Port("operand", "full", self.dtype)
        )
        known = {**trace.inputs, "result": self.node.out}
        self.post = _caller(inputs, known, after, rest, ports, Port("result", "full", self.dtype))

    def __call__(self, columns: Sequence[Sequence[Tensor]], scalars: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        num = len(columns[0])
        operand = torch.empty((num, *shape), dtype=self.dtype)
        shapes = [shape] * num
        self.pre([*columns, operand.unbind()], scalars, shapes=shapes)
        result = self.node.call(operand).contiguous()
        self.post([*columns, result.unbind()], scalars, shapes=shapes)


def _caller(
    inputs: Inputs,
    values_of: Mapping[str, Value],
    nodes: list[Node],
    outputs: Sequence[tuple[str, Value]],
    ports: Sequence[Port],
    extra: Port,
) -> Caller:
    trace = Trace(dict(values_of), nodes, [value for _, value in outputs])
    mine = [*ports, extra]
    return Caller(trace, mine, write_source(trace, mine, [name for name, _ in outputs], width=None))


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
    _Pair(program, program.dtype, 3, 5)  # what cannot be compiled is known now
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
            many = max(1, STACK // max(batch.ps[group[0]].numel(), 1))
            for start in range(0, len(group), many):
                mine = group[start : start + many]
                columns = [[column[i] for i in mine] for column in (batch.ps, batch.gs, *batch.slots)]
                pairs[key](columns, scalars, shape)
        if program.clear:
            torch._foreach_zero_(batch.gs)

    return kernel
