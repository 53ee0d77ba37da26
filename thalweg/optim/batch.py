"""Parameters that are updated together: what a way of running is given, and how each tensor is looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thalweg.device import seeded
from thalweg.optim.codecs import BLOCK, Part
from thalweg.optim.program import Program

#: How a parameter of more than two dimensions becomes matrices: "batch": the last two are a matrix; "flatten": the first
#: against all others, as a convolution's kernel.
FOLDS = ("batch", "flatten")


def fold_of(shape: Sequence[int]) -> str:
    """The usual fold of a shape: three dimensions are a batch of matrices (experts), four and more a convolution."""
    return "flatten" if len(shape) > 3 else "batch"


def matrix_shape(shape: Sequence[int], fold: str) -> tuple[int, ...]:
    """(..., R, C) of a parameter; a vector is one row.

    >>> matrix_shape((8, 3, 5, 5), "flatten"), matrix_shape((4, 6, 7), "batch"), matrix_shape((9,), "batch")
    ((8, 75), (4, 6, 7), (1, 9))
    """
    if len(shape) < 2:
        return (1, math.prod(shape))
    if fold == "flatten":
        return (shape[0], math.prod(shape[1:]))
    return tuple(shape)


@dataclass
class Batch:
    """Parameters of one dtype, device and set of hyper-parameters, updated the same number of times.

    Attributes:
        ps, gs: parameters and their gradients.
        slots: by stored part, a list as long as ``ps``; of a uniform part, a list of one.
        folds: how each parameter becomes matrices.
        taken: uniform parts of what was taken out of it last.
        firsts: number of the first element of each parameter, which random bits are drawn by; empty: they follow each other.
    """

    ps: list[Tensor]
    gs: list[Tensor]
    slots: list[list[Tensor]]
    folds: list[str] = field(default_factory=list)
    taken: list[list[Tensor]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)

    def fold(self, i: int) -> str:
        return self.folds[i] if self.folds else fold_of(self.ps[i].shape)

    def take(self, program: Program, which: Sequence[int]) -> Batch:
        """The parameters numbered ``which``, with uniform parts of their own: each part of a batch starts from the same."""
        slots = slots_of(program, self.slots, which)
        folds = [self.folds[i] for i in which] if self.folds else []
        firsts = [self.firsts[i] for i in which] if self.firsts else []
        self.taken = slots
        return Batch([self.ps[i] for i in which], [self.gs[i] for i in which], slots, folds, firsts=firsts)

    def adopt_uniform(self, program: Program) -> None:
        """Take over the uniform parts of what was taken last; all of them are equal."""
        for part, mine, theirs in zip(program.parts, self.slots, self.taken):
            if part.shape == "uniform":
                mine[0].copy_(theirs[0])


def new_part(program: Program, part: Part, p: Tensor, fold: str, device: torch.device | None = None) -> Tensor:
    """The first value of a stored part of ``p``'s slots, on its device or another."""
    dtype, device = program.dtype_of(part), device or p.device
    if part.shape == "like":
        if p.is_meta:  # what follows would import half of torch's compiler for it
            return torch.empty_strided(p.size(), p.stride(), dtype=dtype, device=device)
        if part.start == "param":
            return p.detach().to(device, dtype, copy=True, memory_format=torch.preserve_format)
        return torch.full_like(p, float(part.start), dtype=dtype, device=device, memory_format=torch.preserve_format)
    shape = matrix_shape(p.shape, fold)
    if callable(part.shape):
        shape = part.shape(shape)
    elif part.shape == "block":
        shape = (-(-p.numel() // BLOCK),)
    else:
        shape = {"row": (*shape[:-1], 1), "column": (*shape[:-2], 1, shape[-1])}.get(part.shape, ())
    if part.start == "eye":
        return torch.eye(shape[-1], dtype=dtype, device=device).expand(shape).clone()
    return torch.full(shape, float(part.start), dtype=dtype, device=device)


def new_slots(
    program: Program, part: Part, ps: Sequence[Tensor], folds: Sequence[str], device: torch.device | None = None
) -> list[Tensor]:
    """The first values of a stored part, with the parameters or on ``device``: one for each, one alone of a uniform part."""
    held = 1 if part.shape == "uniform" else len(ps)
    return [new_part(program, part, p, fold, device) for p, fold in zip(ps[:held], folds[:held])]


def slots_of(program: Program, slots: Sequence[list[Tensor]], which: Sequence[int]) -> list[list[Tensor]]:
    """The slots of the parameters numbered ``which``: the same tensors, but for copies of the uniform parts."""
    return [
        [mine[0].clone()] if part.shape == "uniform" else [mine[i] for i in which]
        for part, mine in zip(program.parts, slots)
    ]


def is_sharded(xs: Sequence[Tensor]) -> bool:
    """Whether any of the tensors is a DTensor; asked without importing torch.distributed."""
    return any(hasattr(x, "device_mesh") for x in xs)


def normal_like(p: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal numbers in the shape of ``p``, the same for the same seed."""
    generator = seeded(p.device, seed)
    return torch.randn(p.shape, generator=generator, device=generator.device, dtype=dtype).to(p.device)


def views(program: Program, batch: Batch, i: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Parameter, gradient and stored parts of parameter ``i`` in the shapes that the program asks for."""
    p, g = batch.ps[i], batch.gs[i]
    stored = [mine[0 if part.shape == "uniform" else i] for part, mine in zip(program.parts, batch.slots)]
    if program.folds:
        shape = matrix_shape(p.shape, batch.fold(i))
        like = [k for k, part in enumerate(program.parts) if part.shape == "like"]
        stored = [s.reshape(shape) if k in like else s for k, s in enumerate(stored)]
        return p.reshape(shape), g.reshape(shape), stored
    if not p.ndim:  # a number is seen as a vector of one: 0-dim tensors promote like scalars
        return (
            p.reshape(1),
            g.reshape(1),
            [s.reshape(1) if part.shape == "like" else s for part, s in zip(program.parts, stored)],
        )
    return p, g, stored


def evaluation_weights(program: Program, batch: Batch) -> list[Tensor] | None:
    """What to evaluate and to ship in place of the live parameters: a kept average, or what the rule makes of its slots.

    None where the live parameters are it.
    """
    names = [part.name for part in program.parts]
    if "average" in names:
        return batch.slots[names.index("average")]
    for piece in program.pieces:
        evaluate = getattr(piece.component, "evaluate", None)
        if evaluate is not None:
            places = [names.index(slot.name) for slot in program.slots[piece.first : piece.first + piece.num]]
            found = []
            for i, p in enumerate(batch.ps):
                slots = [batch.slots[k][0 if program.parts[k].shape == "uniform" else i].to(p.device) for k in places]
                found.append(evaluate(p.to(program.wide), *slots, **piece.options).to(p.dtype))
            return found
    return None


def blocks(x: Tensor, part: Part | None = None) -> Tensor:
    """A flat tensor as rows of ``BLOCK``, the last filled up with zeros, or with the code of zero of a stored ``part``."""
    missing = -x.numel() % BLOCK
    zero = float(part.start) if part is not None and x.dtype == torch.uint8 else 0.0
    return torch.nn.functional.pad(x, (0, missing), value=zero).view(-1, BLOCK)


def flat(x: Tensor) -> Tensor | None:
    """A dense tensor's elements in the order of memory, or None where there are gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1)
    if x.numel() and is_dense(x):
        return x.as_strided((x.numel(),), (1,))
    return None


def is_dense(x: Tensor) -> bool:
    """Whether the tensor's elements fill its storage span, each once: any permutation of a contiguous layout."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride()) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def laid_like(xs: Sequence[Tensor], ps: Sequence[Tensor]) -> list[Tensor]:
    """``xs`` with the strides of the parameters, copied where they differ."""
    return [x if x.stride() == p.stride() else torch.empty_like(p, dtype=x.dtype).copy_(x) for x, p in zip(xs, ps)]


def offsets(batch: Batch) -> Iterator[int]:
    """Number of the first element of each parameter: what the random bits are drawn by."""
    if batch.firsts:
        yield from batch.firsts
        return
    place = 0
    for p in batch.ps:
        yield place
        place += p.numel()
