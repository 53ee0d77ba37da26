"""How numbers are kept: wide values in the maths, few bits in memory, one pair of pure functions for each form.

A codec's ``decode`` turns what is stored into a wide tensor and ``encode`` turns the new value back. Rounding is stochastic
where a running mean would otherwise stall: a step smaller than half a unit in the last place is lost by rounding to
nearest, and right on average by rounding up with the probability of the remainder. The random bits are a hash of (key,
element): the same in every way of running, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thalweg.device.counters import hashed as hashed
from thalweg.rules import Slot

BLOCK = 256  # elements that share a scale


@dataclass(frozen=True)
class Part:
    """One stored tensor of a slot.

    Attributes:
        name: in state dicts.
        shape: as for ``Slot``, or "block": one number for each ``BLOCK`` elements.
        dtype: of what is stored; None: the dtype of the maths.
        start: first value.
    """

    name: str
    shape: str | Callable[[tuple[int, ...]], tuple[int, ...]]
    dtype: torch.dtype | None
    start: float | str = 0.0


@dataclass(frozen=True)
class Codec:
    """A form of storage: its parts, and the functions between them and the wide value.

    ``encode(x, bits, signed)`` gets 16 random bits an element (int32), or None where it does not ask for any.
    """

    name: str
    parts: Callable[[Slot], tuple[Part, ...]] = field(repr=False)
    decode: Callable[[Sequence[Tensor], torch.dtype, bool], Tensor] = field(repr=False)
    encode: Callable[[Tensor, Tensor | None, bool], tuple[Tensor, ...]] = field(repr=False)
    random: bool = False
    blocked: bool = False


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 of ``x``, as float32 has it, up or down with the probability that makes the mean exact; ``bits``: 16 an element."""
    raw = x.to(torch.float32).view(torch.int32) + bits
    return (raw & -65536).view(torch.float32).to(torch.bfloat16)


def with_error(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` in a narrower dtype, and what rounding took from it."""
    near = x.to(dtype)
    return near, (x - near.to(x.dtype)).to(dtype)


def _plain(slot: Slot) -> tuple[Part, ...]:
    return (Part(slot.name, slot.shape, None, slot.start),)


FULL = Codec("full", _plain, lambda stored, wide, signed: stored[0].to(wide), lambda x, bits, signed: (x,))

BF16 = Codec(
    "bf16",
    lambda slot: (Part(slot.name, slot.shape, torch.bfloat16, slot.start),),
    lambda stored, wide, signed: stored[0].to(wide),
    lambda x, bits, signed: (round_to_bf16(x, _given(bits)),),
    random=True,
)

BF16_ERROR = Codec(
    "bf16+error",
    lambda slot: (
        Part(slot.name, slot.shape, torch.bfloat16, slot.start),
        Part(f"{slot.name}.error", slot.shape, torch.bfloat16),
    ),
    lambda stored, wide, signed: stored[0].to(wide) + stored[1].to(wide),
    lambda x, bits, signed: with_error(x, torch.bfloat16),
)


def _decode_int8(stored: Sequence[Tensor], wide: torch.dtype, signed: bool) -> Tensor:
    codes, scale = stored
    if signed:  # 255 codes around 128, the square of the code: finer near zero
        code = codes.to(wide) - 128
        return scale.to(wide) * (1 / 127**2) * (code * code.abs())
    square = codes.to(wide) * codes.to(wide)  # the fourth power of the code: nearly ten decades
    return scale.to(wide) * (1 / 255**4) * (square * square)


def _encode_int8(x: Tensor, bits: Tensor | None, signed: bool) -> tuple[Tensor, Tensor]:
    """One of the two codes around x, drawn so that the mean of the decoded values is x."""
    scale = x.abs().amax(-1, keepdim=True)
    top, power = (127, 2) if signed else (255, 4)
    part = x.abs() * (top**power / scale.clamp(min=1e-37))
    root = part.sqrt() if signed else part.sqrt().sqrt()
    low = root.floor().clamp(max=top - 1)
    below, above = low * low, (low + 1) * (low + 1)
    if not signed:
        below, above = below * below, above * above
    chance = _given(bits).to(x.dtype) * 2.0**-16
    code = low + (chance * (above - below) < part - below).to(x.dtype)
    if signed:
        code = 128 + torch.where(x < 0, -code, code)
    else:  # what is not zero never becomes zero: it stands below a fraction
        code = torch.where(x > 0, code.clamp(min=1.0), code)
    return code.to(torch.uint8), scale


INT8 = Codec(
    "int8",
    lambda slot: (
        Part(slot.name, slot.shape, torch.uint8, 128.0 if slot.signed else 0.0),
        Part(f"{slot.name}.scale", "block", torch.float32),
    ),
    _decode_int8,
    _encode_int8,
    random=True,
    blocked=True,
)


def _given(bits: Tensor | None) -> Tensor:
    assert bits is not None
    return bits


#: What ``slots`` of a recipe or a face may be.
CODECS = {codec.name: codec for codec in (FULL, BF16, BF16_ERROR, INT8)}
