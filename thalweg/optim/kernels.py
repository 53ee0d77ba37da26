"""Torch's own fused operators, where they are the same maths as a program: each passes the tests of what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thalweg.device import capabilities_of
from thalweg.optim.batch import Batch, is_dense, laid_like
from thalweg.optim.eager import Extra, Kernel, eager
from thalweg.optim.program import Program

#: Makes a call of a kernel for tensors that stay.
Bind = Callable[[Batch, Mapping[str, Any]], Callable[[], None] | None]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 has none: its divisor would be float32


def _adam(program: Program, decoupled: bool) -> Callable[..., Callable[[], None]]:
    run: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    o = program.options
    fixed = {"beta1": o["b1"], "beta2": o["b2"], "eps": o["eps"], "amsgrad": o["amsgrad"], "maximize": program.maximize}

    def ready(batch: Batch, lr: Any, t: Tensor, wd: float, divisor: Any, skipped: Any) -> Callable[[], None]:
        largest = batch.slots[2] if o["amsgrad"] else []
        ts = [t] * len(batch.ps)
        flags = {"grad_scale": divisor, "found_inf": skipped, **fixed}
        given = (batch.ps, batch.gs, batch.slots[0], batch.slots[1], largest, ts)
        return partial(run, *given, lr=lr, weight_decay=wd, **flags)

    return ready


def _sgd(program: Program, decoupled: bool) -> Callable[..., Callable[[], None]]:
    o = program.options
    fixed = {"momentum": o["momentum"], "nesterov": o["nesterov"], "maximize": program.maximize}

    def ready(batch: Batch, lr: Any, t: Tensor, wd: float, divisor: Any, skipped: Any) -> Callable[[], None]:
        coupled = 0.0 if decoupled else wd
        flags = {"grad_scale": divisor, "found_inf": skipped, "dampening": 0.0, "is_first_step": False, **fixed}
        buffers = batch.slots[0] if o["momentum"] else []
        run: Callable[[], None] = partial(
            torch._fused_sgd_, batch.ps, batch.gs, buffers, lr=lr, weight_decay=coupled, **flags
        )
        if not (decoupled and wd):
            return run

        def shrink_first() -> None:
            shrink = 1 - lr * wd * (1 if skipped is None else 1 - skipped)
            for p in batch.ps:
                p.mul_(shrink)
            run()

        return shrink_first

    return ready


_MAKERS = {"adam": _adam, "adamw": _adam, "sgd": _sgd}


@dataclass(frozen=True)
class Operator:
    """An operator of torch's in the place of a program.

    Attributes:
        run: as any kernel.
        bind: a call for a batch and scalars that stay the same tensors, whose values it reads anew each time; None where the
            operator cannot take these tensors as they lie.
    """

    run: Kernel
    bind: Bind


def fused(program: Program, *, device: str) -> Operator | None:
    """The fused operator with the maths of a program, or None where there is none.

    A weight average is a pass of its own after it.
    """
    rule = program.rule.name
    plain = len(program.parts) == len(program.rule.slots_for(program.options)) + bool(program.average)
    plain &= all(piece.kind in ("rule", "decay") or piece.component.name == "coupled" for piece in program.pieces)
    plain &= all(part.dtype is None for part in program.parts) and program.rounding == "nearest"
    plain &= program.rule.then is None and program.decay_form in (None, "coupled", "decoupled")
    plain &= not any(isinstance(value, Tensor) for value in program.options.values())
    plain &= (
        program.dtype == program.wide or not program.parts
    )  # half parameters have wide slots here, narrow ones there
    if rule not in _MAKERS or not capabilities_of(device).fused or program.dtype not in _DTYPES or not plain:
        return None
    if rule == "sgd" and program.options["nesterov"] and not program.options["momentum"]:
        return None
    ready = _MAKERS[rule](program, program.decay_form == "decoupled" or (rule == "adamw" and not program.decay_form))
    by_hand = eager(program)

    def bind(batch: Batch, scalars: Mapping[str, Any]) -> Callable[[], None] | None:
        gaps = not all(p.is_contiguous() or is_dense(p) for p in batch.ps)  # the operator walks memory, gaps and all
        wider = any(g.dtype != p.dtype for g, p in zip(batch.gs, batch.ps))
        if gaps or wider or isinstance(scalars.get("wd"), Tensor):  # and takes decay as a number of Python's
            return None
        if any(g.stride() != p.stride() for g, p in zip(batch.gs, batch.ps)):
            batch = replace(batch, gs=laid_like(batch.gs, batch.ps))
        divisor = scalars.get("single divisor")
        divisor = _single(scalars.get("divisor")) if divisor is None else divisor
        skipped = _single(scalars.get("skipped"))
        wd = scalars["wd"] if program.decay_form else 0.0
        run = ready(batch, scalars["lr"], _single(scalars["t"]), wd, divisor, skipped)
        if not program.average:
            return run

        def and_average() -> None:
            run()
            share = torch.as_tensor(scalars["share"])
            share = share if skipped is None else share * (1 - skipped)
            for p, average in zip(batch.ps, batch.slots[-1]):
                average.lerp_(p.to(average.dtype), share.to(average.dtype))

        return and_average

    def kernel(batch: Batch, scalars: Mapping[str, Any], *, due: int = 0, extra: Extra = None) -> None:
        run = bind(batch, scalars)
        if run is None:
            by_hand(batch, scalars, due=due, extra=extra)
        else:
            run()

    return Operator(kernel, bind)


def _single(number: Any) -> Any:
    return None if number is None else torch.as_tensor(number, dtype=torch.float32)
