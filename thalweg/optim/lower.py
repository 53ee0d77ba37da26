"""From a rule, written once as pure maths, to what runs: eagerly on any layout, or through a fused operator.

Both ways take lists of tensors, so that one flat buffer and a list of parameters are the same to them, and both take the
divisor of the gradient (loss scale, weight of the window and clipping in one number) and the flag of a skipped step as
tensors: nothing is read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.device import CAPABILITIES
from thalweg.optim.kernels import Kernel, kernel_for
from thalweg.rules import Rule


@dataclass(frozen=True)
class Update:
    """An update that can be run: ``how`` says which way, ``why`` the reason."""

    run: Kernel
    how: str
    why: str


def lower(
    rule: Rule,
    options: Mapping[str, Any],
    *,
    weight_decay: float,
    decay_form: str,
    dtype: torch.dtype,
    device: str,
    fused: bool | None = None,
) -> Update:
    """Choose how ``rule`` runs.

    Args:
        options: complete, as ``rule.options`` gives them.
        weight_decay, decay_form: the stage before the rule; "decoupled" or "coupled".
        fused: True or False to force; None chooses.
    """
    decoupled = decay_form == "decoupled"
    kernel = kernel_for(rule.name, options, weight_decay=weight_decay, decoupled=decoupled, dtype=dtype, device=device)
    if kernel is not None and fused is not False:
        return Update(kernel, "fused", f"torch has a fused operator with the maths of {rule.name} on {device}")
    why = "asked for" if fused is False else f"no fused operator for {rule.name} in {dtype} on {device}"
    exact = torch.float64 if CAPABILITIES[device]["float64"] else torch.float32
    return Update(eager(rule, options, weight_decay=weight_decay, decoupled=decoupled, exact=exact), "eager", why)


def eager(
    rule: Rule, options: Mapping[str, Any], *, weight_decay: float, decoupled: bool, exact: torch.dtype = torch.float64
) -> Kernel:
    """The rule itself, tensor by tensor: decay, update, and the results written back where the step is not skipped.

    Args:
        exact: dtype of the update's number: 1 - b**t loses half its digits in float32.
    """

    def kernel(
        ps: list[Tensor],
        gs: list[Tensor],
        slots: list[list[Tensor]],
        ts: list[Tensor],
        lr: Any,
        divisor: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        for i, (p, g, t) in enumerate(zip(ps, gs, ts)):
            mine = [slot[i] for slot in slots]
            if divisor is not None:
                g = g / divisor
            start = p
            if weight_decay and decoupled:
                start = p * (1 - lr * weight_decay)
            elif weight_decay:
                g = g + weight_decay * p
            results = rule.update(start, g, *mine, lr=lr, t=t.to(exact), **options)
            for old, new in zip([p, *mine], results):
                old.copy_(new if skipped is None else torch.where(skipped > 0, old, new))

    return kernel
