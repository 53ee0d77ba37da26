"""Kernels of torch.compile, for devices that have no kernels of ours: one for each dtype, over tensors of any size.

What depends on scalars alone is computed before, on 0-dim tensors: left in the kernel, inductor computes it for each
element, and AdamW on a CPU falls from 45 to 28 GB/s for it (LOG.md). A changing rate never recompiles: scalars are tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.optim.batch import Batch, flat
from thalweg.optim.eager import Extra, Kernel, as_tensors, eager, write
from thalweg.optim.program import Program
from thalweg.optim.trace import Untraceable, Value, described, play, record, split_uniform


def inductor(program: Program) -> Kernel:
    """A kernel for programs that work element by element on wide slots.

    Raises:
        Untraceable: for others; they run eagerly there.
    """
    if program.reads != "element" or program.blocked or program.random or program.tensors:
        raise Untraceable(f"{program.rule.name} with these codecs reads more than an element, or draws")
    inputs, function = described(program, program.dtype)
    trace = record(function, inputs)
    before, rest = split_uniform(trace)
    used = {a for node in rest for a in (*node.args, *node.words.values()) if isinstance(a, Value)} | {*trace.outputs}
    numbers = [v for v in [*trace.inputs.values(), *(n.out for n in before)] if v.kind == "uniform" and v in used]
    tensors = [v for v in trace.inputs.values() if v.kind != "uniform"]
    results = [v for v in trace.outputs if v.kind != "uniform"]

    @torch.compile(fullgraph=True, dynamic=True)
    def apply(targets: list[Tensor], given: list[Tensor], skipped: Tensor | None) -> None:
        known = dict(zip([*tensors, *numbers], [*targets, *given]))
        play(rest, known, targets[0].device)
        places = [targets[0], *targets[2:]]
        for old, value in zip(places, results):
            write(old, known[value], skipped)

    by_hand = eager(program)

    def kernel(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        if not batch.ps:
            return
        device = batch.ps[0].device
        seen = [[flat(x) for x in column] for column in (batch.ps, batch.gs)]
        same = all(p.stride() == g.stride() for p, g in zip(batch.ps, batch.gs))
        if not same or any(x is None for column in seen for x in column):
            return by_hand(batch, scalars, due=due, extra=extra)
        given = as_tensors(scalars, program.exact, device)
        known = {trace.inputs[name]: given[name].to(program.exact) for name in program.scalars}
        for part, mine in zip(program.parts, batch.slots):
            if part.shape == "uniform":
                known[trace.inputs[part.name]] = mine[0]
        play(before, known, device)
        skipped = given.get("skipped")
        for i in range(len(batch.ps)):
            targets = [_flat(batch.ps[i]), _flat(batch.gs[i])]
            targets += [_flat(mine[i]) for part, mine in zip(program.parts, batch.slots) if part.shape != "uniform"]
            apply(targets, [known[v] for v in numbers], skipped)
        for part, mine, value in zip(program.parts, batch.slots, trace.outputs[1:]):
            if part.shape == "uniform":
                write(mine[0], known[value], skipped)

    return kernel


def _flat(x: Tensor) -> Tensor:
    found = flat(x)
    return x if found is None or x.ndim == 0 else found
