"""One flat buffer for all parameters of a dtype, one for their gradients, one for each slot and for the average.

Parameters and gradients are views of the buffers: zeroing, the norm, the update and the average are each one call, however
many tensors the model has, and every optimizer state is one tensor. Parameters that decay come first, so that a contiguous
segment shares its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core import ParameterRow
from thalweg.optim.lower import Update, lower
from thalweg.rules import Rule

_ALIGN = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Segment:
    """A run of the arena that shares its hyper-parameters, and how it is updated."""

    params: Tensor
    grads: Tensor
    slots: list[list[Tensor]]
    update: Update


class Arena:
    """The flat buffers of the parameters of one dtype.

    Args:
        named: (name, parameter); each becomes a view of the arena, strides kept.
        rows: the parameter table, by name.
        rule, options, weight_decay, decay_form: as for ``lower``.
        average: whether to keep a weight average (in at least float32).
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        rows: Mapping[str, ParameterRow],
        rule: Rule,
        options: Mapping[str, Any],
        *,
        weight_decay: float,
        decay_form: str,
        average: bool,
        fused: bool | None = None,
    ) -> None:
        first = named[0][1]
        self.dtype, self.device = first.dtype, first.device
        self.scalar_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        step = _ALIGN // first.element_size()
        self.places: dict[str, tuple[int, nn.Parameter]] = {}
        ordered = sorted(named, key=lambda pair: not rows[pair[0]].decays)
        size, border = 0, 0
        for name, p in ordered:
            self.places[name] = (size, p)
            size += -(-p.numel() // step) * step
            border = size if rows[name].decays else border
        self.params, self.grads = self._zeros(size), self._zeros(size)
        self.slot_names = rule.slots_for(options)
        self.slots = {name: self._zeros(size) for name in self.slot_names}
        self.average = self._zeros(size, torch.promote_types(self.dtype, torch.float32)) if average else None
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        for name, (_, p) in self.places.items():
            view = self.view(self.params, name)
            view.copy_(p.detach())
            p.data = view
            p.grad = self.view(self.grads, name)
            self._views.append((p, p.grad))
        if self.average is not None:
            self.average.copy_(self.params)
        self.segments = []
        for start, stop, strength in ((0, border, weight_decay), (border, size, 0.0)):
            if start < stop:
                update = lower(
                    rule,
                    options,
                    weight_decay=strength,
                    decay_form=decay_form,
                    dtype=self.dtype,
                    device=self.device.type,
                    fused=fused,
                )
                slots = [[flat[start:stop]] for flat in self.slots.values()]
                self.segments.append(Segment(self.params[start:stop], self.grads[start:stop], slots, update))

    def _zeros(self, size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.device)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to the parameter ``name``, in its shape and strides."""
        start, p = self.places[name]
        part = flat[start : start + p.numel()]
        dense = p.numel() and _is_dense(p)
        return part.as_strided(p.shape, p.stride(), part.storage_offset()) if dense else part.view(p.shape)

    def hold_gradients(self) -> None:
        """Gradients that someone replaced or set to None go back into the arena."""
        for p, view in self._views:
            if p.grad is not view:
                if p.grad is not None:
                    view.copy_(p.grad)
                p.grad = view

    def run(self, lr: Tensor, t: Tensor, divisor: Tensor, skipped: Tensor) -> None:
        """One update of every segment: decay, rule and write-back, unless ``skipped``."""
        lr, divisor = lr.to(self.scalar_dtype), divisor.to(self.scalar_dtype)
        for segment in self.segments:
            segment.update.run([segment.params], [segment.grads], segment.slots, [t], lr, divisor, skipped)

    def nbytes(self) -> dict[str, int]:
        sizes = {"parameters": self.params.nbytes, "gradients": self.grads.nbytes}
        sizes["slots"] = sum(flat.nbytes for flat in self.slots.values())
        sizes["average"] = 0 if self.average is None else self.average.nbytes
        return sizes


def _is_dense(p: Tensor) -> bool:
    """Whether the tensor's elements fill its storage span, each once: any permutation of a contiguous layout."""
    pairs = sorted((stride, size) for size, stride in zip(p.shape, p.stride()) if size != 1)
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def make_arenas(
    model: nn.Module,
    rows: Sequence[ParameterRow],
    named: Sequence[tuple[str, nn.Parameter]],
    rule: Rule,
    options: Mapping[str, Any],
    **how: Any,
) -> list[Arena]:
    """An arena for each dtype and device among the parameters."""
    by_name = {row.name: row for row in rows}
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
    for name, p in named:
        groups.setdefault((p.dtype, p.device), []).append((name, p))
    return [Arena(group, by_name, rule, options, **how) for group in groups.values()]
