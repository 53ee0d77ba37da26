"""Torch's own fused operators, where they are the same maths as a rule: each passes the tests of the rule it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: ``kernel(ps, gs, slots, ts, lr, divisor, skipped)``; slots by kind, each a list as long as ``ps``.
Kernel = Callable[
    [list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor], Any, Tensor | None, Tensor | None], None
]


def _adam(options: Mapping[str, Any], weight_decay: float, decoupled: bool) -> Kernel:
    run: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    fixed = {
        "beta1": options["b1"],
        "beta2": options["b2"],
        "eps": options["eps"],
        "weight_decay": weight_decay,
        "amsgrad": False,
        "maximize": False,
    }

    def kernel(ps: Any, gs: Any, slots: Any, ts: Any, lr: Any, divisor: Tensor | None, skipped: Tensor | None) -> None:
        run(ps, gs, slots[0], slots[1], [], ts, lr=lr, grad_scale=divisor, found_inf=skipped, **fixed)

    return kernel


def _sgd(options: Mapping[str, Any], weight_decay: float, decoupled: bool) -> Kernel:
    fixed = {
        "weight_decay": 0.0 if decoupled else weight_decay,
        "momentum": options["momentum"],
        "dampening": 0.0,
        "nesterov": options["nesterov"],
        "maximize": False,
        "is_first_step": False,
    }

    def kernel(ps: Any, gs: Any, slots: Any, ts: Any, lr: Any, divisor: Tensor | None, skipped: Tensor | None) -> None:
        if decoupled and weight_decay:
            shrink = 1 - lr * weight_decay * (1 if skipped is None else 1 - skipped)
            for p in ps:
                p.mul_(shrink)
        buffers = slots[0] if slots else []
        torch._fused_sgd_(ps, gs, buffers, lr=lr, grad_scale=divisor, found_inf=skipped, **fixed)

    return kernel


_MAKERS = {"adam": _adam, "adamw": _adam, "sgd": _sgd}
_DEVICES = ("cpu", "cuda", "xpu", "mps")


def kernel_for(
    rule: str, options: Mapping[str, Any], *, weight_decay: float, decoupled: bool, dtype: torch.dtype, device: str
) -> Kernel | None:
    """The fused operator for a rule, or None where there is none with the same maths.

    float64 has none: the operators take the divisor of the gradient in float32.
    """
    if rule not in _MAKERS or device not in _DEVICES or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if rule == "sgd" and options["nesterov"] and not options["momentum"]:
        return None
    return _MAKERS[rule](options, weight_decay, decoupled)
