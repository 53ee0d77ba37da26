"""One pure function for all that happens to a parameter in a step, put together from the rule and its stages.

Unscale, gradient stages, rule, update stages, decay, stages of the whole change, weights, average, rounding: each is written
once elsewhere, and this composes them. Every way of running (eager, flat, stacked, compiled) runs this function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.core import RecipeError
from thalweg.optim.codecs import FULL, Codec, Part, hashed, round_to_bf16, with_error
from thalweg.rules import DECAYS, REACHES, STAGES, Component, Rule, Slot, Stage

#: What ``due`` may be: not, yes, and yes for the first time.
NOT_DUE, DUE, FIRST = 0, 1, 2

TENSORS = ("noise", "curvature")  # what a component may need shaped like the gradient
_GIVEN = ("due", "fresh", "ndim", *TENSORS)  # what it gets as it is, not as a scalar
_ROUNDINGS = {torch.bfloat16: "stochastic", torch.float16: "kahan"}  # what "auto" is
_ORDER = ("gradient", "update", "decay", "total", "weights")


@dataclass(frozen=True)
class Piece:
    """A component in its place: options filled, and which slots are its own."""

    component: Component
    kind: str
    options: Mapping[str, Any]
    first: int
    num: int


class Program:
    """The update of one parameter as a pure function on stored tensors.

    Args:
        rule, options: the rule, and its complete options.
        stages: (stage, complete options), in any order; they act in the order of their kinds.
        decay_form: a key of ``DECAYS``, or None: no decay.
        dtype: of the parameter as stored.
        rounding: of parameters of fewer than 32 bits: "nearest", "stochastic", "kahan"; "auto": bfloat16 stochastic, float16
            Kahan.
        codec: of slots that can be compressed.
        average: whether a weight average is kept.
        clear: whether the gradients are zero afterwards, skipped update or not; a kernel does it while they are in the cache.
        maximize: climb instead of descending.
        unscale: whether gradients are divided by the scalar "divisor".
        seed: of the random bits of stochastic rounding.
        exact: dtype of the scalars; float64 where the device has it.
    """

    def __init__(
        self,
        rule: Rule,
        options: Mapping[str, Any],
        *,
        stages: Sequence[tuple[Stage, Mapping[str, Any]]] = (),
        decay_form: str | None = None,
        dtype: torch.dtype = torch.float32,
        rounding: str = "nearest",
        codec: Codec = FULL,
        average: bool = False,
        unscale: bool = False,
        maximize: bool = False,
        clear: bool = False,
        seed: int = 0,
        exact: torch.dtype = torch.float64,
    ) -> None:
        self.rule, self.options, self.dtype, self.exact = rule, options, dtype, exact
        self.wide = torch.promote_types(dtype, torch.float32)
        rounding = _ROUNDINGS.get(dtype, "nearest") if rounding == "auto" else rounding
        self.rounding = rounding if dtype != self.wide else "nearest"
        self.unscale, self.maximize, self.seed = unscale, maximize, seed & 0x7FFFFFFF
        self.decay_form, self.clear = decay_form, clear
        found = [(s.kind, s, o) for s, o in stages]
        ruled: tuple[str, Component, Mapping[str, Any]] = ("rule", rule, options)
        if rule.then is not None:  # last of its kind: it must see the whole change
            after = STAGES[rule.then]
            found.append((after.kind, after, {name: options[name] for name in after.defaults}))
            ruled = ("rule", rule, {name: v for name, v in options.items() if name not in after.defaults})
        if decay_form is not None:
            form = STAGES[DECAYS[decay_form]]
            found.insert(0, (form.kind, form, {}))
        found.sort(key=lambda item: _ORDER.index(item[0]))
        slots: list[Slot] = []
        self.pieces: list[Piece] = []
        border = sum(kind == "gradient" for kind, _, _ in found)
        for kind, component, mine in [*found[:border], ruled, *found[border:]]:
            own = component.slots_for(mine)
            self.pieces.append(Piece(component, kind, mine, len(slots), len(own)))
            prefix = "" if component is rule else f"{component.name}."
            slots += [Slot(prefix + s.name, s.shape, s.start, s.signed, s.compressible) for s in own]
        self.average = average
        if average:
            slots.append(Slot("average", start="param", compressible=False))
        self.slots = tuple(slots)
        self.codecs = tuple(codec if s.compressible and s.shape == "like" and s.start == 0 else FULL for s in slots)
        self.reads = max((piece.component.reads for piece in self.pieces), key=REACHES.index)
        reaches = {piece.component.reads for piece in self.pieces}
        self.folds = bool(reaches & {"row", "matrix"})
        self.blocked = any(c.blocked for c in self.codecs)
        if self.blocked and self.reads != "element":
            whole = next(piece.component for piece in self.pieces if piece.component.reads != "element")
            raise RecipeError(
                f"Slots in {codec.name} need a rule that works element by element.",
                f"{whole.name} reads a whole {whole.reads}.",
                "Use slots='bf16' or 'bf16+error', or another rule.",
            )
        self.parts: tuple[Part, ...] = self._parts()
        self.random = self.rounding == "stochastic" or any(c.random for c in self.codecs)
        self.stacks = self.folds and "tensor" not in reaches and not self.random
        self.needs_due = any("due" in piece.component.needs for piece in self.pieces)
        self.tensors = tuple(n for n in TENSORS if any(n in piece.component.needs for piece in self.pieces))
        self.scalars = self._scalars()

    def _parts(self) -> tuple[Part, ...]:
        parts = [part for slot, codec in zip(self.slots, self.codecs) for part in codec.parts(slot)]
        if self.rounding == "kahan":
            parts.append(Part("weight.error", "like", self.dtype))
        return tuple(parts)

    def _scalars(self) -> tuple[str, ...]:
        """What a run must be given, by name; the same for every way of running."""
        names = ["lr", "t", *([self.rule.rate] if self.rule.rate else [])]
        for piece in self.pieces:
            names += [n for n in piece.component.needs if n not in _GIVEN]
            names += [n for n, v in piece.options.items() if isinstance(v, Tensor)]
        names += ["divisor"] if self.unscale else []
        names += ["share"] if self.average else []
        return tuple(dict.fromkeys(names))

    def dtype_of(self, part: Part) -> torch.dtype:
        if part.dtype is not None:
            return part.dtype
        return self.exact if part.shape == "uniform" else self.wide

    def run(
        self,
        p: Tensor,
        g: Tensor,
        stored: Sequence[Tensor],
        scalars: Mapping[str, Tensor],
        *,
        index: Tensor | None = None,
        due: int = 0,
        extra: Mapping[str, Tensor] | None = None,
        ndim: int = 2,
    ) -> tuple[Tensor, ...]:
        """(new p, *new stored): nothing is written in place.

        Args:
            p, g, stored: as they lie in memory, in the shapes that ``reads`` asks for.
            scalars: 0-dim tensors for ``self.scalars``.
            index: number of each element, int32, shaped like p; where ``random``.
            due: ``NOT_DUE``, ``DUE`` or ``FIRST``.
            ndim: as for ``Rule.needs``.
            extra: what else it needs, of ``TENSORS``, shaped like g.
        """
        known = self.known(scalars, due=due > 0, fresh=due == FIRST, ndim=ndim, extra=extra)
        start, g, slots = self.prepare(p, g, stored, known)
        change = q = start
        for piece in self.pieces:
            if piece.kind == "gradient":
                continue
            mine = slots[piece.first : piece.first + piece.num]
            words = self._words(piece, known)
            if piece.kind == "rule":
                change, *new = piece.component.update(start, g, *mine, **words)
            elif piece.kind == "weights":
                q, *new = piece.component.update(start, q, *mine, **words)
            else:
                change, *new = piece.component.update(start, g, change, *mine, **words)
            if piece.kind != "weights":
                q = start + change
            slots[piece.first : piece.first + piece.num] = new
        if self.average:
            slots[-1] = slots[-1] + known["share"] * (q - slots[-1])
        return self._encode(q, slots, known["t"].to(torch.int32), index)

    def prepare(
        self, p: Tensor, g: Tensor, stored: Sequence[Tensor], known: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(wide parameter, gradient as the rule sees it, wide slots with those of the gradient stages new)."""
        slots, errors = self._decode(stored)
        start = p.to(self.wide)
        if self.rounding == "kahan":
            start = start + errors[0].to(self.wide)
        g = g.to(self.wide)
        if self.unscale:
            g = g * (1 / known["divisor"])
        if self.maximize:
            g = -g
        for piece in self.pieces:
            if piece.kind == "gradient":
                mine = slots[piece.first : piece.first + piece.num]
                g, *new = piece.component.update(start, g, *mine, **self._words(piece, known))
                slots[piece.first : piece.first + piece.num] = new
        return start, g, slots

    def known(self, scalars: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
        """Every number by name, in the exact dtype, and what is given as it is."""
        known: dict[str, Any] = {name: scalars[name].to(self.exact) for name in self.scalars}
        extra = given.pop("extra", None)
        return {**known, **given, **dict.fromkeys(self.tensors), **(extra or {})}

    def _words(self, piece: Piece, known: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a piece."""
        words = {n: known[n] for n in piece.component.needs}
        words |= {n: known[n] if isinstance(v, Tensor) else v for n, v in piece.options.items()}
        if piece.kind == "decay" and self.rule.rate is not None:
            words["lr"] = known["lr"] * known[self.rule.rate]
        return words

    def _decode(self, stored: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        slots, place = [], 0
        for slot, codec in zip(self.slots, self.codecs):
            num = len(codec.parts(slot))
            wide = self.exact if slot.shape == "uniform" else self.wide
            slots.append(codec.decode(stored[place : place + num], wide, slot.signed))
            place += num
        return slots, stored[place:]

    def _encode(self, q: Tensor, slots: Sequence[Tensor], key: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
        drawn: dict[int, Tensor] = {}

        def bits(salt: int) -> Tensor:
            """16 bits for each element; one hash serves two."""
            assert index is not None
            if salt // 2 not in drawn:
                drawn[salt // 2] = hashed(index, key * 0x2C1B3C6D + self.seed, salt // 2)
            return (drawn[salt // 2] >> 16 * (salt % 2)) & 0xFFFF

        stored: list[Tensor] = []
        for salt, (slot, codec, value) in enumerate(zip(self.slots, self.codecs, slots), start=1):
            stored += codec.encode(value, bits(salt) if codec.random else None, slot.signed)
        if self.rounding == "stochastic":
            return (round_to_bf16(q, bits(0)), *stored)
        if self.rounding == "kahan":
            near, error = with_error(q, self.dtype)
            return (near, *stored, error)
        return (q.to(self.dtype), *stored)


def due_now(rule: Rule, options: Mapping[str, Any], tries: int) -> int:
    """Whether periodic work is due, by the number of updates attempted before."""
    if rule.clock is None or tries % int(options[rule.clock]):
        return NOT_DUE
    return DUE if tries else FIRST
